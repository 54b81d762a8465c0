"""Snapshots: a run that went back is the run that it was."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.snapshot import Snapshot, is_finite, size
from tests.distributed.launcher import launch
from tests.distributed.program import HAS_FSDP2

MATRICES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "momentum_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam_tensor_rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "adamw_amsgrad_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4),
    "lbfgs_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    MATRICES["muon"] = lambda p: torch.optim.Muon(p, lr=0.1)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))


def _train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2].sin()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def _weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("taken_at", [0, 1, 7])
def test_a_run_that_went_back_goes_on_as_if_nothing_had_been(name, taken_at):
    model = _net()
    optimizer = MATRICES[name](model.parameters())
    _train(model, optimizer, taken_at)
    snapshot = Snapshot.take(model, [optimizer])
    _train(model, optimizer, 6, first=taken_at)
    straight = _weights(model)
    for _ in range(2):  # and again: nothing of the snapshot is handed out
        assert snapshot.restore(model, [optimizer]) == ()
        _train(model, optimizer, 6, first=taken_at)
        assert _same(_weights(model), straight)


@pytest.mark.parametrize("name", MATRICES)
def test_the_state_is_what_a_deep_copy_had_kept(name):
    model = _net()
    optimizer = MATRICES[name](model.parameters())
    _train(model, optimizer, 7)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    snapshot = Snapshot.take(model, [optimizer])
    _train(model, optimizer, 3)
    snapshot.restore(model, [optimizer])
    torch.testing.assert_close(optimizer.state_dict()["state"], kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", MATRICES)
def test_state_that_was_removed_since_is_made_anew(name):
    model = _net()
    optimizer = MATRICES[name](model.parameters())
    _train(model, optimizer, 4)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    snapshot = Snapshot.take(model, [optimizer])
    optimizer.state.clear()
    snapshot.restore(model, [optimizer])
    torch.testing.assert_close(optimizer.state_dict()["state"], kept, rtol=0, atol=0)


def test_state_that_came_since_is_removed_and_so_are_gradients():
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    snapshot = Snapshot.take(model, [optimizer])
    _train(model, optimizer, 1)
    snapshot.restore(model, [optimizer])
    assert len(optimizer.state) == 0
    assert all(p.grad is None for p in model.parameters())


def test_what_the_run_does_does_not_reach_the_snapshot():
    model = nn.BatchNorm1d(2)
    snapshot = Snapshot.take(model, [])
    before = _weights(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    snapshot.restore(model, [])
    assert _same(_weights(model), before)


def test_tensors_that_are_there_are_written_to_and_stay_the_same_objects():
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    _train(model, optimizer, 2)
    snapshot = Snapshot.take(model, [optimizer])
    weight = model[0].weight
    pointers = [weight.data_ptr(), *(t.data_ptr() for t in optimizer.state[weight].values())]
    _train(model, optimizer, 2)
    snapshot.restore(model, [optimizer])
    assert model[0].weight is weight
    assert pointers == [weight.data_ptr(), *(t.data_ptr() for t in optimizer.state[weight].values())]


def test_settings_of_parameter_groups_are_left_to_the_scheduler():
    model = _net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    snapshot = Snapshot.take(model, [optimizer])
    optimizer.param_groups[0]["lr"] = 0.02
    snapshot.restore(model, [optimizer])
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_tied_weight_is_kept_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert Snapshot.take(model, []).nbytes == size(model, []) == 4 * 4 * 4


def test_buffers_that_no_checkpoint_holds_come_back():
    model = nn.Module()
    model.register_buffer("seen", torch.tensor(3), persistent=False)
    snapshot = Snapshot.take(model, [])
    model.seen += 1
    snapshot.restore(model, [])
    assert model.seen == 3


@pytest.mark.parametrize(
    "now",
    [None, torch.zeros(5), torch.zeros(1).expand(3), torch.zeros(3, dtype=torch.float64), torch.zeros(3).to_sparse()],
    ids=["none", "other shape", "repeated memory", "other format", "sparse"],
)
def test_a_buffer_that_the_model_has_replaced_comes_back(now):
    model = nn.Sequential(nn.Module())
    model[0].register_buffer("memory", torch.tensor([1.0, 2.0, 3.0]))
    snapshot = Snapshot.take(model, [])
    model[0].memory = now
    assert snapshot.restore(model, []) == ()
    assert model[0].memory.tolist() == [1.0, 2.0, 3.0]
    assert [name for name, _ in model.named_buffers()] == ["0.memory"]


def test_a_buffer_made_in_inference_mode_comes_back():
    model = nn.Module()
    model.register_buffer("memory", torch.ones(2))
    snapshot = Snapshot.take(model, [])
    with torch.inference_mode():
        model.memory = model.memory * 2
    snapshot.restore(model, [])
    assert model.memory.tolist() == [1.0, 1.0]


def test_buffers_whose_memory_repeats_and_sparse_ones_are_kept():
    model = nn.Module()
    model.register_buffer("wide", torch.ones(1).expand(3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    snapshot = Snapshot.take(model, [])
    assert snapshot.restore(model, []) == ()
    assert model.wide.tolist() == [1.0] * 3
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


def test_two_states_that_have_become_one_tensor_are_two_again():
    class Keeps(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["before"] = state.get("now", torch.zeros_like(p))
                state["now"] = p.grad.clone()

    weight = nn.Parameter(torch.zeros(2))
    model = nn.ParameterList([weight])
    optimizer = Keeps([weight])
    for value in (1.0, 2.0):
        weight.grad = torch.full((2,), value)
        optimizer.step()
    snapshot = Snapshot.take(model, [optimizer])
    optimizer.state[weight]["before"] = optimizer.state[weight]["now"]
    snapshot.restore(model, [optimizer])
    assert optimizer.state[weight]["before"].tolist() == [1.0, 1.0]
    assert optimizer.state[weight]["now"].tolist() == [2.0, 2.0]


def test_lists_tuples_numbers_and_shared_tensors_of_a_state_come_back():
    weight = nn.Parameter(torch.zeros(2))
    model, optimizer = nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1)
    shared = torch.tensor([5.0])
    state = {
        "list": [shared, [torch.ones(1), None]],
        "tuple": (shared, 3),
        "dict": {"a": torch.eye(2)},
        "n": 4,
        "x": "s",
    }
    optimizer.state[weight] = state
    optimizer.state["common"] = {"step": 9}
    snapshot = Snapshot.take(model, [optimizer])
    optimizer.state[weight] = {"list": [], "later": 1}
    optimizer.state["common"]["step"] = 10
    snapshot.restore(model, [optimizer])
    restored = optimizer.state[weight]
    assert restored["list"][0] is restored["tuple"][0]
    assert restored["list"][0] is not shared
    assert restored["tuple"][1] == 3
    assert restored["list"][1][0].tolist() == [1.0]
    assert restored["list"][1][1] is None
    assert torch.equal(restored["dict"]["a"], torch.eye(2))
    assert (restored["n"], restored["x"], "later" in restored) == (4, "s", False)
    assert optimizer.state["common"] == {"step": 9}


def test_parameters_that_do_not_fit_any_more_stay_as_they_are_and_are_named():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    snapshot = Snapshot.take(model, [optimizer])
    shrunk = model[0].weight
    shrunk.data = torch.full((1, 2), 7.0)
    model[1].weight = nn.Parameter(torch.full((2, 2), 8.0))
    model.append(nn.Linear(2, 2, bias=False))
    model[2].weight.data.fill_(9.0)
    model[3] = nn.Identity()
    assert set(snapshot.restore(model, [optimizer])) == {"0.weight", "1.weight", "3.weight", "4.weight"}
    assert shrunk.tolist() == [[7.0, 7.0]]
    assert model[1].weight.unique().tolist() == [8.0]
    assert 9.0 not in model[2].weight
    assert shrunk not in optimizer.state
    assert model[2].weight in optimizer.state


def test_a_parameter_that_left_its_optimizer_gets_no_state_there():
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    _train(model, optimizer, 1)
    snapshot = Snapshot.take(model, [optimizer])
    optimizer.param_groups[0]["params"].remove(model[0].weight)
    snapshot.restore(model, [optimizer])
    assert list(optimizer.state) == [model[2].weight]
    assert len(optimizer.state_dict()["state"]) == 1  # torch raises here where it knows a state's parameter no more


def test_a_lazy_layer_that_has_seen_no_batch_is_passed_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    snapshot = Snapshot.take(model, [])
    assert snapshot.nbytes == size(model, []) == 6 * 4
    assert snapshot.restore(model, []) == ()
    assert is_finite(model)
    model(torch.ones(1, 2))
    assert set(snapshot.restore(model, [])) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("name", MATRICES)
def test_the_size_said_after_a_step_is_the_size_taken(name):
    model = _net()
    optimizer = MATRICES[name](model.parameters())
    _train(model, optimizer, 12)  # LBFGS has filled its history
    said, taken = size(model, [optimizer]), Snapshot.take(model, [optimizer]).nbytes
    # LBFGS keeps some single numbers as tensors beside what is foreseen
    assert said == pytest.approx(taken, rel=0.15) if "lbfgs" in name else said == taken


@pytest.mark.parametrize("name", MATRICES)
def test_the_size_said_before_the_first_step_is_that_after_it(name):
    model = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Linear(40, 20, bias=False))
    optimizer = MATRICES[name](model.parameters())
    said = size(model, [optimizer])
    for step in range(8):
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
        optimizer.step(lambda x=x: (model.zero_grad(), loss := model(x).cos().sum(), loss.backward())[1])
    taken = Snapshot.take(model, [optimizer]).nbytes
    if name == "adafactor":
        assert taken < said <= 2 * taken
    else:
        assert said == pytest.approx(taken, rel=0.01)


def test_state_still_to_come_is_foreseen_from_that_of_other_parameters():
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
    optimizer = torch.optim.RMSprop(model.parameters())
    model[0](torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert size(model, [optimizer]) == 2 * 256 + 2 * (256 + 4)


def test_frozen_parameters_are_kept_and_have_no_state_to_foresee():
    model = nn.Linear(2, 2, bias=False).requires_grad_(False)
    assert size(model, [torch.optim.Adam(model.parameters())]) == 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_one_parameter_that_is_not_finite_is_seen(value, dtype):
    model = nn.ParameterList([torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)])
    assert is_finite(model)
    model[1].data[1, 0] = value
    assert not is_finite(model)


def test_large_numbers_are_finite():
    model = nn.Linear(2, 2)
    model.weight.data.fill_(torch.finfo(torch.float32).max)
    assert is_finite(model)


@pytest.mark.parametrize(("value", "fine"), [(float("nan"), False), (float("inf"), False), (-float("inf"), True)])
def test_an_attention_mask_is_no_damage_and_spoilt_statistics_are(value, fine):
    model = nn.Module()
    model.register_buffer("values", torch.tensor([0.0, value]))
    assert is_finite(model) is fine


def test_models_without_numbers_are_finite():
    model = nn.Module()
    model.register_buffer("count", torch.tensor(3))
    model.empty = nn.Parameter(torch.zeros(0))
    assert is_finite(model)
    assert is_finite(nn.Module())


def test_ranks_that_disagree_get_one_answer():
    model = nn.Linear(2, 2)
    assert not is_finite(model, averaged=lambda fine: fine / 2)  # the other rank's 0 in the mean


def test_weights_in_a_format_of_8_bit_are_read():
    model = nn.Module()
    model.register_buffer("scaled", torch.ones(2).to(torch.float8_e4m3fn))
    assert is_finite(model)
    model.scaled = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert not is_finite(model)
    snapshot = Snapshot.take(model, [])
    assert snapshot.nbytes == 2


@pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 runs on the CPU from torch 2.7 on")
def test_spread_weights_come_back_and_no_rank_waits_for_another():
    ranks = launch("tests.remedies.snapshot_program")
    assert [json.dumps(rank) for rank in ranks] == [json.dumps(ranks[0])] * 2
    assert ranks[0] == {
        "collectives": 0,
        "same": True,
        "goes_on": True,
        "removed": True,
        "bytes": True,
        "finite": [True, False],
    }
