"""Weights that are zero, and whose gradient is zero."""

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.transfer import Transfer
from lightning_gradflow.probes.zero_weights import weights_of, zero_weights


def _zeros(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Adapter(nn.Module):
    def __init__(self, down=0.0, up=0.0):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.full((2, 6), down)), nn.Parameter(torch.full((6, 2), up))

    def forward(self, x):
        return x @ self.down.T @ self.up.T


def _count(module, inputs, weight=1.0):
    (weight * module(inputs)).sum().backward()
    found = zero_weights(module)
    return None if found is None else found.item()


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (_zeros(nn.Linear(3, 2)), torch.ones(4, 3), 0),  # a head that starts from zero: it gets a gradient
        (_zeros(nn.Linear(3, 2)), torch.zeros(4, 3), 1),
        (nn.Linear(3, 2), torch.zeros(4, 3), 0),
        (Adapter(), torch.ones(4, 6), 2),
        (Adapter(down=0.1), torch.ones(4, 6), 0),  # what is not zero gets nothing at first, and what is zero something
    ],
)
def test_counted_is_what_is_zero_and_gets_a_gradient_of_zero(module, inputs, expected):
    assert _count(module, inputs) == expected


def test_the_smallest_numbers_are_not_zero():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.constant_(layer.weight, 1e-40)
    assert _count(layer, torch.zeros(4, 3)) == 0
    nn.init.zeros_(layer.weight)
    layer.zero_grad()
    assert _count(layer, torch.ones(4, 3), weight=1e-40) == 0


def test_what_has_no_gradient_or_is_frozen_is_not_known():
    assert zero_weights(_zeros(nn.Linear(3, 2))) is None
    layer = _zeros(nn.Linear(3, 2)).requires_grad_(False)
    layer.bias.requires_grad_(True)
    assert _count(layer, torch.ones(4, 3)) is None


def test_scales_are_weights_and_what_is_added_is_not():
    assert list(weights_of(nn.GroupNorm(1, 2))) == ["weight"]
    assert list(weights_of(nn.LSTM(2, 2))) == ["weight_ih_l0", "weight_hh_l0"]
    assert weights_of(nn.PReLU()) == {}


def _sample(probe, net, x, transfer):
    net.zero_grad()
    net(x).sum().backward()
    probe.measure()
    found = probe.collect(transfer.fetch())
    return {name: values["zero_weights"] for name, values in found.items() if "zero_weights" in values}


def test_a_layer_is_looked_at_as_long_as_it_has_such_weights():
    net = nn.Sequential(_zeros(nn.Linear(3, 4)), nn.Linear(4, 4), _zeros(nn.Linear(4, 2)))
    nn.init.zeros_(net[1].bias)
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    x = torch.ones(5, 3)
    assert _sample(probe, net, x, transfer) == {"0": 1, "1": 0, "2": 1}
    again = SpectralProbe(LayerMap(net), transfer)
    again.load_state_dict(probe.state_dict())
    for each in (probe, again):
        assert _sample(each, net, x, transfer) == {"0": 1, "2": 1}
    nn.init.ones_(net[0].bias)
    assert _sample(probe, net, x, transfer) == {"0": 1, "2": 0}
    assert _sample(probe, net, x, transfer) == {"0": 1}
