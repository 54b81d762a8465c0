"""A weight that is computed from other parameters is written through these."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm
from torch.nn.utils import weight_norm as older_weight_norm

from lightning_gradflow.remedies.weights import is_settable, originals_of, parameters_of, set_weight

older = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T

    def right_inverse(self, x):
        return x.triu()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class OneWay(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def _parametrized(*kinds):
    layer = nn.Linear(6, 6)
    for kind in kinds:
        parametrize.register_parametrization(layer, "weight", kind())
    return layer


def _twice():
    layer = parametrizations.weight_norm(nn.Linear(6, 6))
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


CAN = {
    "plain": lambda: nn.Linear(6, 4),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "of all at once": lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None),
    "of a convolution": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "transposed": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 4, 3), dim=1),
    "older": lambda: older_weight_norm(nn.Conv1d(3, 4, 3)),
    "bf16": lambda: parametrizations.weight_norm(nn.Linear(6, 4)).bfloat16(),
    "own": lambda: _parametrized(Doubled),
    "two": _twice,
}
CANNOT = {
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "older": lambda: older_spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "symmetric": lambda: _parametrized(Symmetric),
    "no way back": lambda: _parametrized(OneWay),
}


@older
@pytest.mark.parametrize("kind", CAN)
def test_a_weight_gets_the_values_it_is_given(kind):
    torch.manual_seed(0)
    layer = CAN[kind]()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert is_settable(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    kept, values = originals_of(layer), torch.randn(layer.weight.shape)
    set_weight(layer, values)
    assert torch.allclose(layer.weight.float(), values, atol=0.02 if kind == "bf16" else 1e-6)
    assert all(one is other for one, other in zip(originals_of(layer), kept, strict=True))
    assert all(any(p is one for one in parameters_of(layer)) for p in kept)
    set_weight(layer, 3 * layer.weight)
    assert torch.allclose(layer.weight.float(), 3 * values, atol=0.1 if kind == "bf16" else 1e-5)


@older
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`:FutureWarning")
@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_make_any_weight_is_told(kind):
    torch.manual_seed(0)
    layer = CANNOT[kind]()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert not is_settable(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_weight_that_is_written_passes_gradients_on():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    set_weight(layer, torch.randn(4, 6))
    layer(torch.ones(2, 6)).sum().backward()
    assert all(p.grad is not None for p in parameters_of(layer))


def test_the_own_parameters_come_first():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    assert parameters_of(layer)[0] is layer.bias
    assert len(parameters_of(layer)) == 3
    assert parameters_of(nn.Linear(6, 4, bias=False))[0].shape == (4, 6)
