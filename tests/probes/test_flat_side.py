"""What counts as saturated and what as flat, against the slope that autograd gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.probes.flat_side import always_flat, flat, saturated, unit_axis

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


@pytest.mark.parametrize("op", RECTIFIERS)
@pytest.mark.parametrize(("shape", "axis"), [((40, 6), 1), ((5, 6, 8), 1), ((5, 8, 6), 2), ((5, 6, 2, 4), 1)])
def test_a_unit_that_is_always_flat_is_one_whose_outputs_are_all_flat(op, shape, axis):
    function, arguments = RECTIFIERS[op]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).movedim(axis, 0)
    inputs[0], inputs[1], inputs[2] = -30.0, 8.0, -30.0
    inputs[2].flatten()[3] = torch.nan
    inputs[3] = torch.where(inputs[3] > 0, 9.0, -30.0)
    output = function(inputs.movedim(0, axis))
    mask = flat(op, output, arguments).movedim(axis, 0).reshape(6, -1)
    always = always_flat(op, output, arguments, axis)
    assert always.tolist() == mask.all(dim=1).tolist()
    assert always.any()
    assert not always.all()


def test_a_relu6_that_is_zero_or_six_is_always_flat():
    output = torch.tensor([[0.0, 0.0], [6.0, 3.0], [0.0, 6.0]])
    assert always_flat("relu6", output, {}, axis=1).tolist() == [True, False]


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "leaky_relu", "prelu", "glu"])
def test_units_of_an_activation_without_flat_side_are_never_flat(op):
    assert always_flat(op, torch.zeros(4, 3), {}, axis=1) is None


@pytest.mark.parametrize(
    ("shape", "layer", "expected"),
    [
        ((8, 5), nn.Linear(1, 5), 1),
        ((8, 4, 5), nn.Linear(1, 5), 2),
        ((8, 3, 6, 7), nn.Conv2d(1, 3, 1), 1),
        ((8, 3, 6), nn.Conv1d(1, 3, 1), 1),
        ((8, 3, 6, 7), nn.BatchNorm2d(3), 1),
        ((8, 3, 6, 7), nn.GroupNorm(1, 3), 1),
        ((8, 6, 7, 3), nn.LayerNorm(3), 3),
        ((8, 5), None, 1),
        ((8, 5, 5), nn.Linear(1, 5), 2),
    ],
)
def test_units_are_channels_of_convolutions_and_the_last_axis_elsewhere(shape, layer, expected):
    assert unit_axis(shape, layer) == expected


@pytest.mark.parametrize(
    ("shape", "layer"),
    [((5,), nn.Linear(1, 5)), ((), None), ((8,), None), ((8, 8), nn.Linear(1, 5)), ((8, 48), nn.Conv2d(1, 3, 1))],
)
def test_where_no_axis_is_one_of_units_there_are_none(shape, layer):
    assert unit_axis(shape, layer) is None


@pytest.mark.parametrize("width", [3, 4, 7])
def test_the_part_of_a_layer_that_is_split_over_two_ranks_has_units(width):
    assert unit_axis((8, width), nn.Linear(1, 7), parts=2) == 1


@pytest.mark.parametrize("width", [1, 2, 5])
def test_an_axis_that_is_no_part_of_a_split_layer_has_none(width):
    assert unit_axis((8, width), nn.Linear(1, 7), parts=2) is None


def test_split_channels_are_units():
    assert unit_axis((8, 3, 5, 5), nn.Conv2d(1, 6, 1), parts=2) == 1
