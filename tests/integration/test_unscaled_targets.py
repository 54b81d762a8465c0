"""A regression on raw targets, cured in the run."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow

MEAN, DEVIATION = 210_000.0, 80_000.0


class Prices(LightningModule):
    def __init__(self, make, in_thousands=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.make = make

    def training_step(self, batch, _):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def _data(standardised=False, unit=(MEAN, DEVIATION)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 4, generator=generator)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, y if standardised else unit[0] + unit[1] * y


def _fit(tmp_path, make, mitigate, standardised=False, steps=400, unit=(MEAN, DEVIATION), bias=0.0, size=1.0):
    x, y = _data(standardised, unit)
    x = x if size == 1 else size * (x + 3)
    torch.manual_seed(0)
    flow = GradFlow(every_n_steps=10, report=False, console=False, mitigate=mitigate)
    model = Prices(make)
    torch.nn.init.constant_(model.net[-1].bias, bias)
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[flow],
    ).fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    with torch.no_grad():
        left = float(F.mse_loss(model.net(x), y) / y.var())
    return flow, left


def _alarms(flow):
    return [(str(f.kind), f.cause, f.layers) for f in flow.findings if f.severity.is_alarm]


MAKES = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("name", MAKES)
def test_raw_targets_are_told_and_cured(tmp_path, name):
    flow, left = _fit(tmp_path, MAKES[name], "suggest")
    assert ("loss_mismatch", "unscaled_targets", ("net.4",)) in _alarms(flow)
    assert not left < 0.7
    flow, cured = _fit(tmp_path, MAKES[name], "apply")
    _, twin = _fit(tmp_path, MAKES[name], "off", standardised=True)
    assert any(a.kind == "reinit" and a.layers == ("net.4",) and a.outcome == "kept" for a in flow.actions)
    assert cured < twin + 0.2 * (1 - twin)


@pytest.mark.parametrize("name", MAKES)
def test_standardised_targets_are_left_in_peace(tmp_path, name):
    flow, left = _fit(tmp_path, MAKES[name], "apply", standardised=True)
    assert _alarms(flow) == []
    assert flow.actions == ()
    assert left < 0.5


KELVIN = (293.0, 8.0)


def _slow(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_targets_with_an_offset_are_told_and_cured(tmp_path):
    flow, left = _fit(tmp_path, _slow, "suggest", unit=KELVIN)
    assert ("loss_mismatch", "unscaled_targets", ("net.4",)) in _alarms(flow)
    assert left > 2
    flow, cured = _fit(tmp_path, _slow, "apply", unit=KELVIN)
    _, twin = _fit(tmp_path, _slow, "off", standardised=True)
    assert [(a.kind, a.outcome) for a in flow.actions] == [("reinit", "kept")]
    assert cured < twin + 0.2 * (1 - twin)


def test_an_output_that_starts_at_the_offset_is_left_in_peace(tmp_path):
    flow, left = _fit(tmp_path, MAKES["adam"], "apply", unit=KELVIN, bias=KELVIN[0])
    assert _alarms(flow) == []
    assert flow.actions == ()
    assert left < 0.5


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("name", MAKES)
def test_raw_inputs_and_raw_targets_are_cured_together(tmp_path, name):
    """By the loss nobody could see what scaled inputs are worth while the targets are all of it."""
    flow, cured = _fit(tmp_path, MAKES[name], "apply", size=5000.0)
    _, twin = _fit(tmp_path, MAKES[name], "off", standardised=True)
    assert {a.kind for a in flow.actions if a.outcome == "kept"} == {"scale_inputs"}
    assert cured < twin + 0.2 * (1 - twin)
