"""Scores that tables made far too wide from the start: each condition from both sides."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.large_tables import LargeTables
from lightning_gradflow.detectors.large_weights import LargeWeights
from lightning_gradflow.detectors.made_by_size import scores_from_the_start
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import verdict

POINTS = [Point("embedding", "embedding"), Point("fc", "fc"), Point("out", "out")]
LATE = (0, 1, 2, 4, 8, 16, 32, 50, 100)


def run(steps=(0, 1, 2, 4, 8), start=60.0, shares=(1.5,), ratio=2e-3, planned=400, rates=(1e-3,), **changes):
    """A loss that falls by half in eight steps; of several shares, ratios and rates the last counts from then on."""
    history = History()
    history.layer_axis.merge([point.module for point in POINTS])
    history.add_points(POINTS)
    known = {"deviation": 10.0, "classes": 20.0, "optimizers": 1.0, "norms": (50.0, 50.0), "residual": 1.0, "size": 1.0}
    known["table_norm"] = math.nan
    known |= changes
    losses = np.maximum(start * 0.5 ** (np.arange(steps[-1] + 1) / 8), 2.5)
    ratios = ratio if isinstance(ratio, tuple) else (ratio,)
    last = -1
    for i, step in enumerate(steps):
        loss, norm = losses[step], known["norms"][min(i, 1)]
        pick = lambda values, i=i: values[min(i, len(values) - 1)]  # noqa: E731
        entries, spectral = 96 * 96, known["size"] * 2 * 0.98
        values = {
            "table_cosine": [0.5, math.nan, math.nan],
            "grad_norm": [pick(shares) * loss / (0.5 * norm), 1.0, 1.0],
            "grad_rms": [0.1, entries**-0.5, entries**-0.5],
            "weight_norm": [norm, *[known["size"] * 96**0.5] * 2],
            "spectral_norm": [known["table_norm"], spectral, spectral],
            "update_ratio": [pick(ratios), 2e-3, 2e-3],
            "delta_norm": [1.0, 1.0, known["residual"] if i else 1.0],
        }
        scalars = {"score_deviation": known["deviation"], "score_classes": known["classes"], "lr": pick(rates)}
        scalars |= {"planned_steps": planned, "optimizers": known["optimizers"]}
        columns = {name: np.array(column) for name, column in values.items()}
        history.append(Row(step, columns, scalars=scalars, losses=losses[last + 1 : step + 1]))
        last = step
    return history


def judged(**changes):
    found = verdict(LargeTables().judge(run(**changes)))
    assert found in ([], [("warning", "weight_scale", ("embedding",))])
    return bool(found)


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({"deviation": 3.1}, {"deviation": 2.9}),
        ({"classes": 20.0, "start": 4.6}, {"classes": 20.0, "start": 4.4}),  # 1.5 times the logarithm of 20 is 4.49
        ({}, {"deviation": math.nan}),
        ({}, {"classes": math.nan}),
        ({"shares": (0.51, 1.5)}, {"shares": (0.49, 1.5)}),
        ({"shares": (1.5, 0.51)}, {"shares": (1.5, 0.49)}),
        # as a chaotic gradient may give once
        ({"shares": (1.5, 1.5, 0.2, 1.5)}, {"shares": (1.5, 0.2, 0.2, 0.2, 1.5)}),
        ({"ratio": 2.4e-3}, {"ratio": 2.6e-3}),
        ({"ratio": (2.4e-3, 1e-4)}, {"ratio": (2.6e-3, 1e-4)}),
        ({"planned": 499}, {"planned": 501}),
        ({}, {"planned": math.nan}),
        ({}, {"steps": (0, 1, 2, 4, 7)}),
        ({"rates": (1e-3, 1e-3, 9e-4)}, {"rates": (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)}),  # it warms up
        ({}, {"optimizers": 2.0}),
        ({}, {"table_norm": 9.0}),  # one's own, such as prototypes
        ({"norms": (50.0, 26.0)}, {"norms": (50.0, 24.0)}),  # drawn anew
    ],
)
def test_wide_scores_are_told_in_the_first_steps(sick, well):
    assert judged(**sick)
    assert not judged(**well)


def test_the_numbers_behind_it_are_told():
    (finding,) = LargeTables().judge(run())
    numbers = {"steps": 8.0, "score_deviation": 10.0, "loss_by_size": pytest.approx(1.5), "reach": pytest.approx(0.8)}
    assert finding.evidence == {**numbers, "loss": pytest.approx(float(np.median(run().losses)))}


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({}, {"residual": 0.49}),
        ({"residual": 0.51}, {"steps": LATE[:-2]}),  # it may have come down from there alone
        ({"ratio": (0.1, 2e-3)}, {"ratio": 2.6e-3}),  # most steps, and not the first ones
        ({}, {"norms": (50.0, 24.0)}),
    ],
)
def test_a_run_that_had_time_is_judged_by_what_it_knows(sick, well):
    share = {"steps": LATE, "shares": (1.5, 0.0)}  # it is no more the size that makes up the loss
    assert judged(**{**share, **sick})
    assert judged(**{**share, **sick, "table_norm": 9.0})
    assert not judged(**{**share, **well})


def test_layers_that_are_as_large_as_the_tables_are_named_then():
    small, large = run(), run(size=8.0)
    assert LargeTables().judge(small)
    assert not LargeWeights().judge(small)
    assert not LargeTables().judge(large)
    assert verdict(LargeWeights().judge(large)) == [("warning", "weight_scale", ("fc", "out"))]
    assert not LargeWeights().judge(run(size=8.0, deviation=1.9))


def test_nothing_is_said_without_samples():
    assert scores_from_the_start(History()) == ((), {})


class Tied(L.LightningModule):
    """The next token of a cycle, with what comes out of a norm multiplied by the table that went in."""

    def __init__(self, std):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(20, 64), nn.Embedding(8, 64)
        self.block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 20, bias=False)
        self.head.weight = self.tokens.weight
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=std)

    def training_step(self, batch, _):
        hidden = self.tokens(batch[0]) + self.places.weight
        scores = self.head(self.norm(hidden + self.block(hidden)))
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def _fit(std, mitigate="suggest"):
    module = Tied(std)
    x = torch.randint(20, (1000, 8))
    data = torch.utils.data.TensorDataset(x, (7 * x + torch.arange(8)) % 20)
    flow = GradFlow(report=False, console=False, mitigate=mitigate)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=200, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))
    return flow


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_a_tied_table_of_deviation_one_is_drawn_anew_with_the_positions_beside_it():
    flow = _fit(1.0, "apply")
    assert [(f.cause, f.step) for f in flow.findings if f.severity.is_alarm] == [("weight_scale", 8)]
    (action,) = flow.actions
    assert (action.kind, action.outcome) == ("reinit", "kept")
    assert {"tokens", "places"} <= {*action.layers}
    assert np.median(flow.history.losses[-20:]) < 0.5 * np.median(_fit(1.0, "off").history.losses[-20:])


@pytest.mark.parametrize("std", [0.02, 0.125])
def test_tied_tables_of_usual_size_are_left_alone(std):
    assert not [f for f in _fit(std).findings if f.severity.is_alarm]
