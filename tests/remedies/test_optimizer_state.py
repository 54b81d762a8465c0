"""What an optimizer remembers, removed."""

import copy

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.optimizer_state import forget, forget_units

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
}


def _stepped(make, steps=20):
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = make(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_a_new_optimizer(name):
    (weight, _), optimizer = _stepped(OPTIMIZERS[name])
    weight.data.fill_(1.0)
    forget([optimizer], [weight])
    weight.grad = torch.tensor([0.5, 0.5])
    optimizer.step()
    fresh = nn.Parameter(torch.ones(2))
    fresh.grad = torch.tensor([0.5, 0.5])
    OPTIMIZERS[name]([fresh]).step()
    assert torch.equal(weight, fresh)


def test_other_parameters_keep_their_state():
    (weight, other), optimizer = _stepped(OPTIMIZERS["adam"])
    forget([optimizer], [weight])
    assert list(optimizer.state) == [other]
    assert optimizer.state[other]["step"] == 20


def test_every_optimizer_that_knows_the_parameter_forgets_it():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizers = [torch.optim.Adam([weight]), torch.optim.SGD([weight], lr=0.1, momentum=0.9)]
    for optimizer in optimizers:
        optimizer.step()
    forget(optimizers, iter([weight]))
    assert not any(optimizer.state for optimizer in optimizers)


def test_a_stranger_is_passed_over():
    _, optimizer = _stepped(OPTIMIZERS["adam"])
    forget([optimizer], [nn.Parameter(torch.ones(1))])
    assert len(optimizer.state) == 2


def test_lbfgs_forgets_all_since_its_state_is_of_all_parameters():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.LBFGS(weights)

    def closure():
        optimizer.zero_grad()
        loss = sum(weight.pow(4).sum() for weight in weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    forget([optimizer], [nn.Parameter(torch.ones(2))])
    assert list(optimizer.state) == [weights[0]]
    forget([optimizer], [weights[1]])
    assert not optimizer.state


# -- some units of a layer ---------------------------------------------------------------------------------------------

ROWS, COLUMNS = 6, 5
DEAD_ROWS, DEAD_COLUMNS = [1, 4], [0, 2]
BY_UNIT = OPTIMIZERS | {
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}
DIRECTIONS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")


def _gradient(step, shape=(ROWS, COLUMNS), scale=1.0):
    """Noise, larger in later columns; nothing for dead units."""
    gradient = scale * torch.randn(shape, generator=torch.Generator().manual_seed(step))
    columns = torch.arange(1, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2))
    return gradient * columns


def _dead(make, rows=DEAD_ROWS, columns=(), shape=(ROWS, COLUMNS), steps=3000):
    """A weight some of whose units have had no gradient for as long as Adam remembers, and its optimizer."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = _gradient(step, shape)
        weight.grad[rows] = 0
        weight.grad[:, list(columns)] = 0
        optimizer.step()
    return weight, optimizer


def _moves(weight, optimizer, gradients):
    """The largest distance that any unit has moved in a step, for each output unit."""
    largest = torch.zeros(weight.shape[0])
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        largest = torch.maximum(largest, (weight.detach() - before).abs().flatten(1).amax(1))
    return largest


@pytest.mark.parametrize("name", BY_UNIT)
def test_directions_become_zero_and_sizes_the_mean_of_the_other_units(name):
    weight, optimizer = _dead(BY_UNIT[name], steps=20)
    before = copy.deepcopy(optimizer.state[weight])
    healthy = [row for row in range(ROWS) if row not in DEAD_ROWS]
    forget_units([optimizer], weight, rows=DEAD_ROWS)
    compared = 0
    for key, value in optimizer.state[weight].items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == ROWS:
            compared += 1
            assert torch.equal(value[healthy], before[key][healthy])
            mean = sum(before[key][row] for row in healthy) / len(healthy)
            for row in DEAD_ROWS:
                torch.testing.assert_close(value[row], mean * (key not in DIRECTIONS))
        elif key != "col_var":
            assert value == before[key]
    assert compared


@pytest.mark.parametrize("name", BY_UNIT)
def test_columns_are_rows_of_the_transposed_weight(name):
    weight, optimizer = _dead(BY_UNIT[name], rows=[], columns=DEAD_COLUMNS, steps=20)
    turned = nn.Parameter(weight.detach().T.clone())
    other = BY_UNIT[name]([turned])
    other.state[turned] = {
        key: value.T.clone() if isinstance(value, torch.Tensor) and value.dim() == 2 else copy.deepcopy(value)
        for key, value in optimizer.state[weight].items()
    }
    if name == "adafactor":
        state = other.state[turned]
        state["row_var"], state["col_var"] = state["col_var"], state["row_var"]
    forget_units([optimizer], weight, columns=DEAD_COLUMNS)
    forget_units([other], turned, rows=DEAD_COLUMNS)
    gradient = _gradient(99)
    weight.grad, turned.grad = gradient, gradient.T.clone()
    optimizer.step()
    other.step()
    torch.testing.assert_close(weight.detach(), turned.detach().T)


def test_zero_moments_beside_an_old_counter_are_6_6_rates_and_the_mean_of_the_others_is_one():
    """The first figure is that of the docstring for a counter that has long run, here for one at 3000."""
    formula = [(1 - 0.9**k) / (1 - 0.999**k) ** 0.5 * (1 - 0.999 ** (3000 + k)) ** 0.5 for k in range(1, 61)]

    def largest(renew):
        weight, optimizer = _dead(lambda p: torch.optim.Adam(p, lr=0.1))
        renew(weight, optimizer)
        steady = _gradient(0).abs().sqrt()
        steady[DEAD_ROWS] = torch.arange(1.0, COLUMNS + 1)  # the size that the others' gradients have
        return _moves(weight, optimizer, [steady] * 60)[DEAD_ROWS].max().item() / 0.1

    def zero(weight, optimizer):
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][key][DEAD_ROWS] = 0

    def mean(weight, optimizer):
        forget_units([optimizer], weight, rows=DEAD_ROWS)

    assert max(formula) == pytest.approx(6.4, abs=0.1)
    assert largest(zero) == pytest.approx(max(formula), rel=1e-4)
    assert largest(mean) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", BY_UNIT)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_units_that_came_back_move_no_further_than_the_others(name, scale):
    """Also with the tiny gradients that they have while nobody listens to them yet; and at any scale of the loss."""
    steps = 300 if name != "adam" else 3000

    def scaled(make):
        weight = nn.Parameter(torch.zeros(ROWS, COLUMNS))
        optimizer = make([weight])
        for step in range(steps):
            weight.grad = _gradient(step, scale=scale)
            weight.grad[DEAD_ROWS] = 0
            optimizer.step()
        return weight, optimizer

    for share in (1.0, 1e-2):
        weight, optimizer = scaled(BY_UNIT[name])
        forget_units([optimizer], weight, rows=DEAD_ROWS)
        gradients = []
        for step in range(60):
            gradient = _gradient(5000 + step, scale=scale)
            gradient[DEAD_ROWS] *= share
            gradients.append(gradient)
        moved = _moves(weight, optimizer, gradients)
        healthy = [row for row in range(ROWS) if row not in DEAD_ROWS]
        assert moved[DEAD_ROWS].max() <= 1.5 * moved[healthy].max()
        assert moved[DEAD_ROWS].min() > 0


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 3, 2)], ids=["linear", "conv1d", "conv2d"])
def test_adafactor_estimates_for_the_other_units_what_it_did_before(shape):
    def estimate(state):
        row, column = state["row_var"], state["col_var"]
        return row @ column / row.mean(dim=-2, keepdim=True)

    weight, optimizer = _dead(BY_UNIT["adafactor"], columns=DEAD_COLUMNS, shape=shape, steps=20)
    before = estimate(optimizer.state[weight])
    forget_units([optimizer], weight, DEAD_ROWS, DEAD_COLUMNS)
    after = estimate(optimizer.state[weight])
    rows = [row for row in range(ROWS) if row not in DEAD_ROWS]
    columns = [column for column in range(COLUMNS) if column not in DEAD_COLUMNS]
    healthy = after[rows][:, columns]
    torch.testing.assert_close(healthy, before[rows][:, columns])
    assert (after >= 0.2 * healthy.min()).all()  # nothing is left of the zeros, which would make the update explode
    assert after.max() <= healthy.max() * 1.0001


def test_muon_forgets_the_momentum_of_the_units_and_they_move_as_the_others_do():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    weight, optimizer = _dead(lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0), steps=50)
    optimizer.state[weight]["momentum_buffer"][DEAD_ROWS] = 7.0
    forget_units([optimizer], weight, rows=DEAD_ROWS)
    assert not optimizer.state[weight]["momentum_buffer"][DEAD_ROWS].any()
    moved = _moves(weight, optimizer, [_gradient(100 + step) for step in range(20)])
    healthy = [row for row in range(ROWS) if row not in DEAD_ROWS]
    assert moved[DEAD_ROWS].max() <= 1.5 * moved[healthy].max()


def test_rows_and_columns_at_once_are_all_entries_of_both():
    weight, optimizer = _dead(OPTIMIZERS["momentum"], rows=[], steps=5)
    before = optimizer.state[weight]["momentum_buffer"].clone()
    forget_units([optimizer], weight, DEAD_ROWS, DEAD_COLUMNS)
    before[DEAD_ROWS] = 0
    before[:, DEAD_COLUMNS] = 0
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], before)


def test_sizes_where_dead_rows_meet_dead_columns_come_from_units_that_are_well():
    weight, optimizer = _dead(OPTIMIZERS["adam"], columns=DEAD_COLUMNS, steps=50)
    sizes = optimizer.state[weight]["exp_avg_sq"]
    smallest = sizes[sizes > 0].min()
    forget_units([optimizer], weight, DEAD_ROWS, DEAD_COLUMNS)
    assert (sizes >= smallest).all()


@pytest.mark.parametrize("units", [[1, 4], (1, 4), torch.tensor([1, 4]), torch.tensor([0, 1, 0, 0, 1, 0]).bool()])
def test_units_are_named_by_index_or_mask_also_those_of_a_bias(units):
    bias = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adam([bias])
    bias.grad = torch.tensor([1.0, 9.0, 2.0, 3.0, 9.0, 4.0])
    optimizer.step()
    forget_units([optimizer], bias, rows=units)
    state = optimizer.state[bias]
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.1, 0.0, 0.2, 0.3, 0.0, 0.4]))
    torch.testing.assert_close(1e3 * state["exp_avg_sq"], torch.tensor([1.0, 7.5, 4.0, 9.0, 7.5, 16.0]))
    assert state["step"] == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_all_units_are_new_so_is_the_whole_state(name):
    weight, optimizer = _dead(OPTIMIZERS[name], steps=5)
    forget_units([optimizer], weight, columns=range(COLUMNS))
    assert weight not in optimizer.state


def test_nothing_is_done_without_units_or_without_state():
    weight, optimizer = _dead(OPTIMIZERS["adam"], steps=5)
    before = copy.deepcopy(optimizer.state[weight])
    forget_units([optimizer], weight, rows=[], columns=[])
    torch.testing.assert_close(optimizer.state[weight], before, rtol=0, atol=0)
    forget_units([optimizer], nn.Parameter(torch.zeros(3, 2)), rows=[1])
    assert list(optimizer.state) == [weight]


def test_momentum_that_has_not_begun_is_passed_over():
    weight, optimizer = _dead(OPTIMIZERS["momentum"], steps=2)
    optimizer.state[weight]["momentum_buffer"] = None
    forget_units([optimizer], weight, rows=[1])
    assert optimizer.state[weight] == {"momentum_buffer": None}


@pytest.mark.parametrize(
    "foreign",
    [
        {"step": 3, "row": torch.ones(ROWS), "column": torch.ones(COLUMNS)},
        {"state1": torch.ones(ROWS, COLUMNS, dtype=torch.uint8)},
        {"preconditioners": [torch.eye(ROWS), torch.eye(COLUMNS)]},
    ],
    ids=["factors", "8 bit", "matrices"],
)
def test_state_that_is_not_by_unit_goes_as_a_whole(foreign):
    weight = nn.Parameter(torch.zeros(ROWS, COLUMNS))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = foreign
    forget_units([optimizer], weight, rows=[1])
    assert weight not in optimizer.state


def test_state_of_unknown_name_is_a_size_where_it_is_nowhere_negative():
    weight = nn.Parameter(torch.zeros(3, 1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"second": torch.tensor([[4.0], [0.0], [2.0]]), "first": torch.tensor([[4.0], [1], [-2]])}
    forget_units([optimizer], weight, rows=[1])
    assert optimizer.state[weight]["second"].flatten().tolist() == [4.0, 3.0, 2.0]
    assert optimizer.state[weight]["first"].flatten().tolist() == [4.0, 0.0, -2.0]


def test_a_bias_has_no_columns():
    with pytest.raises(ValueError, match="columns must be None for a parameter of 1 dimensions"):
        forget_units([], nn.Parameter(torch.zeros(3)), columns=[0])


def test_a_recycled_unit_of_a_real_network_moves_no_further_than_its_neighbours():
    """New weights in, zero out: its gradient is 0 at first and grows as the next layer begins to listen."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x[:, :4].sin().sum(1, keepdim=True)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    dead = list(range(8))
    with torch.no_grad():
        net[0].bias[dead] = -50.0
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        net[0].weight[dead] = torch.randn(8, 8) / 8**0.5
        net[0].bias[dead] = 0
        net[2].weight[:, dead] = 0
    forget_units([optimizer], net[0].weight, rows=dead)
    forget_units([optimizer], net[0].bias, rows=dead)
    forget_units([optimizer], net[2].weight, columns=dead)
    largest = 0.0
    start = (net(x) - y).square().mean().item()
    for _ in range(100):
        before = [p.detach().clone() for p in (net[0].weight[dead], net[0].bias[dead], net[2].weight[:, dead])]
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        after = (net[0].weight[dead], net[0].bias[dead], net[2].weight[:, dead])
        largest = max(largest, *((b - a.detach()).abs().max().item() for b, a in zip(before, after, strict=True)))
    assert 0 < largest < 2e-3
    assert (net(x) - y).square().mean().item() < start
