"""Weights that share a mean, and a run that gets nowhere with them: each condition from both sides, and real runs."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.alike_units import AlikeUnits
from lightning_gradflow.history import History, Row
from tests.benchmarks.zoo import quiet_trainer
from tests.detectors.runs import stack, verdict

nan = math.nan
FAR = {"score_deviation": 9.0, "score_classes": 10.0}
FALLING = np.linspace(3.0, 2.9, 101)


def run(spreads=(0.6, 0.6, 0.6, 1.2), losses=FALLING, newest=None, left=0.9, ratio=1e-3, **scalars):
    """`newest` is what `spreads` have become."""
    history, points = History(), stack(len(spreads))
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    last = -1
    for step in range(0, len(losses), 4):
        now = np.array(spreads if step == 0 or newest is None else newest, dtype=float)
        # as it is measured: of those that were alike
        values = {"unit_spread": now if step == 0 else np.where(np.array(spreads) < 0.9, now, nan)}
        values |= {"delta_norm": np.full(len(spreads), left if step else 1.0)}
        values |= {"update_ratio": np.full(len(spreads), ratio)}
        history.append(Row(step, values, {"planned_steps": 400.0, **scalars}, losses=losses[last + 1 : step + 1]))
        last = step
    return history


def told(**changes):
    return verdict(AlikeUnits().judge(run(**changes)))


FOUND = [("warning", "symmetry", ("fc0", "fc1", "fc2"))]


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({}, {"left": 0.4}),  # something was learnt
        ({}, {"losses": FALLING[:70]}),  # too early to say
        ({}, {"losses": np.geomspace(3.0, 0.1, 101)}),
        ({}, {"optimizers": 2.0}),
        ({}, {"score_classes": 50.0}),  # better than chance
        ({"newest": (0.7, 0.7, 0.7, nan)}, {"newest": (1.2, 1.2, 1.2, nan)}),  # they were drawn anew, or learnt
        ({"spreads": (0.79, 0.79, 0.79, 1.2)}, {"spreads": (0.81, 0.81, 0.81, 1.2)}),
        ({"spreads": (0.11, 0.11, 0.11, 1.2)}, {"spreads": (0.09, 0.09, 0.09, 1.2)}),  # copies: a finding of their own
        ({"spreads": (0.6, 0.6, 0.6, 1.2, 1.2)}, {"spreads": (0.6, 0.6, 0.6, 1.2, 1.2, 1.2)}),  # most of them
        ({"spreads": (0.6, 0.6, 0.6, nan, nan, nan)}, {"spreads": (0.6, nan, nan)}),  # two at least
    ],
)
def test_each_condition_from_both_sides(sick, well):
    assert told(**sick) == FOUND
    assert told(**well) == []


@pytest.mark.parametrize(("steps", "is_found"), [(9, True), (8, False)])
def test_outputs_that_are_far_off_need_no_time(steps, is_found):
    losses = np.full(steps, 12.0)
    assert told(losses=losses, **FAR) == FOUND * is_found
    assert told(losses=losses) == []
    assert told(losses=losses, ratio=1.01e-2, **FAR) == []  # the way back is short
    assert told(losses=losses, **{**FAR, "planned_steps": nan}) == []


def test_the_evidence_is_how_far_units_differ():
    assert AlikeUnits().judge(run())[0].evidence["unit_spread"] == pytest.approx(0.6)


def test_no_rows_tell_nothing():
    assert AlikeUnits().judge(History()) == []


@pytest.mark.parametrize("limit", [0.0, 1.2, nan])
def test_a_limit_out_of_its_range_is_refused(limit):
    with pytest.raises(ValueError, match="min_spread must be in"):
        AlikeUnits(limit)


def test_the_limit_is_used():
    assert AlikeUnits(0.5).judge(run()) == []


class Encoder(L.LightningModule):
    """A post-norm transformer that puts tokens into reverse order."""

    def __init__(self, is_positive):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(12, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.at, self.head = nn.Parameter(torch.randn(8, 32)), nn.Linear(32, 12)
        for parameter in (*self.encoder.parameters(), self.head.weight):
            if parameter.dim() > 1 and is_positive:
                nn.init.uniform_(parameter)

    def training_step(self, batch, i):
        (x,) = batch
        scores = self.head(self.encoder(self.embed(x) + self.at))
        return nn.functional.cross_entropy(scores.flatten(0, 1), x.flip(1).flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def fitted(is_positive, mitigate):
    flow = GradFlow(mitigate=mitigate, report=False, console=False)
    net = Encoder(is_positive)
    trainer = quiet_trainer(max_steps=400, callbacks=[flow])
    x = torch.randint(12, (256, 8), generator=torch.Generator().manual_seed(0))
    trainer.fit(net, DataLoader(TensorDataset(x), 32))
    return flow


def test_a_transformer_with_usual_weights_is_not_told_of():
    flow = fitted(is_positive=False, mitigate="off")
    assert [f for f in flow.findings if f.severity.is_alarm] == []
    assert flow.history.losses[-1] < 0.1


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_one_with_positive_weights_is_cured():
    assert fitted(is_positive=True, mitigate="off").history.losses[-1] > 0.5
    flow = fitted(is_positive=True, mitigate="apply")
    (finding,) = [f for f in flow.findings if f.severity.is_alarm]
    assert (str(finding.kind), finding.cause) == ("loss_plateau", "symmetry")
    assert [(action.kind, str(action.outcome)) for action in flow.actions] == [("reinit", "kept")]
    assert "encoder.layers.0.self_attn" in flow.actions[0].layers
    assert flow.history.losses[-1] < 0.1
