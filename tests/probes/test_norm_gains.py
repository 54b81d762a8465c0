import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.norm_gains import gains_of, norm_gains
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.transfer import Transfer


class Offset(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


class Named(nn.LayerNorm):
    """One with a name of its own alone."""


HAVE = [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), Named(4)]
HAVE += [nn.InstanceNorm1d(4, affine=True)]
HAVE_NONE = [nn.Linear(4, 4), nn.PReLU(4), Offset(4), nn.LayerNorm(4, elementwise_affine=False), nn.LazyBatchNorm1d()]
HAVE_NONE += [nn.LayerNorm(4).requires_grad_(False), nn.LayerNorm(4, device="meta"), nn.InstanceNorm1d(4)]


@pytest.mark.parametrize("module", HAVE, ids=lambda module: type(module).__name__)
def test_gains_are_those_of_the_norm_layers_of_torch(module):
    assert gains_of(module) is module.weight
    module.weight.data = torch.tensor([3.0, -4.0, 0.0, 0.0])
    rms, mean = norm_gains(module)
    assert float(rms) == pytest.approx(2.5)
    assert float(mean) == pytest.approx(0.25)


@pytest.mark.parametrize("module", HAVE_NONE, ids=lambda module: type(module).__name__)
def test_nothing_else_has_any(module):
    assert gains_of(module) is None
    assert norm_gains(module) is None


def test_a_forward_pass_of_an_object_may_use_them_in_another_way():
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: x
    assert gains_of(norm) is None


def _measured(probe, transfer):
    probe.measure()
    return {layer: values.get("gain_rms") for layer, values in probe.collect(transfer.fetch()).items()}


def test_they_are_measured_at_first_and_as_long_as_they_are_small():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    nn.init.constant_(net[1].weight, 0.02)
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    found = _measured(probe, transfer)
    assert found["1"] == pytest.approx(0.02)
    assert (found["0"], found["2"]) == (None, 1.0)
    again = SpectralProbe(LayerMap(net), transfer)
    again.load_state_dict(probe.state_dict())
    for one in (probe, again):
        later = _measured(one, transfer)
        assert later["1"] == pytest.approx(0.02)
        assert later.get("2") is None
    nn.init.ones_(net[1].weight)
    assert _measured(probe, transfer)["1"] == 1.0
    assert _measured(probe, transfer).get("1") is None


def test_a_class_of_no_module_is_one_with_a_forward_of_its_own():
    made = {}
    exec("class Own(base):\n    def forward(self, x):\n        return x", {"base": nn.LayerNorm}, made)
    assert made["Own"].forward.__module__ is None or made["Own"].forward.__module__ == "builtins"
    assert gains_of(made["Own"](4)) is None
