"""What counts as saturated and what as flat, against the slope that autograd gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.probes.flat_side import flat, saturated, units

INPUT = torch.linspace(-30, 30, 2001, dtype=torch.float64)
BOUNDED = {
    "sigmoid": (torch.sigmoid, {}, 0.01),
    "tanh": (torch.tanh, {}, 0.02),
    "softsign": (F.softsign, {}, 0.0002),
    "hardsigmoid": (F.hardsigmoid, {}, None),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 6.0), {"min_val": -2.0, "max_val": 6.0}, None),
}
RECTIFIERS = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "hardswish": (F.hardswish, {}),
    "gelu": (F.gelu, {}),
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "softplus": (F.softplus, {}),
    "elu": (lambda x: F.elu(x, 2.0), {"alpha": 2.0}),
    "celu": (lambda x: F.celu(x, 0.5), {"alpha": 0.5}),
    "selu": (F.selu, {}),
}


def _slope(function, scale=1.0):
    x = (INPUT * scale).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "softsign"])
def test_the_slope_of_a_saturated_output_is_small(op):
    function, arguments, largest = BOUNDED[op]
    y, slope = _slope(function, scale=10.0)
    assert slope[saturated(op, y, arguments)].abs().max() < largest


@pytest.mark.parametrize("op", BOUNDED)
def test_both_ends_of_a_bounded_activation_are_saturated(op):
    function, arguments, _ = BOUNDED[op]
    is_saturated = saturated(op, function(torch.tensor([-1e4, 0.3, 1e4])), arguments)
    assert is_saturated.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("op", "inside", "outside"), [("sigmoid", 0.989, 0.991), ("sigmoid", 0.011, 0.009), ("tanh", -0.989, -0.991)]
)
def test_the_limit_is_one_hundredth_before_the_bound(op, inside, outside):
    assert saturated(op, torch.tensor([inside, outside]), {}).tolist() == [False, True]


@pytest.mark.parametrize("op", [*RECTIFIERS, "leaky_relu", "glu"])
def test_an_activation_without_two_bounds_is_never_saturated(op):
    assert saturated(op, torch.zeros(1), {}) is None


@pytest.mark.parametrize("op", RECTIFIERS)
def test_far_below_zero_is_the_flat_side(op):
    function, arguments = RECTIFIERS[op]
    assert flat(op, function(torch.tensor([-30.0])), arguments).tolist() == [True]


@pytest.mark.parametrize("op", RECTIFIERS)
def test_above_zero_is_not_flat(op):
    function, arguments = RECTIFIERS[op]
    assert not flat(op, function(torch.linspace(0.01, 5, 50)), arguments).any()


@pytest.mark.parametrize("op", ["relu", "relu6", "softplus", "elu", "celu", "selu"])
def test_the_slope_on_the_flat_side_is_small(op):
    function, arguments = RECTIFIERS[op]
    y, slope = _slope(function)
    assert slope[flat(op, y, arguments)].abs().max() < 0.02


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "leaky_relu", "prelu", "glu"])
def test_an_activation_without_flat_side_has_no_dead_units(op):
    assert flat(op, torch.zeros(1), {}) is None


@pytest.mark.parametrize(
    ("shape", "layer", "expected"),
    [
        ((8, 5), nn.Linear(1, 5), (8, 5)),
        ((8, 4, 5), nn.Linear(1, 5), (32, 5)),
        ((8, 3, 6, 7), nn.Conv2d(1, 3, 1), (336, 3)),
        ((8, 3, 6), nn.Conv1d(1, 3, 1), (48, 3)),
        ((8, 3, 6, 7), nn.BatchNorm2d(3), (336, 3)),
        ((8, 3, 6, 7), nn.GroupNorm(1, 3), (336, 3)),
        ((8, 6, 7, 3), nn.LayerNorm(3), (336, 3)),
        ((8, 5), None, (8, 5)),
        ((8, 5, 5), nn.Linear(1, 5), (40, 5)),
    ],
)
def test_units_are_channels_of_convolutions_and_the_last_axis_elsewhere(shape, layer, expected):
    assert units(torch.zeros(shape), layer).shape == expected


@pytest.mark.parametrize(
    ("shape", "layer"),
    [((5,), nn.Linear(1, 5)), ((), None), ((8,), None), ((8, 8), nn.Linear(1, 5)), ((8, 48), nn.Conv2d(1, 3, 1))],
)
def test_where_no_axis_is_one_of_units_there_are_none(shape, layer):
    assert units(torch.zeros(shape), layer) is None


def test_a_unit_keeps_its_own_values():
    values = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert set(units(values, nn.Conv2d(1, 3, 1))[:, 1].tolist()) == set(values[:, 1].flatten().tolist())


def test_time_is_no_unit_where_there_are_as_many_steps_as_units():
    values = torch.arange(5.0).expand(8, 5, 5)
    assert units(values, nn.Linear(1, 5))[:, 2].unique().tolist() == [2.0]


@pytest.mark.parametrize(("shape", "expected"), [((8, 3), (8, 3)), ((8, 4), (8, 4)), ((8, 7), (8, 7))])
def test_the_part_of_a_layer_that_is_split_over_two_ranks_has_units(shape, expected):
    assert units(torch.zeros(shape), nn.Linear(1, 7), parts=2).shape == expected


@pytest.mark.parametrize("width", [1, 2, 5])
def test_an_axis_that_is_no_part_of_a_split_layer_has_none(width):
    assert units(torch.zeros(8, width), nn.Linear(1, 7), parts=2) is None


def test_split_channels_are_units():
    assert units(torch.zeros(8, 3, 5, 5), nn.Conv2d(1, 6, 1), parts=2).shape == (200, 3)
