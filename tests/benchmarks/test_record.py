"""What is recorded is what plain autograd says, and the training does not notice."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.record import Watcher
from tests.benchmarks.zoo.case import Case, seeded
from tests.benchmarks.zoo.data import digits
from tests.benchmarks.zoo.task import ADAM, Task
from tests.benchmarks.zoo.vision import RowLSTM


def net():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))


SGD = partial(torch.optim.SGD, lr=0.5)
CASE = Case("small", seeded(lambda: Task(net(), SGD)), digits, 3)


@pytest.fixture(scope="module")
def watched():
    watcher = Watcher()
    module = CASE.fit(0, callbacks=[watcher])
    return watcher.record, module


@pytest.fixture(scope="module")
def steps():
    """The same three steps by hand: module, batch, output, gradients and weights before and after."""
    L.seed_everything(0, verbose=False)
    module = CASE.build(0)
    found = []
    for x, y in list(CASE.data(0))[:3]:
        layers = list(module.net)
        before = [p.detach().clone() for p in module.parameters()]
        output = module(x)
        loss = F.cross_entropy(output, y)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            relu = layers[1](layers[0](x))
            z = layers[2](relu)
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
        after = [p.detach().clone() for p in module.parameters()]
        accuracy = float((output.argmax(1) == y).float().mean())
        found.append((loss.item(), accuracy, relu, z, gradients, before, after))
    return found


def test_gradients_are_those_of_autograd(watched, steps):
    record, _ = watched
    assert record.tensors == tuple(f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias"))
    for row, (_, _, _, _, gradients, _, _) in enumerate(steps):
        assert record.norm[row] == pytest.approx([float(g.norm()) for g in gradients], rel=1e-5)
        assert record.mean_abs[row] == pytest.approx([float(g.abs().mean()) for g in gradients], rel=1e-5)
        assert record.zero[row] == pytest.approx([float((g == 0).float().mean()) for g in gradients], abs=1e-6)


def test_updates_are_of_weights_alone(watched, steps):
    record, _ = watched
    for row, (*_, before, after) in enumerate(steps):
        ratios = [float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)]
        assert record.update[row, ::2] == pytest.approx(ratios[::2], rel=1e-4)
        assert np.isnan(record.update[row, 1::2]).all()


def test_activations_are_those_of_the_forward_pass(watched, steps):
    record, _ = watched
    assert (record.relus, record.bounded) == (("net.1",), ("net.3",))
    for row, (_, _, relu, z, *_) in enumerate(steps):
        assert record.relu_flat[row, 0] == pytest.approx(float((relu <= 0).float().mean()))
        idle = [(relu[:, unit] > 0).float().mean() < 0.01 for unit in range(16)]
        assert record.relu_inactive[row, 0] == pytest.approx(np.mean(idle))
        assert record.beyond_5[row, 0] == pytest.approx(float((z.abs() >= 5).float().mean()))


def test_loss_and_accuracy_are_those_of_the_batches(watched, steps):
    record, _ = watched
    assert record.loss == pytest.approx([step[0] for step in steps], rel=1e-5)
    assert record.accuracy == pytest.approx([step[1] for step in steps])
    assert (list(record.epoch), record.planned, len(record)) == ([0, 0, 0], 3, 3)


def test_the_training_comes_out_the_same_to_the_last_bit(watched):
    _, module = watched
    plain = CASE.fit(0)
    assert all(map(torch.equal, plain.state_dict().values(), module.state_dict().values()))


def test_a_saturated_unit_and_a_dead_one_are_counted():
    def build():
        made = net()
        with torch.no_grad():
            made[0].bias[:12] = -1e4
            made[2].bias[:6] = 20.0
        return Task(made)

    watcher = Watcher()
    Case("extreme", seeded(build), digits, 1).fit(0, callbacks=[watcher])
    assert watcher.record.relu_inactive[0, 0] == pytest.approx(12 / 16)
    assert watcher.record.saturated[0, 0] == pytest.approx(6 / 8)
    assert watcher.record.beyond_5[0, 0] == pytest.approx(6 / 8)


def test_what_is_not_finite_is_infinite_and_what_has_no_gradient_is_missing():
    def build():
        made = net()
        made[0].requires_grad_(False)
        return Task(made, scale=float("nan"))

    watcher = Watcher()
    Case("frozen", seeded(build), digits, 1).fit(0, callbacks=[watcher])
    assert np.isnan(watcher.record.norm[0, :2]).all()
    assert np.isposinf(watcher.record.norm[0, 2:]).all()
    assert np.isposinf(watcher.record.loss).all()


def test_the_hidden_weight_of_a_recurrence_is_known():
    watcher = Watcher()
    Case("rows", seeded(lambda: Task(RowLSTM(hidden=4), ADAM)), digits, 1).fit(0, callbacks=[watcher])
    record = watcher.record
    assert [n for n, is_hidden in zip(record.tensors, record.recurrent, strict=True) if is_hidden] == [
        "net.rnn.weight_hh_l0"
    ]


def test_accumulated_batches_make_one_step():
    watcher = Watcher()
    case = Case("accumulated", CASE.build, digits, 2, trainer_kwargs={"accumulate_grad_batches": 3})
    case.fit(0, callbacks=[watcher])
    assert len(watcher.record) == 2
