"""Sums over two real ranks."""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from lightning_gradflow.probes.ranks import PackedSum, world_size

PROGRAM = """
import json, sys, warnings
from datetime import timedelta
import torch, torch.distributed as dist
from torch import nn
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.ranks import PackedSum, world_size
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

rank = int(sys.argv[1])
torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0, timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
answer = {"world_size": world_size()}

def sums():
    total = PackedSum()
    total.update(torch.tensor([1.0, 10.0]) * (rank + 1))
    total.update(torch.tensor([0.5, 0.0]))
    return total.compute().tolist()

answer["sums"] = sums()

def sample(probe, transfer, x):
    probe.start_batch()
    loss = model(x).mean()
    probe.before_backward()
    loss.backward()
    probe.finish()
    return {point.name: values for point, values in probe.collect(transfer.fetch()).items()}

# each rank sees one half of a batch of two; unit 0 fires for the one, unit 1 for the other, unit 2 for none
model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
transfer = Transfer()
x = torch.tensor([[1.0, 0.0]]) if rank == 0 else torch.tensor([[0.0, 3.0]])
answer["signals"] = sample(SignalProbe(LayerMap(model), transfer, window=1), transfer, x)

# an error on one rank only
probe = SignalProbe(LayerMap(model), transfer)
if rank == 0:
    probe._take = None
try:
    sample(probe, transfer, x)
    answer["error"] = None
except Exception as error:
    answer["error"] = type(error).__name__
answer["sums after the error"] = sums()

# a batch that is empty on one rank only
try:
    sample(SignalProbe(LayerMap(model), transfer), transfer, x[:rank])
    answer["empty"] = None
except Exception as error:
    answer["empty"] = type(error).__name__
answer["sums after the empty batch"] = sums()
print(json.dumps(answer))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ExitStack() as processes:
        ranks = []
        for rank in range(2):
            command = [sys.executable, "-c", PROGRAM, str(rank), port]
            ranks.append(processes.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            processes.callback(ranks[-1].kill)
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert all(outputs), "a rank died"
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_there_are_two_ranks(answers):
    assert [answer["world_size"] for answer in answers] == [2, 2]


def test_both_ranks_get_the_sum_over_updates_and_ranks(answers):
    assert [answer["sums"] for answer in answers] == [[4.0, 30.0]] * 2


def test_both_ranks_get_the_same_numbers(answers):
    assert answers[0]["signals"] == answers[1]["signals"]


def test_signals_of_two_halves_are_those_of_the_whole_batch(answers):
    torch.manual_seed(0)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    hidden = (x @ weight.T).requires_grad_()
    output = hidden.relu()
    at_hidden, at_output = torch.autograd.grad(output.mean(), (hidden, output))
    found = answers[0]["signals"]
    assert found["0"]["output_rms"] == pytest.approx(hidden.square().mean().sqrt().item())
    assert found["0"]["delta_norm"] == pytest.approx(at_hidden.norm().item())
    assert found["1"]["delta_norm"] == pytest.approx(at_output.norm().item())


def test_a_unit_is_dead_only_where_it_is_silent_on_every_rank(answers):
    assert answers[0]["signals"]["1"]["dead_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("what", ["error", "empty"])
def test_what_one_rank_cannot_measure_ends_the_sample_on_both(answers, what):
    assert all(answer[what] for answer in answers)


@pytest.mark.parametrize("after", ["sums after the error", "sums after the empty batch"])
def test_afterwards_no_rank_waits_for_the_other(answers, after):
    assert [answer[after] for answer in answers] == [[4.0, 30.0]] * 2


def test_outside_of_distributed_training_there_is_one_rank():
    assert world_size() == 1


def test_a_reset_forgets_the_size():
    total = PackedSum()
    total.update(torch.ones(3))
    total.reset()
    total.update(torch.tensor([1.0, 2.0]))
    assert total.compute().tolist() == [1.0, 2.0]
