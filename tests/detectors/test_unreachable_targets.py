"""Targets beyond the bounds of what gives the outputs: each condition from both sides, and in real runs."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.unreachable_targets import UnreachableTargets
from lightning_gradflow.history import History, Row
from tests.benchmarks.zoo import quiet_trainer
from tests.detectors.runs import verdict

nan = math.nan


def told(*rows):
    history = History()
    for step, (beyond, error, *deviation) in enumerate(rows):
        scalars = {"targets_beyond": beyond, "residual_rms": error, "target_deviation": (*deviation, 1.0)[0]}
        history.append(Row(step, scalars=scalars))
    return verdict(UnreachableTargets().judge(history))


FOUND = [("warning", "unreachable_targets", ())]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.21, 1.0)] * 3, FOUND),
        ([(0.21, 1.0)] * 2, []),  # one batch tells little
        ([(0.19, 1.0)] * 3, []),
        ([(nan, 1.0)] * 3, []),
        ([(0.5, 29.0)] * 3, FOUND),
        ([(0.5, 31.0)] * 3, []),  # the size of the targets is a finding of its own
        ([(0.6, 1.0), (0.0, 1.0), (0.03, 1.0)], FOUND),
        ([(0.6, 1.0), (0.0, 1.0), (nan, 1.0)], []),
        ([(0.6, 1.0), (0.6, 1.0), (0.01, 1.0, 3.0)], []),  # what most of the variance is made of is within reach
        ([(0.6, 1.0), (0.6, 1.0), (0.01, 1.0, 2.0)], FOUND),
        ([(0.5, 1.0), (0.5, 1.0), (nan, nan), (0.5, 1.0)], FOUND),  # a loss that is left out of some steps
        ([(nan, nan), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], []),
    ],
)
def test_the_table(rows, expected):
    assert told(*rows) == expected


def test_no_rows_tell_nothing():
    assert told() == []


@pytest.mark.parametrize("limit", [0.0, 1.0, nan])
def test_a_limit_out_of_its_range_is_refused(limit):
    with pytest.raises(ValueError, match="max_beyond must be in"):
        UnreachableTargets(limit)


def test_the_limit_is_used():
    history = History()
    for step in range(3):
        history.append(Row(step, scalars={"targets_beyond": 0.5, "target_deviation": 1.0, "residual_rms": 1.0}))
    assert UnreachableTargets(0.6).judge(history) == []


class Net(L.LightningModule):
    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1), end)

    def training_step(self, batch, i):
        x, y = batch
        return nn.functional.mse_loss(self.net(x)[:, 0], y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def causes(end, squeeze):
    flow = GradFlow(report=False, console=False)
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    trainer = quiet_trainer(max_epochs=4, callbacks=[flow])
    trainer.fit(Net(end), DataLoader(TensorDataset(x, squeeze(x[:, 0] + x[:, 1])), 32))
    return [finding.cause for finding in flow.findings if finding.severity.is_alarm]


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("end", [nn.ReLU(), nn.Sigmoid(), nn.Softplus()])
def test_an_activation_too_many_is_told(end):
    assert causes(end, lambda y: y) == ["unreachable_targets"]


@pytest.mark.parametrize(
    ("end", "squeeze"), [(nn.Identity(), lambda y: y), (nn.Sigmoid(), torch.sigmoid), (nn.ReLU(), torch.relu)]
)
def test_one_that_gives_what_is_asked_for_is_not(end, squeeze):
    assert causes(end, squeeze) == []
