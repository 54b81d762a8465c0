"""Layers behind which neighbours are strangers: each condition from both sides, and in real runs."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.advice.explanations import explain
from lightning_gradflow.detectors.chaotic_layers import ChaoticLayers
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
DOWN = np.linspace(2.0, 1.5, 101)


def run(gains=(10, 10, 10), later=None, norms=None, losses=DOWN, planned=400.0, left=0.9, **said):
    """A stack in which the gradient grows by these gains, from the last layer to the first."""
    history, points = History(), stack(len(gains) + 1)
    history.layer_axis.merge([point.module for point in points])
    history.add_points(points)
    norms = np.ones(len(points)) if norms is None else np.array(norms, dtype=float)
    last = -1
    for step in range(0, len(losses), 10):
        deltas = np.cumprod([1.0, *(later if step and later else gains)])[::-1] * (left if step else 1.0)
        scalars = {"planned_steps": planned, **said}
        values = {"delta_norm": deltas, "spectral_norm": norms}
        history.append(Row(step, values, scalars, losses=np.array(losses[last + 1 : step + 1])))
        last = step
    return history


def judged(**changes):
    return ChaoticLayers().judge(run(**changes))


def test_a_run_that_learns_nothing_behind_them_is_found_with_its_numbers():
    (finding,) = judged()
    assert verdict([finding]) == [("warning", "weight_scale", ("fc1", "fc2"))]
    assert finding.evidence["layer_gain"] == pytest.approx(10)
    assert "each makes what little two inputs differ by 10 times as large" in explain(finding)


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({"gains": (4.1,) * 3}, {"gains": (3.9,) * 3}),
        ({"gains": (10, 10, 1)}, {"gains": (10, 1, 1)}),  # the last one is meant, or the first
        ({"gains": (10, 1, 10)}, {"gains": (1, 1, 10)}),
        ({}, {"gains": (10, 10)}),  # there is no layer between the first and the last
        ({"norms": [1, 1, 1, 1]}, {"norms": [1, nan, 1, 1]}),
        ({"later": (4.1,) * 3}, {"later": (3.9,) * 3}),
        ({"gains": (4.1,) * 3, "later": (10,) * 3}, {"gains": (3.9,) * 3, "later": (10,) * 3}),
        ({"left": 0.51}, {"left": 0.49}),  # of the gradient at the output
        ({"losses": np.linspace(2.0, 0.5, 101)}, {"losses": np.geomspace(2.0, 0.05, 101)}),
        ({"planned": 500.0}, {"planned": 510.0}),  # had no time yet
        ({"planned": 125.0}, {"planned": 120.0, "losses": np.linspace(2.0, 1.5, 211)}),  # so late it has other reasons
        ({"optimizers": 1.0}, {"optimizers": 2.0}),
    ],
)
def test_each_condition_from_both_sides(sick, well):
    assert [(f.severity.value, f.cause) for f in judged(**sick)] == [("warning", "weight_scale")]
    assert judged(**well) == []


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_size_of_the_loss_makes_no_difference(size):
    history = run()
    scaled = History()
    scaled.layer_axis.merge(history.layers)
    scaled.add_points(history.points)
    for row in history.rows:
        values = {**row.values, "delta_norm": row.values["delta_norm"] * size}
        scaled.append(Row(row.step, values, row.scalars, losses=row.losses))
    assert len(ChaoticLayers().judge(scaled)) == 1


def test_nothing_is_known_without_rows_or_gradients():
    assert ChaoticLayers().judge(History()) == []
    history = History()
    history.append(Row(100, losses=DOWN))
    assert ChaoticLayers().judge(history) == []


@pytest.mark.parametrize("value", [0.9, math.inf, nan])
def test_the_limit_has_a_range(value):
    with pytest.raises(ValueError, match="max_gain"):
        ChaoticLayers(max_gain=value)


class Sine(nn.Module):
    def __init__(self, inputs, outputs, is_first, is_well):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        if is_well:
            bound = 1 / inputs if is_first else math.sqrt(6 / inputs) / 30
            nn.init.uniform_(self.layer.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(30 * self.layer(x))


class Picture(L.LightningModule):
    def __init__(self, is_well):
        super().__init__()
        layers = [Sine(2 if i == 0 else 48, 48, i == 0, is_well) for i in range(3)]
        self.net = nn.Sequential(*layers, nn.Linear(48, 1))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def _at(count, seed):
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, torch.sin(4 * x[:, :1]) + torch.cos(3 * x[:, 1:] * x[:, :1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_well", [True, False])
def test_a_network_of_sines_with_the_weights_of_others_is_cured(tmp_path, is_well):
    L.seed_everything(0, verbose=False)
    module = Picture(is_well)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*_at(1024, 1)), batch_size=64, shuffle=True)
    flow = GradFlow(mitigate="apply", report=False, console=False)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    device = {"accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = L.Trainer(max_steps=300, max_epochs=-1, callbacks=[flow], **device, **off)
    trainer.fit(module, data)
    told = [(str(f.kind), f.cause) for f in flow.findings if f.severity.is_alarm]
    assert told == ([] if is_well else [("loss_plateau", "weight_scale")])
    assert [action.kind for action in flow.actions] == ([] if is_well else ["reinit"])
    x, y = _at(512, 2)
    with torch.no_grad():
        assert nn.functional.mse_loss(module.net(x), y) < 0.1 * y.var()
