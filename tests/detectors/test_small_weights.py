"""Weights that were drawn too small for the steps of the run: each condition from both sides, and in real runs."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.small_weights import SmallWeights
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import verdict

nan = math.nan
FLAT, DOWN = np.full(70, 2.3), np.geomspace(2.3, 0.2, 70)
FOUND = [("warning", "weight_scale", ("fc1", "fc0", "fc2"))]
SHAPES = ((8, 512), (512, 32), (64, 64), (32, 32))


def run(
    sizes=(0.01, 0.005, 0.03, 1.0),
    ratios=(0.3, 0.2, 0.01),
    steps=(0, 1, 2, 16),
    losses=FLAT,
    gains=(0.05, 0.9, 0.9),
    frozen=(),
    **scalars,
):
    """Layers whose weights start with these sizes; by which share each step changes them, and what they let through."""
    history, last, count = History(), -1, len(sizes)
    names = [f"fc{i}" for i in range(count)]
    history.layer_axis.merge(names)
    history.add_points([Point(name, name) for name in names])
    norms = np.array(sizes) * np.sqrt([rows for rows, _ in SHAPES[:count]])
    moved = np.where(np.isin(names, frozen), nan, norms)
    deltas = np.cumprod([1.0, *(1 / np.array(gains[: count - 1]))])
    for step, ratio in zip(steps, [*ratios, *[ratios[-1]] * len(steps)], strict=False):
        values = {"update_norm": ratio * moved, "delta_norm": deltas}
        values |= {"initial_size": np.array(sizes), "initial_norm": norms} if step == 0 else {}
        history.append(Row(step, values, scalars, losses=losses[last + 1 : step + 1]))
        last = step
    return history


def told(**changes):
    return verdict(SmallWeights().judge(run(**changes)))


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({}, {"sizes": (0.01, 0.005, 1.0, 1.0)}),
        ({}, {"sizes": (0.01, 0.005, 0.041, 1.0)}),
        ({"ratios": (0.101,)}, {"ratios": (0.099,)}),
        ({"ratios": (0.0, 0.0, 0.101)}, {"ratios": (0.0, 0.0, 0.0, 0.101)}),
        ({"ratios": (nan, 0.101)}, {"ratios": (nan, 0.099)}),
        ({"gains": (0.9, 0.099, 0.9)}, {"gains": (0.9, 0.101, 0.9)}),
        ({"gains": (0.9, 0.099, 0.9)}, {"gains": (0.9, 0.9, 0.05)}),  # it is a layer of usual size that holds it back
        ({"steps": (0, 16)}, {"steps": (0, 15)}),
        ({"steps": (0, 64), "planned_steps": 600.0}, {"steps": (0, 65), "planned_steps": 600.0}),
        ({"steps": (0, 1, 2, 32)}, {"steps": (0, 1, 2, 32), "losses": DOWN}),
        ({"optimizers": 1.0}, {"optimizers": 2.0}),
        ({"ratios": (0.0,), "steps": (0, 50)}, {"ratios": (0.0,), "steps": (0, 49)}),
        ({"ratios": (0.0,), "steps": (0, 50)}, {"ratios": (0.0,), "steps": (0, 50), "losses": DOWN}),
        ({"ratios": (0.0,), "steps": (0, 50), "lr": 1.0}, {"ratios": (0.0,), "steps": (0, 50), "planned_steps": 300.0}),
    ],
)
def test_each_condition_from_both_sides(sick, well):
    assert told(**sick) == FOUND
    assert told(**well) == []


def test_layers_of_zeros_and_frozen_ones_do_not_count_and_one_alone_says_nothing():
    assert told(sizes=(0.01, 0.005, 0.0, 0.0)) == [("warning", "weight_scale", ("fc1", "fc0"))]
    assert told(sizes=(0.01,)) == told(sizes=(0.01, 0.0, 0.0)) == []
    assert told(frozen=("fc2",), sizes=(0.01, 0.005, 0.03)) == [("warning", "weight_scale", ("fc1", "fc0"))]
    assert told(frozen=("fc0", "fc1", "fc2")) == []


def test_the_numbers_behind_it_are_told():
    (finding,) = SmallWeights().judge(run())
    assert finding.evidence == {"weight_size": 0.01, "update_ratio": pytest.approx(0.3)}
    (finding,) = SmallWeights().judge(run(ratios=(1e-3,), steps=(0, 50)))
    assert finding.evidence == {"weight_size": 0.01}


def test_nothing_is_said_without_samples_and_limits_are_checked():
    assert SmallWeights().judge(History()) == []
    assert SmallWeights(min_size=0.001).judge(run()) == []
    with pytest.raises(ValueError, match=r"min_size must be in \[0, 1\), got 1"):
        SmallWeights(min_size=1.0)


class Mixer(nn.Module):
    """Residual branches with a norm in front: the gradient comes through, however small the weights are."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(1)
        self.into, self.out = nn.Linear(32, 48), nn.Linear(48, 8)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(4)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= factor

    def forward(self, x):
        x = self.into(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.out(x)


class Run(L.LightningModule):
    def __init__(self, factor):
        super().__init__()
        self.net = Mixer(factor)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def _fit(factor, mitigate="suggest"):
    module = Run(factor)
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = (nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))(x) * 10).argmax(1)
    flow = GradFlow(report=False, console=False, mitigate=mitigate)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=150, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet).fit(module, loader)
    return flow


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_small_weights_behind_residuals_are_told_soon_and_drawn_anew():
    flow = _fit(0.02)
    (finding,) = [f for f in flow.findings if f.severity.is_alarm]
    assert (str(finding.kind), finding.cause, finding.step) == ("update_ratio", "weight_scale", 16)
    assert len(finding.layers) == 10
    assert any("nn.init." in suggestion.code for suggestion in finding.suggestions)
    cured = _fit(0.02, "apply")
    assert [(a.kind, a.step, len(a.layers), a.outcome) for a in cured.actions] == [("reinit", 16, 10, "kept")]
    sick, well, usual = (float(np.median(one.history.losses[-30:])) for one in (flow, cured, _fit(1.0)))
    assert well < sick
    assert well < 1.2 * usual  # it has made sixteen steps fewer


class Words(L.LightningModule):
    """A small language model whose table is its output layer as well."""

    def __init__(self, factor):
        super().__init__()
        self.table, self.net, self.out = nn.Embedding(32, 32), Mixer(factor), nn.Linear(32, 32)
        self.net.out = nn.Linear(48, 32)
        self.out.weight = self.table.weight
        nn.init.normal_(self.table.weight, std=factor / math.sqrt(32))
        self.net.out.weight.data *= factor

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.out(self.net(self.table(batch[:, 0]))), batch[:, 1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_beside_a_tied_table_that_is_as_small_nothing_is_drawn():
    torch.manual_seed(0)
    flow = GradFlow(report=False, console=False, mitigate="apply")
    data = torch.utils.data.DataLoader(torch.randint(0, 32, (512, 1)).repeat(1, 2), batch_size=64, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=20, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet).fit(Words(0.02), data)
    assert "weight_scale" in [finding.cause for finding in flow.findings if finding.severity.is_alarm]
    assert not flow.actions


def test_usual_weights_are_left_alone():
    assert not _fit(1.0).findings


class Sines(nn.Module):
    """Each layer multiplies what comes out by a large frequency, and has weights that are as much smaller."""

    def __init__(self, frequency=60.0):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
        self.out = nn.Linear(64, 1)
        self.frequency = frequency
        for layer in (*self.layers[1:], self.out):
            nn.init.uniform_(layer.weight, -(bound := math.sqrt(6 / 64) / frequency), bound)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return self.out(x)


@pytest.mark.parametrize("rate", [1e-4, 3e-4])
def test_sine_networks_are_left_alone(rate):
    x = torch.linspace(-1, 1, 512)[:, None]
    y = torch.sin(20 * x) + 0.5 * torch.sin(7 * x)

    class Fit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Sines()

        def training_step(self, batch, _):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), rate)

    flow = GradFlow(report=False, console=False)
    data = torch.utils.data.TensorDataset(x, y)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=60, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet)
    trainer.fit(Fit(), torch.utils.data.DataLoader(data, batch_size=128, shuffle=True))
    assert not [finding for finding in flow.findings if finding.cause == "weight_scale"]
