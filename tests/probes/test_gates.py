"""What is multiplied with another signal is a gate; what goes on to a layer is none."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.probes.gates import Gates
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

GATED = {
    "highway": lambda self, x: self.out(torch.sigmoid(self.a(x)) * self.b(x)),
    "one minus the gate": lambda self, x: self.out((g := torch.sigmoid(self.a(x))) * self.b(x) + (1 - g) * x),
    "the gate second": lambda self, x: self.out(self.b(x).mul(torch.sigmoid(self.a(x)))),
    "in place": lambda self, x: self.out(self.b(x).mul_(self.a(x).sigmoid())),
    "squeeze and excitation": lambda self, x: self.out(x * self.a(x).mean(0).sigmoid()[None]),
    "a part of it": lambda self, x: self._part(x),
    "attention": lambda self, x: self.out(torch.sigmoid(self.a(x) @ self.b(x).T) @ x),
    "lerp": lambda self, x: self.out(torch.lerp(x, self.b(x), torch.sigmoid(self.a(x)))),
    "einsum": lambda self, x: self.out(torch.einsum("bi,bi->bi", torch.sigmoid(self.a(x)), x)),
}
PLAIN = {
    "a layer behind it": lambda self, x: self.out(torch.sigmoid(self.a(x))),
    "a number": lambda self, x: self.out(2 * torch.sigmoid(self.a(x))),
    "a parameter": lambda self, x: self.out(self.scale * torch.sigmoid(self.a(x))),
    "a matrix of weights": lambda self, x: self.out(torch.sigmoid(self.a(x)) @ self.b.weight),
    "the same transposed": lambda self, x: self.out(torch.sigmoid(self.a(x)) @ self.b.weight.T),
    "a sum": lambda self, x: self.out(torch.sigmoid(self.a(x)) + x),
    "a product of others": lambda self, x: self.out(torch.sigmoid(self.a(x))) * self.b(x).mean(1, keepdim=True),
    "dropout": lambda self, x: self.out(F.dropout(torch.sigmoid(self.a(x)), 0.5)),
    "one number for all": lambda self, x: self.out(torch.sigmoid(self.a(x)) * x.mean()),
}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.function(self, x)

    def _part(self, x):
        gate, rest = torch.sigmoid(self.a(x)).chunk(2, 1)
        return (gate * rest).repeat(1, 2)


def gate_fractions(model):
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    probe.start_batch()
    loss = model(torch.randn(8, 4)).sum()
    probe.before_backward()
    loss.backward()
    probe.after_backward()
    probe.finish()
    found = probe.collect(transfer.fetch()).points
    return [values["gate_fraction"] for values in found.values() if "gate_fraction" in values]


@pytest.mark.parametrize("case", GATED)
def test_a_gate_is_told(case):
    assert max(gate_fractions(Net(GATED[case]))) == 1.0


@pytest.mark.parametrize("case", PLAIN)
def test_what_gates_nothing_is_told(case):
    assert gate_fractions(Net(PLAIN[case])) == [0.0]


def test_only_bounded_activations_are_asked():
    assert gate_fractions(Net(lambda self, x: self.out(F.silu(self.a(x)) * self.b(x)))) == []


def test_outputs_are_not_kept_alive():
    gates = Gates()
    output = torch.sigmoid(torch.ones(3))
    gates.add(output, "sigmoid")
    dead = weakref.ref(output)
    del output
    gc.collect()
    assert dead() is None
    assert list(gates.among((torch.ones(3), torch.ones(3)))) == []


def test_outputs_of_another_forward_pass_are_forgotten():
    gates, output = Gates(), torch.sigmoid(torch.ones(3))
    gates.add(output, "sigmoid")
    gates.clear()
    assert list(gates.among((output, torch.ones(3)))) == []
