"""Recurrences drawn anew: what the weights are, and how long the state lasts."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

from lightning_gradflow.remedies.recurrent import reinitialise_loop, reinitialise_recurrence

SIZE = 24


def _draw(module, steps=None, seed=0):
    return reinitialise_recurrence(module, torch.Generator().manual_seed(seed), steps)


def _is_orthogonal(block):
    small = block @ block.T if block.shape[0] <= block.shape[1] else block.T @ block
    return torch.allclose(small, torch.eye(len(small)), atol=1e-5)


KINDS = {
    "rnn": (lambda **kw: nn.RNN(5, SIZE, **kw), 1),
    "lstm": (lambda **kw: nn.LSTM(5, SIZE, **kw), 4),
    "gru": (lambda **kw: nn.GRU(5, SIZE, **kw), 3),
    "stacked both ways": (lambda **kw: nn.LSTM(5, SIZE, num_layers=2, bidirectional=True, **kw), 4),
    "projected": (lambda **kw: nn.LSTM(5, SIZE, proj_size=10, **kw), 4),
    "rnn cell": (lambda **kw: nn.RNNCell(5, SIZE, **kw), 1),
    "lstm cell": (lambda **kw: nn.LSTMCell(5, SIZE, **kw), 4),
    "gru cell": (lambda **kw: nn.GRUCell(5, SIZE, **kw), 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_gate_of_the_state_is_orthogonal_by_itself(kind):
    make, gates = KINDS[kind]
    module = make()
    assert _draw(module, steps=50) == list(module.parameters())
    recurrent = [p for key, p in module.named_parameters() if key.startswith("weight_hh")]
    for weight in recurrent:
        blocks = weight.split(SIZE)
        assert len(blocks) == gates
        assert all(_is_orthogonal(block) for block in blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_each_gate_of_the_input_is_glorot_by_itself(kind):
    module = KINDS[kind][0]()
    _draw(module)
    for key, weight in module.named_parameters():
        if key.startswith("weight_ih"):
            for block in weight.split(SIZE):
                assert block.var().item() == pytest.approx(2 / sum(block.shape), rel=0.35)


@pytest.mark.parametrize("kind", KINDS)
def test_the_biases_of_the_state_are_zero_and_so_are_all_of_a_plain_recurrence(kind):
    module = KINDS[kind][0]()
    _draw(module, steps=50)
    for key, bias in module.named_parameters():
        if key.startswith("bias"):
            is_open = key.startswith("bias_ih") and "rnn" not in kind
            assert bool(bias.any()) is is_open


@pytest.mark.parametrize("kind", ["lstm", "stacked both ways", "lstm cell"])
def test_the_gates_of_an_lstm_are_opened_for_three_to_all_time_steps(kind):
    module = KINDS[kind][0]()
    _draw(module, steps=200)
    for key, bias in module.named_parameters():
        if key.startswith("bias_ih"):
            let_in, keep, new, out = bias.split(SIZE)
            memory = 1 / (1 - keep.sigmoid())  # steps until 1/e is left
            assert math.e + 0.99 <= memory.min() < 50
            assert 150 < memory.max() <= 200.01
            assert torch.equal(let_in, -keep)
            assert not new.any()
            assert not out.any()


@pytest.mark.parametrize("kind", ["gru", "gru cell"])
def test_the_update_gate_of_a_gru_is_opened_alike(kind):
    module = KINDS[kind][0]()
    _draw(module, steps=200)
    reset, keep, new = next(p for key, p in module.named_parameters() if key.startswith("bias_ih")).split(SIZE)
    memory = 1 / (1 - keep.sigmoid())
    assert 3.7 <= memory.min() < 50
    assert 150 < memory.max() <= 200.01
    assert not reset.any()
    assert not new.any()


@pytest.mark.parametrize("steps", [None, 1, 2, 3])
def test_the_bias_is_one_where_time_is_short_or_not_known(steps):
    module = nn.LSTM(5, SIZE)
    _draw(module, steps=steps)
    torch.testing.assert_close(module.bias_ih_l0[SIZE : 2 * SIZE], torch.ones(SIZE))


def test_an_lstm_without_input_forgets_at_the_pace_that_its_bias_says():
    """With weights of zero the cell is c -> sigmoid(b) c: computed by the cell itself."""
    cell = nn.LSTMCell(1, SIZE)
    _draw(cell, steps=30)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        h, c = torch.zeros(1, SIZE), torch.ones(1, SIZE)
        for _ in range(10):
            h, c = cell(torch.zeros(1, 1), (h, c))
    u = cell.bias_ih[SIZE : 2 * SIZE].exp()
    torch.testing.assert_close(c[0], (u / (u + 1)) ** 10)


@pytest.mark.parametrize(
    "make", [lambda: nn.RNN(5, SIZE, nonlinearity="relu"), lambda: nn.RNNCell(5, SIZE, nonlinearity="relu")]
)
def test_a_relu_recurrence_is_a_permutation(make):
    module = make()
    _draw(module)
    weight = next(p for key, p in module.named_parameters() if key.startswith("weight_hh"))
    assert set(weight.unique().tolist()) == {0.0, 1.0}
    assert weight.sum(dim=0).tolist() == weight.sum(dim=1).tolist() == [1.0] * SIZE
    assert not torch.equal(weight, torch.eye(SIZE))


def test_a_relu_recurrence_without_input_keeps_its_state_and_its_gradient_whole():
    module = nn.RNN(1, SIZE, nonlinearity="relu")
    _draw(module)
    torch.manual_seed(0)
    start = torch.rand(1, 1, SIZE).requires_grad_()
    _, end = module(torch.zeros(500, 1, 1), start)
    (gradient,) = torch.autograd.grad(end.square().sum() / 2, start)
    torch.testing.assert_close(end.norm(), start.norm())
    torch.testing.assert_close(gradient.norm(), start.norm())


def test_a_relu_recurrence_under_a_constant_input_grows_no_faster_than_time():
    module = nn.RNN(3, SIZE, nonlinearity="relu")
    _draw(module)
    states, _ = module(torch.ones(400, 1, 3))
    norms = states.norm(dim=-1).flatten()
    assert norms[399] <= 2.05 * norms[199]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_recurrence_is_left_as_it_is(kind):
    module = KINDS[kind][0]().requires_grad_(False)
    before = [p.clone() for p in module.parameters()]
    assert _draw(module, steps=50) == []
    assert all(map(torch.equal, before, module.parameters()))


def test_where_the_bias_of_the_input_is_frozen_that_of_the_state_opens_the_gate():
    module = nn.LSTM(5, SIZE)
    module.bias_ih_l0.requires_grad_(False).zero_()
    _draw(module, steps=50)
    assert (module.bias_hh_l0[SIZE : 2 * SIZE] >= 0.99).all()
    assert not module.bias_ih_l0.any()


def test_a_recurrence_without_biases_has_its_weights_drawn():
    module = nn.GRU(5, SIZE, bias=False)
    assert _draw(module, steps=50) == [module.weight_ih_l0, module.weight_hh_l0]


def test_a_parametrized_weight_is_not_said_to_be_drawn():
    module = parametrizations.weight_norm(nn.RNNCell(5, SIZE), "weight_hh")
    assert _draw(module) == [module.weight_ih, module.bias_ih, module.bias_hh]


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Embedding(2, 2), nn.ReLU()])
def test_what_is_no_recurrence_is_left_as_it_is(module):
    before = [p.detach().clone() for p in module.parameters()]
    assert _draw(module) == []
    assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_not_touched(kind):
    one, other = KINDS[kind][0](), KINDS[kind][0](dtype=torch.float64)
    state = torch.get_rng_state()
    _draw(one, 50, seed=4)
    _draw(other, 50, seed=4)
    assert all(torch.equal(a.double(), b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sharded_cell_gets_the_numbers_of_a_plain_one():
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, spread = nn.LSTMCell(5, SIZE), nn.LSTMCell(5, SIZE)
        for key, parameter in list(spread.named_parameters()):
            setattr(spread, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        _draw(plain, 50)
        assert len(_draw(spread, 50)) == 4
        for one, other in zip(plain.parameters(), spread.parameters(), strict=True):
            assert torch.equal(one, other.full_tensor())
    finally:
        dist.destroy_process_group()


def _loop(op, again=None, ways_in=None, **kwargs):
    again = nn.Linear(SIZE, SIZE) if again is None else again
    ways_in = [nn.Linear(5, SIZE)] if ways_in is None else ways_in
    return again, ways_in, reinitialise_loop(again, ways_in, op, torch.Generator().manual_seed(0), **kwargs)


def test_a_loop_of_tanh_is_orthogonal_and_its_way_in_glorot():
    again, (enter,), changed = _loop("tanh")
    assert changed == [again.weight, enter.weight, enter.bias, again.bias]
    assert _is_orthogonal(again.weight)
    assert enter.weight.var().item() == pytest.approx(2 / (5 + SIZE), rel=0.3)
    assert not again.bias.any()
    assert not enter.bias.any()


def test_a_loop_of_relu_is_a_permutation():
    again, _, _ = _loop("relu")
    assert again.weight.sum(dim=0).tolist() == again.weight.sum(dim=1).tolist() == [1.0] * SIZE


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_loop_of_sigmoids_is_a_loop_of_orthogonal_tanh_units(has_bias):
    """sigmoid(x) = (1 + tanh(x / 2)) / 2: computed by the tanh loop itself."""
    again, (enter,), _ = _loop("sigmoid", again=nn.Linear(SIZE, SIZE, bias=has_bias))
    orthogonal = again.weight / 4
    assert _is_orthogonal(orthogonal)
    torch.manual_seed(0)
    sigmoids, tanhs = torch.full((3, SIZE), 0.5), torch.zeros(3, SIZE)
    for x in torch.randn(20, 3, 5):
        sigmoids = torch.sigmoid(enter(x) + again(sigmoids))
        tanhs = torch.tanh(x @ enter.weight.T / 2 + tanhs @ orthogonal.T)
    torch.testing.assert_close(2 * sigmoids - 1, tanhs, atol=1e-4, rtol=0)


def test_of_a_layer_that_gets_input_and_state_together_the_columns_of_the_state_are_orthogonal():
    columns = torch.arange(5 + SIZE) >= 5
    again, _, changed = _loop("tanh", again=nn.Linear(5 + SIZE, SIZE), ways_in=[], columns=columns)
    assert changed == [again.weight, again.bias]
    assert _is_orthogonal(again.weight[:, 5:])
    assert again.weight[:, :5].var().item() == pytest.approx(2 / (5 + 2 * SIZE), rel=0.35)


@pytest.mark.parametrize(("kind", "kernel"), [(nn.Conv1d, (3,)), (nn.Conv2d, (3, 5)), (nn.Conv2d, 1), (nn.Conv3d, 3)])
def test_a_convolution_hands_each_place_on_by_itself(kind, kernel):
    again, (enter,), _ = _loop("tanh", again=kind(SIZE, SIZE, kernel, padding="same"), ways_in=[kind(5, SIZE, kernel)])
    places = [1] * len(again.kernel_size)
    x = torch.randn(2, SIZE, *[6 * one for one in places])
    torch.testing.assert_close(again(x).norm(dim=1), x.norm(dim=1))
    assert _is_orthogonal(again(torch.eye(SIZE).view(SIZE, SIZE, *places)).flatten(1))
    taps = math.prod(again.kernel_size)
    assert enter.weight.var().item() == pytest.approx(2 / (5 + SIZE) / taps, rel=0.3)
    assert not enter.bias.any()


def test_of_channels_that_stand_beside_the_input_only_those_of_the_state_are():
    columns = torch.arange(5 + SIZE) < SIZE
    conv = nn.Conv2d(5 + SIZE, SIZE, 3, padding=1)
    again, _, _ = _loop("relu", again=conv, ways_in=[], columns=columns)
    middle = again.weight[:, :SIZE, 1, 1]
    assert middle.sum(dim=0).tolist() == middle.sum(dim=1).tolist() == [1.0] * SIZE
    assert again.weight[:, :SIZE].abs().sum() == SIZE
    assert again.weight[:, SIZE:].all()


@pytest.mark.parametrize(
    "again",
    [nn.Conv1d(SIZE, SIZE, 3, groups=2), nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE).requires_grad_(False)],
    ids=["groups", "several gates", "frozen"],
)
def test_a_loop_that_cannot_be_treated_is_left_whole(again):
    before = again.weight.clone()
    _, (enter,), changed = _loop("tanh", again=again)
    assert changed == []
    assert torch.equal(again.weight, before)
    assert enter.bias.any()


@pytest.mark.parametrize(("count", "is_drawn"), [(3, True), (4, True), (2, False), (5, False)])
def test_of_gates_that_are_computed_together_each_is_orthogonal_and_all_biases_stay(count, is_drawn):
    torch.manual_seed(0)
    again, enter = nn.Linear(SIZE, count * SIZE), nn.Linear(5, count * SIZE)
    biases = again.bias.clone(), enter.bias.clone()
    weight = again.weight.clone()
    _, _, changed = _loop("", again=again, ways_in=[enter])
    assert bool(changed) == is_drawn
    assert torch.equal(again.bias, biases[0])
    assert torch.equal(enter.bias, biases[1])
    if is_drawn:
        assert all(_is_orthogonal(block) for block in again.weight.split(SIZE))
        assert enter.weight.var().item() == pytest.approx(2 / (5 + count * SIZE), rel=0.3)
    else:
        assert torch.equal(again.weight, weight)
