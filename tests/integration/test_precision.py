"""Half precision with and without a gradient scaler: what is lost is found, what the scaler does is not."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_gradflow import GradFlow, GradFlowWarning
from tests.benchmarks.zoo import quiet_trainer
from tests.benchmarks.zoo.data import digits


class Classifier(L.LightningModule):
    """A network that learns in fp32, whatever its loss is multiplied by: the learning rate makes up for it."""

    def __init__(self, factor=1.0, layers=4):
        super().__init__()
        hidden = [module for _ in range(layers) for module in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 10))
        for layer in self.net[::2]:
            nn.init.kaiming_normal_(layer.weight)
        self.factor = factor

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y) * self.factor

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=min(0.05 / self.factor, 6e4))  # fp16 ends at 65504


def _fit(model, steps, **kwargs):
    flow = GradFlow(every_n_steps=10, report=False, console=False)
    L.seed_everything(0, verbose=False)
    quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=[flow], **kwargs).fit(model, digits(0))
    return flow


def _vanishing(flow):
    return [(str(f.severity), f.cause) for f in flow.findings if f.kind == "vanishing_gradient"]


def _autocast(**kwargs):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **kwargs))]}


# the gradient runs out on its way to the first layers, or is gone from the loss on
@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("factor", [2e-6, 1e-7])
@pytest.mark.parametrize("kwargs", [{"precision": "16-true"}, _autocast(enabled=False)], ids=["true", "autocast"])
def test_gradients_that_underflow_in_fp16_are_found(factor, kwargs):
    assert [cause for _, cause in _vanishing(_fit(Classifier(factor), 30, **kwargs))][:1] == ["underflow"]


def test_an_underflow_that_lasts_is_an_alarm():
    with pytest.warns(GradFlowWarning, match="fp16"):
        flow = _fit(Classifier(1e-7), 30, precision="16-true")
    assert _vanishing(flow)[-1] == ("critical", "underflow")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("factor", [2e-6, 1e-7])
def test_in_wider_formats_the_same_run_is_healthy(factor, precision):
    assert _vanishing(_fit(Classifier(factor), 30, precision=precision)) == []


@pytest.mark.parametrize("factor", [1.0, 2e-6])
def test_with_a_scaler_the_same_run_is_healthy(factor):
    assert _fit(Classifier(factor), 70, **_autocast(init_scale=2.0**16)).findings == ()


def test_fp16_alone_is_no_finding():
    assert _fit(Classifier(), 70, precision="16-true").findings == ()


@pytest.mark.parametrize("layers", [4, 30])
def test_steps_that_the_scaler_skips_are_counted_and_are_no_explosion(layers):
    flow = _fit(Classifier(layers=layers), 30, **_autocast(init_scale=2.0**30))
    skipped = flow.history.scalar("step_skipped")
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert (flow.history.scalar("grad_norm_total")[skipped == 1] == float("inf")).all()
    assert flow.findings == ()
