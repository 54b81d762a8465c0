"""Layers of units that are copies of one another, in made-up histories and in real runs."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.copied_units import copied_layers
from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import verdict

nan, inf = math.nan, math.inf


def run(weights, gradients, names=("fc0", "fc1", "fc2")):
    history = History()
    history.layer_axis.merge(names)
    history.add_points([Point(name, name) for name in names])
    values = {"unit_spread": np.array(weights, dtype=float), "unit_grad_spread": np.array(gradients, dtype=float)}
    history.append(Row(0, values))
    return history


@pytest.mark.parametrize(
    ("weights", "gradients", "expected"),
    [
        ([0, 0, 0], [0, 0, 0], ("fc0", "fc1")),  # the last layer learns what the targets tell
        ([0, 1.2, 0], [1e-7, 0, 1.3], ("fc0",)),
        ([9e-4, 1.2, 1.2], [9e-4, 1.1, 1.3], ("fc0",)),
        ([1.1e-3, 1.2, 1.2], [0, 1.1, 1.3], ()),
        ([0, 1.2, 0], [0.099, 0.7, 1.3], ("fc0",)),  # biases make a little of a difference
        ([0, 1.2, 0], [0.101, 0.7, 1.3], ()),  # what is behind it makes its units differ
        ([0.099, 0.09, 1.2], [0.7, 0.8, 1.3], ("fc0", "fc1")),  # and where all were copies that is no help
        ([0.099, 0.101, 1.2], [0.7, 0.8, 1.3], ()),
        ([0, 0, 0], [inf, inf, 1.3], ()),  # no gradient, no finding
        ([nan, nan, nan], [nan, nan, nan], ()),
    ],
)
def test_weights_and_gradients_have_to_be_alike(weights, gradients, expected):
    history = run(weights, gradients)
    assert copied_layers(history) == expected
    assert verdict(DeadUnits().judge(history)) == ([("critical", "symmetry", expected)] if expected else [])


def test_of_all_layers_it_is_asked_in_the_first_sample_and_of_several():
    history = run([0, 0, 1.2], [0.7, 0.8, 1.3])
    assert copied_layers(history) == ("fc0", "fc1")
    history.append(Row(1, dict(history.rows[0].values)))
    assert copied_layers(history) == ()
    assert copied_layers(run([0.09, nan, 1.2], [0.7, nan, 1.3])) == ()
    history = run([0, 0, 1.2], [inf, inf, inf])  # a step that a gradient scaler has skipped
    assert copied_layers(history) == ()
    history.append(Row(1, dict(run([0.09, 0.08, 1.2], [0.7, 0.8, 1.3]).rows[0].values)))
    assert copied_layers(history) == ("fc0", "fc1")


def test_a_module_that_holds_the_others_does_not_stand_behind_them():
    assert copied_layers(run([0, 0, 0], [0, 0, 0], names=("net.0", "net.2", "net"))) == ("net.0",)


def test_a_row_in_which_nothing_was_compared_tells_nothing():
    history = run([0, 0, 0], [0, 0, 0])
    history.append(Row(1, {"unit_spread": np.zeros(3)}))
    assert copied_layers(history) == ()


def own_run(*spreads):
    history = History()
    history.layer_axis.merge(["a", "b"])
    for step, pair in enumerate(spreads):
        history.append(Row(step, {"matrix_spread": np.array(pair, dtype=float)} if pair else {}))
    return history


@pytest.mark.parametrize(
    ("spreads", "expected"),
    [
        ([(0, 1.2), (9e-4, nan), (9e-4, nan)], ("a",)),
        ([(0, 0)] * 3, ("a", "b")),
        ([(0, 1.2), (0, nan)], ()),  # nothing else says that it has units
        ([(0, 1.2), (1.1e-3, nan), (0, nan)], ()),
        ([(0, 1.2), (0, nan), (inf, nan)], ()),
        ([(0, 1.2), (0, nan), (0, nan), ()], ()),  # not measured in the newest row
        ([(1.1e-3, nan), (0, 1.2), (0, nan), (0, nan)], ("a",)),
    ],
)
def test_a_matrix_of_ones_own_has_to_be_made_of_copies_in_three_samples(spreads, expected):
    history = own_run(*spreads)
    assert copied_layers(history) == expected
    assert verdict(DeadUnits().judge(history)) == ([("critical", "symmetry", expected)] if expected else [])


class Run(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def _fit(net, mitigate, steps=60):
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x[:, 0] * x[:, 1] > 0).long()  # no single direction tells
    flow = GradFlow(every_n_steps=10, report=False, console=False, mitigate=mitigate)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet).fit(Run(net), loader)
    return flow


def _net(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2)
    )


def _constant(net, layers=(0, 3, 5)):
    for i in layers:
        nn.init.constant_(net[i].weight, 0.1)
        nn.init.zeros_(net[i].bias)
    return net


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_a_net_of_constants_is_found_and_its_units_made_to_differ():
    flow = _fit(_constant(_net()), "suggest")
    assert [f.layers for f in flow.findings if f.cause == "symmetry"] == [("net.0", "net.3")]
    net = _constant(_net())
    flow = _fit(net, "apply")
    assert [(a.kind, a.outcome) for a in flow.actions if "symmetry" in a.reason] == [("reinit", "kept")]
    assert all(torch.linalg.matrix_rank(net[i].weight.detach()) == 12 + 12 * (i > 0) for i in (0, 3))
    found = [f for f in flow.findings if f.cause == "symmetry"]
    assert [f.resolved_step is not None for f in found] == [True]


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")  # of what stands behind the dropout
@pytest.mark.parametrize(
    "net",
    [lambda: _net(), lambda: _constant(_net(), [0]), lambda: _constant(_net(dropout=0.5), [0, 5])],
    ids=["drawn", "one layer of constants before others that are drawn", "dropout"],
)
def test_units_that_will_differ_are_left_alone(net):
    assert not [f for f in _fit(net(), "suggest", steps=20).findings if f.cause == "symmetry" and "net.0" in f.layers]


class Own(nn.Module):
    """A layer that multiplies with matrices of its own; tied, the second one is the first."""

    def __init__(self, first, second=None):
        super().__init__()
        self.first = nn.Parameter(first)
        self.second = nn.Parameter(second) if second is not None else None
        self.shift = nn.Parameter(torch.zeros(first.shape[1]))

    def forward(self, x):
        hidden = torch.tanh(torch.einsum("bi,ih->bh", x, self.first) + self.shift)
        if self.second is None:
            return torch.einsum("bh,ih->bi", hidden, self.first)
        return hidden @ self.second


def _own_net(first=0.1, second=0.1, tied=False):
    torch.manual_seed(1)
    weights = [torch.full(s, v) if v else torch.randn(s) / 4 for s, v in (((12, 24), first), ((24, 8), second))]
    return Own(weights[0]) if tied else Own(*weights)


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_constants_are_found_and_drawn(tied):
    flow = _fit(_own_net(tied=tied), "suggest", steps=20)
    assert [(f.layers, f.step) for f in flow.findings if f.cause == "symmetry"] == [(("net",), 2)]
    net = _own_net(tied=tied)
    flow = _fit(net, "apply")
    # of two that are drawn as badly the gradient that vanishes tells before
    assert [(a.kind, a.layers, a.outcome) for a in flow.actions] == [("reinit", ("net",), "kept")]
    assert flow.actions[0].step == (2 if tied else 0)
    assert torch.linalg.matrix_rank(net.first.detach()) == 12


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")  # no gradient comes past equal outputs
@pytest.mark.parametrize("net", [_own_net(first=0), _own_net(second=0)], ids=["of the outputs", "of the inputs"])
def test_a_matrix_of_constants_beside_one_that_is_drawn_is_left_alone(net):
    assert not [f for f in _fit(net, "suggest", steps=20).findings if f.cause == "symmetry"]
