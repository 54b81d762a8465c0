"""Of gates that are written by hand the one that keeps the state is found, whatever the convention."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.remedies.gate_memory import gate_blocks, keep_state
from lightning_gradflow.remedies.loops import Loop
from lightning_gradflow.remedies.recurrent_treatment import treat
from tests.remedies.test_recurrent_treatment import SIZE, STEPS, _finding, _history, _seeded, _training


class Lstm(nn.Module):
    """Gates that are computed together, in any order, with the bias in the layers or in a parameter beside them.

    Args:
        ahead: whether the input comes in for all steps at once, before the loop, with the only bias.
    """

    def __init__(self, order="ifgo", bare=False, joined=False, ahead=False):
        super().__init__()
        self.order = order
        self.enter = nn.Linear((2 if joined else 1) * SIZE, 4 * SIZE, bias=not bare)
        self.again = self.enter if joined else nn.Linear(SIZE, 4 * SIZE, bias=not (bare or ahead))
        self.bias = nn.Parameter(torch.zeros(4 * SIZE)) if bare else 0.0
        self.joined, self.ahead = joined, ahead
        self.read = nn.Linear(SIZE, 1)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], SIZE)
        for now in self.enter(x) if self.ahead else x:
            entered = now if self.ahead or self.joined else self.enter(now)
            both = self.enter(torch.cat([now, h], 1)) if self.joined else entered + self.again(h)
            z = dict(zip(self.order, (both + self.bias).chunk(4, -1), strict=True))
            c = z["f"].sigmoid() * c + z["i"].sigmoid() * z["g"].tanh()
            h = z["o"].sigmoid() * c.tanh()
        return self.read(h)


class Gru(nn.Module):
    """A layer for each gate; what z keeps is a convention."""

    def __init__(self, keeps_by_z=True):
        super().__init__()
        self.keeps_by_z = keeps_by_z
        self.gate, self.reset, self.new = (nn.Linear(2 * SIZE, SIZE) for _ in range(3))
        self.read = nn.Linear(SIZE, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            z = self.gate(torch.cat([now, h], 1)).sigmoid()
            r = self.reset(torch.cat([now, h], 1)).sigmoid()
            new = self.new(torch.cat([now, r * h], 1)).tanh()
            keep = z if self.keeps_by_z else 1 - z
            h = keep * h + (1 - keep) * new
        return self.read(h)


def _treated_lstm(model):
    layers = ["enter"] if model.joined else ["again"] if model.ahead else ["enter", "again"]
    ops = [("again/sigmoid", "sigmoid"), ("again/tanh", "tanh")]
    history = _history(layers, ops, gates=("again/sigmoid",))
    return treat(_training(model, history), _finding(*layers))


@pytest.mark.parametrize("order", ["ifgo", "ofgi", "figo"])
@pytest.mark.parametrize("kind", [{}, {"bare": True}, {"joined": True}, {"ahead": True}])
def test_the_forget_gate_is_found_in_any_order(order, kind):
    model = _seeded(lambda: Lstm(order, **kind))
    treatment = _treated_lstm(model)
    assert treatment.before["time_decades"] < -4
    assert treatment.after["time_decades"] > treatment.before["time_decades"] / 2
    biases = [m.bias for m in (model.enter, model.again) if m.bias is not None]
    added = model.bias if kind.get("bare") else sum({id(b): b for b in biases}.values())
    parts = dict(zip(order, added.detach().chunk(4), strict=True))
    assert (parts["f"] >= 1).all()
    assert parts["f"].max() <= math.log(39)
    assert not any(parts[gate].any() for gate in "igo")
    start = SIZE * order.index("f")
    assert f"bias[{start}:{start + SIZE}] = log" in treatment.note
    assert (ROOT in treatment.layers) == bool(kind.get("bare"))


def _treated_gru(model):
    history = History()
    ops = {"gate": "sigmoid", "reset": "sigmoid", "new": "tanh"}
    points = [point for name, op in ops.items() for point in (Point(name, name), Point(f"{name}/{op}", name, op))]
    history.add_points(points)
    gate = np.array([float(point.op == "sigmoid") if point.op else np.nan for point in points])
    history.append(Row(0, values={"gate_fraction": gate}, calls={p.name: np.ones(STEPS) for p in points}))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter]["step"] = torch.tensor(1.0)
    return treat(_training(model, history, [optimizer]), _finding(*ops)), optimizer


@pytest.mark.parametrize("keeps_by_z", [True, False])
def test_a_gate_by_itself_gets_the_sign_that_keeps(keeps_by_z):
    model = _seeded(lambda: Gru(keeps_by_z))
    weights = [layer.weight.detach().clone() for layer in (model.gate, model.reset)]
    treatment, optimizer = _treated_gru(model)
    sign = 1 if keeps_by_z else -1
    which = "gate.bias = log" if keeps_by_z else "gate.bias = -log"
    assert treatment.note.startswith(which)
    assert (sign * model.gate.bias >= 1).all()
    assert not model.reset.bias.any()
    assert {"gate", "reset"} < {*treatment.layers}
    assert model.gate.bias in set(treatment.changed)
    assert all(torch.equal(layer.weight, w) for layer, w in zip((model.gate, model.reset), weights, strict=True))
    assert {*optimizer.state} == {*model.parameters()} - {*treatment.changed}


def test_gates_with_weights_that_are_far_too_large_are_drawn_anew_and_forgotten_by_the_optimizer():
    model = _seeded(Gru)
    for layer in (model.gate, model.reset):
        nn.init.normal_(layer.weight)
        nn.init.constant_(layer.bias, 0.25)
    treatment, optimizer = _treated_gru(model)
    assert all(layer.weight.std() < 0.5 for layer in (model.gate, model.reset))
    assert {*optimizer.state} == {*model.parameters()} - {*treatment.changed}
    assert {model.gate.weight, model.reset.weight} < {*treatment.changed}


class Leaky(nn.Module):
    """A state that nothing maps: a gate alone says what is kept of it, and the rest is the input."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(2 * SIZE, SIZE)
        self.read = nn.Linear(SIZE, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            z = self.gate(torch.cat([now, h], 1)).sigmoid()
            h = (1 - z) * h + z * now
        return self.read(h)


def test_where_there_is_a_gate_and_nothing_to_draw_its_bias_is_set():
    model = _seeded(Leaky)
    weight = model.gate.weight.detach().clone()
    history = _history(["gate"], [("gate/sigmoid", "sigmoid")], gates=("gate/sigmoid",))
    treatment = treat(_training(model, history), _finding("gate"))
    assert treatment.layers == ("gate",)
    assert treatment.changed == (model.gate.bias,)
    assert (model.gate.bias <= -1).all()
    assert torch.equal(model.gate.weight, weight)


class Pushed(Leaky):
    """The same with a layer that is called once, and added to the gate at every step."""

    def __init__(self):
        super().__init__()
        self.push = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        h, push = x.new_zeros(x.shape[1], SIZE), self.push(x[0])
        for now in x:
            z = (push + self.gate(torch.cat([now, h], 1))).sigmoid()
            h = (1 - z) * h + z * now
        return self.read(h)


def test_a_layer_that_is_called_once_is_no_gate():
    model = _seeded(Pushed)
    bias = model.push.bias.detach().clone()
    history = _history(["push", "gate"], [("gate/sigmoid", "sigmoid")], gates=("gate/sigmoid",))
    treatment = treat(_training(model, history), _finding("push", "gate"))
    assert treatment.layers == ("gate",)
    assert torch.equal(model.push.bias, bias)


class Reads(Leaky):
    """The same, read at every time step."""

    def forward(self, x):
        h, found = x.new_zeros(x.shape[1], SIZE), []
        for now in x:
            z = self.gate(torch.cat([now, h], 1)).sigmoid()
            h = (1 - z) * h + z * now
            found.append(self.read(h))
        return torch.stack(found)


def test_what_reads_the_state_at_every_step_is_no_gate_and_keeps_its_bias():
    model = _seeded(Reads)
    nn.init.constant_(model.read.bias, 5.0)
    history = _history(["gate", "read"], [("gate/sigmoid", "sigmoid")], gates=("gate/sigmoid",))
    treatment = treat(_training(model, history), _finding("gate", "read"))
    assert treatment.changed == (model.gate.bias,)
    assert (model.gate.bias <= -1).all()
    assert (model.read.bias == 5.0).all()


def test_a_state_that_lasts_keeps_its_gates():
    model = _seeded(Leaky)
    nn.init.constant_(model.gate.bias, -8.0)
    history = _history(["gate"], [("gate/sigmoid", "sigmoid")], gates=("gate/sigmoid",))
    assert treat(_training(model, history), _finding("gate")) is None
    assert (model.gate.bias == -8.0).all()


def _decades(bias):
    return lambda: 20 * torch.sigmoid(bias.detach().mean()).log10().item()


def test_what_wins_too_little_is_put_back():
    bias = nn.Parameter(torch.full((4,), 0.5))
    old = bias.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for span in (lambda: -3.0, lambda: -0.4 + 0.1 * float(bias.mean() > 0.6), lambda: 2.0 * float(bias.mean() > 0.6)):
        assert keep_state([[(bias, slice(None))]], span, 50, generator) is None
        assert torch.equal(bias, old)
    kept = keep_state([[(bias, slice(None))]], _decades(bias), 50, generator)
    assert (kept.bias, kept.sign, kept.changed) == (bias, 1, (bias,))


def test_biases_that_are_added_to_each_other_are_zero_but_for_one():
    one, two = (nn.Parameter(torch.ones(8)) for _ in range(2))
    blocks = [[(one, part), (two, part)] for part in (slice(0, 4), slice(4, 8))]

    def span():
        return 20 * torch.sigmoid((one + two).detach()[4:].mean()).log10().item() - 5 * float(two.any())

    kept = keep_state(blocks, span, 50, torch.Generator().manual_seed(0))
    assert (kept.bias, kept.part) == (one, slice(4, 8))
    assert set(kept.changed) == {one, two}
    assert not one[:4].any()
    assert (one[4:] >= 1).all()
    assert not two.any()


def test_gains_beside_gates_are_no_biases():
    model = _seeded(lambda: Lstm(bare=True))
    model.gain = nn.Parameter(torch.ones(4 * SIZE))
    loop = Loop("again", "", ("enter",), gates=4)
    blocks = gate_blocks(dict(model.named_modules()), ["enter", "again"], {"again": loop})
    assert [[bias is model.bias for bias, _ in block] for block in blocks] == [[True]] * 4


def test_frozen_biases_are_no_gates():
    layer = nn.Linear(2, 2)
    assert len(gate_blocks({"gate": layer}, ["gate"], {})) == 1
    layer.bias.requires_grad_(False)
    assert gate_blocks({"gate": layer}, ["gate"], {}) == []
