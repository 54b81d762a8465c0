"""Biases that hold gates on the side on which the signal is lost get the other sign, and no others."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.remedies.gate_signs import turn_gates
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.training import Training

STEPS, SIZE, DEPTH = 30, 16, 20
BIAS = 4.0


class Highway(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.body, self.gate = (nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in range(DEPTH)]) for _ in range(2))
        self.gates = [f"gate.{i}" for i in range(DEPTH)]
        for gate in self.gate:
            nn.init.constant_(gate.bias, bias)

    def forward(self, x):
        x = x[0]
        for body, gate in zip(self.body, self.gate, strict=True):
            z = torch.sigmoid(gate(x))
            x = z * torch.tanh(body(x)) + (1 - z) * x
        return x


class Memory(nn.Module):
    """An LSTM by hand: all gates from one layer, or from one for the inputs and one for the state."""

    def __init__(self, bias, apart=False):
        super().__init__()
        self.enter = nn.Linear(SIZE, 4 * SIZE) if apart else None
        self.again = nn.Linear(SIZE if apart else 2 * SIZE, 4 * SIZE)
        self.gates = ["enter", "again"]
        with torch.no_grad():
            (self.enter or self.again).bias[SIZE : 2 * SIZE] = bias

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            z = self.again(torch.cat([now, h], 1)) if self.enter is None else self.enter(now) + self.again(h)
            i, f, g, o = z.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class Own(nn.Module):
    """The same of parameters."""

    def __init__(self, bias):
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.randn(SIZE, 4 * SIZE) / SIZE) for _ in range(2))
        self.b = nn.Parameter(torch.zeros(4 * SIZE))
        with torch.no_grad():
            self.b[SIZE : 2 * SIZE] = bias

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            i, f, g, o = (h @ self.u + self.b + now @ self.w).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


MAKES = {"highway": Highway, "memory": Memory, "apart": lambda bias: Memory(bias, apart=True)}
WRONG = {"highway": BIAS, "memory": -BIAS, "apart": -BIAS}


def _made(name, bias):
    torch.manual_seed(0)
    return MAKES[name](bias)


def _x():
    return torch.randn(STEPS, 8, SIZE, generator=torch.Generator().manual_seed(0))


def _turned(net, **kwargs):
    return turn_gates(net, lambda: net(_x()), net.gates, **kwargs)


def _biases(net):
    return {name: p.clone() for name, p in net.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("name", MAKES)
def test_biases_of_the_wrong_sign_get_the_other_one_and_nothing_else_changes(name):
    net = _made(name, WRONG[name])
    before = {key: p.clone() for key, p in net.named_parameters()}
    turned = _turned(net)
    assert turned.before < -4
    assert abs(turned.after) < 2
    for key, p in net.named_parameters():
        held = before[key].abs() >= 1 if key.endswith("bias") else torch.zeros_like(p, dtype=torch.bool)
        assert torch.equal(p, torch.where(held, -before[key], before[key])), key


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("bias", [-1.0, 0.0])  # times the wrong one
def test_biases_of_the_right_sign_and_usual_ones_stay(name, bias):
    net = _made(name, bias * WRONG[name])
    before = _biases(net)
    assert _turned(net) is None
    assert all(torch.equal(p, before[key]) for key, p in _biases(net).items())


def test_small_ones_stay_though_the_other_sign_would_bring_more():
    net = _made("highway", 0.9)
    assert _turned(net) is None


def test_frozen_ones_and_those_of_weights_that_have_been_learnt_stay():
    net = _made("memory", -BIAS)
    net.again.bias.requires_grad_(False)
    assert _turned(net) is None
    net = _made("memory", -BIAS)
    with torch.no_grad():
        net.again.weight += 5 * torch.outer(net.again.weight[:, 0], net.again.weight[0])
    assert _turned(net) is None


def test_layers_that_are_no_gates_stay():
    net = _made("highway", BIAS)
    net.gates = [f"body.{i}" for i in range(DEPTH)]
    assert _turned(net) is None


def _training(net, layers, gates):
    history = History()
    points = [point for name in layers for point in (Point(name, name), Point(f"{name}/sigmoid", name, "sigmoid"))]
    history.add_points(points)
    history.append(Row(0, {"gate_fraction": np.array([np.nan if p.is_layer else float(gates) for p in points])}))

    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(_x())

    optimizer = torch.optim.Adam(net.parameters())
    net(_x()).sum().backward()
    optimizer.step()
    return Training(net, [optimizer], history, rehearse, seed=1)


def _finding(kind=FindingKind.VANISHING_GRADIENT, cause="saturation"):
    return Finding(kind, Severity.WARNING, 0, ("gate.0",), cause)


def test_a_vanishing_gradient_is_cured_by_it_and_the_optimizer_forgets_these_biases():
    net = _made("highway", BIAS)
    training = _training(net, net.gates, gates=True)
    done = reinitialise(training, _finding())
    assert done.layers == tuple(net.gates)
    assert done.before["span"] < -4 < -2 < done.after["span"]
    assert all(bool((gate.bias < -BIAS / 2).all()) for gate in net.gate)
    known = training.optimizers[0].state
    assert not any(gate.bias in known for gate in net.gate)
    assert all(gate.weight in known for gate in net.gate)


def test_where_no_gates_were_seen_no_sign_is_turned():
    net = _made("highway", BIAS)
    reinitialise(_training(net, net.gates, gates=False), _finding())
    assert not any(bool((gate.bias < -BIAS / 2).all()) for gate in net.gate)


def test_nor_for_gradients_that_explode():
    net = _made("highway", BIAS)
    reinitialise(_training(net, net.gates, gates=True), _finding(FindingKind.EXPLODING_GRADIENT))
    assert all(bool((gate.bias > BIAS / 2).all()) for gate in net.gate)


def test_a_parameter_that_is_added_to_a_product_is_a_bias_too():
    torch.manual_seed(0)
    net = Own(-BIAS)
    done = reinitialise(_training(net, [], gates=True), _finding(cause="recurrence"))
    assert done.layers == (ROOT,)
    assert bool((net.b[SIZE : 2 * SIZE] > BIAS / 2).all())
