"""How far units are from being copies, against all pairs of them."""

import itertools

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.copied_units import has_units, matrix_spread, unit_spread
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.transfer import Transfer

LAYERS = {
    "linear": (nn.Linear(5, 12), "weight"),
    "two units": (nn.Linear(5, 2), "weight"),
    "convolution": (nn.Conv2d(3, 8, 3), "weight"),
    "grouped": (nn.Conv1d(6, 12, 3, groups=3), "weight"),
    "transposed": (nn.ConvTranspose2d(3, 8, 3), "weight"),
    "lstm": (nn.LSTM(5, 6), "weight_ih_l0"),
    "gru cell": (nn.GRUCell(5, 6), "weight_hh"),
}


def _units(layer, tensor):
    """The weights of each unit, one by one."""
    units = tensor.transpose(0, 1) if "Transpose" in type(layer).__name__ else tensor
    return list(units[: layer.hidden_size] if hasattr(layer, "hidden_size") else units)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_have_no_spread_and_what_is_drawn_has(kind):
    layer, name = LAYERS[kind]
    torch.manual_seed(0)
    tensor = torch.randn_like(getattr(layer, name))
    assert has_units(layer)
    assert unit_spread(layer, tensor) > 0.5
    units = _units(layer, tensor)
    assert min(float((a - b).norm() / a.norm()) for a, b in itertools.combinations(units, 2)) > 0.2
    for unit in units[1:]:
        unit.copy_(units[0])
    assert unit_spread(layer, tensor) == 0
    assert unit_spread(layer, 1e-20 * tensor) == 0


def test_blocks_of_a_few_equal_rows_are_no_copies():
    torch.manual_seed(0)
    shuffled = torch.randn(4, 9).repeat_interleave(4, 0)  # as weights before a pixel shuffle begin
    assert unit_spread(nn.Linear(9, 16), shuffled) > 0.5


def test_of_zeros_it_is_not_known():
    assert unit_spread(nn.Linear(5, 12), torch.zeros(12, 5)).isnan()


@pytest.mark.parametrize("layer", [nn.Linear(5, 1), nn.Conv1d(4, 4, 3, groups=4), nn.LayerNorm(8), nn.Embedding(5, 8)])
def test_layers_without_several_units_of_a_kind_are_left_out(layer):
    assert not has_units(layer)


def _sample(probe, transfer):
    probe.measure()
    return probe.collect(transfer.fetch())


def test_what_was_drawn_is_looked_at_once_and_copies_as_long_as_the_run_lasts():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    nn.init.constant_(net[0].weight, 0.5)
    net(torch.randn(3, 4)).square().sum().backward()
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    first = _sample(probe, transfer)
    assert first["0"]["unit_spread"] == 0
    assert first["1"]["unit_spread"] > 0.5
    assert min(layer["unit_grad_spread"] for layer in first.values()) > 0.01
    other, carried = SpectralProbe(LayerMap(net), transfer), probe.state_dict()
    other.load_state_dict(carried)
    assert all(torch.is_tensor(value) for value in carried.values())
    nn.init.normal_(net[0].weight)
    for one in (probe, other):
        second = _sample(one, transfer)
        assert second["0"]["unit_spread"] > 0.5
        assert "unit_spread" not in second["1"]


def test_a_gradient_of_zeros_is_not_alike():
    net = nn.Sequential(nn.Linear(4, 8))
    net[0].weight.grad = torch.zeros(8, 4)
    transfer = Transfer()
    assert _sample(SpectralProbe(LayerMap(net), transfer), transfer)["0"]["unit_grad_spread"] == float("inf")


def _own(weight, gradient):
    module = nn.ParameterList([torch.as_tensor(weight, dtype=torch.float32)])
    module[0].grad = torch.as_tensor(gradient, dtype=torch.float32)
    return module


ALIKE, RANDOM = torch.full((40, 6), 0.3), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("weight", "gradient", "expected"),
    [
        (ALIKE, RANDOM[:1].expand(40, 6), 0.0),
        (ALIKE, RANDOM[:, :1].expand(40, 6), 0.0),
        (RANDOM[:1].expand(40, 6), RANDOM[:1].expand(40, 6), 0.0),
        (
            RANDOM[:, :1].expand(40, 6),
            RANDOM[:1].expand(40, 6),
            None,
        ),  # along the one axis weights, the gradient along the other
        (ALIKE, RANDOM, None),
        (RANDOM, ALIKE, None),
        (torch.zeros(40, 6), ALIKE, float("inf")),
        (ALIKE, torch.zeros(40, 6), float("inf")),
        (ALIKE[:3], RANDOM[:1].expand(3, 6), None),  # too few to say so
        (ALIKE.view(4, 10, 6), RANDOM[:10].expand(4, 10, 6), 0.0),
    ],
)
def test_a_matrix_is_made_of_copies_along_an_axis(weight, gradient, expected):
    spread = float(matrix_spread(_own(weight, gradient)))
    assert spread == pytest.approx(expected, abs=1e-6) if expected is not None else 0.5 < spread < 2


def test_matrices_are_those_of_modules_of_ones_own():
    for module in (nn.Linear(6, 40), nn.Embedding(40, 6), nn.ParameterList([torch.ones(40)])):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert matrix_spread(module) is None
    assert matrix_spread(nn.ParameterList([torch.ones(40, 6)])) is None  # no gradient
    both = nn.ParameterList([RANDOM.clone(), ALIKE.clone()])
    for parameter in both:
        parameter.grad = RANDOM[:1].expand(40, 6).clone()
    assert float(matrix_spread(both)) == 0  # the least of all counts


def test_a_matrix_of_copies_is_looked_at_as_long_as_it_is_one():
    modules = nn.ModuleList([_own(ALIKE.clone(), RANDOM[:1].expand(40, 6)), _own(RANDOM.clone(), RANDOM.clone())])
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(modules), transfer)
    first = _sample(probe, transfer)
    assert [first[name]["matrix_spread"] < 1e-6 for name in "01"] == [True, False]
    other = SpectralProbe(LayerMap(modules), transfer)
    other.load_state_dict(probe.state_dict())
    for one in (probe, other):
        second = _sample(one, transfer)
        assert second["0"]["matrix_spread"] < 1e-6
        assert "matrix_spread" not in second["1"]
