"""Saturation, dead units and unscaled inputs on small real trainings, with the training that lacks the fault beside."""

import logging

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_wine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradNormLogger, SaturationMonitor
from tests.benchmarks.zoo.case import quiet_trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Task(L.LightningModule):
    """A classifier under SGD whose learning rate is 1000 times as large in some steps."""

    def __init__(self, net, spike=range(0)):
        super().__init__()
        self.net = net
        self.spike = spike

    def training_step(self, batch, _):
        (optimizer,) = self.trainer.optimizers
        optimizer.param_groups[0]["lr"] = 50.0 if self.global_step in self.spike else 0.05
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def mlp(act, inputs=64, outputs=10, bias=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(inputs, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, outputs)
    )
    net[2].bias.data += bias
    return net


def digits(scale=1.0):
    x, y = load_digits(return_X_y=True)
    return scale * torch.tensor(x / 8 - 1, dtype=torch.float32)[:1504], torch.tensor(y)[:1504]


def wine(standardise):
    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0) if standardise else x
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def findings(net, data, steps=4, spike=range(0)):
    """What is told in a run that samples the steps 0, 1, 2, 4, 8, and every 10th."""
    torch.manual_seed(0)
    monitor = SaturationMonitor(every_n_steps=10)
    loader = DataLoader(TensorDataset(*data), batch_size=32, shuffle=True, drop_last=True)
    norms = GradNormLogger(every_n_steps=10)
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=[monitor, norms])
    with torch.random.fork_rng():
        trainer.fit(Task(net, spike), loader)
    return [f for f in monitor.findings if f.severity.is_alarm and f.kind in ("dead_units", "saturated_activation")]


pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_gradflow.GradFlowWarning", "ignore:.*does not have many workers:UserWarning"
)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_unscaled_inputs_are_named_by_index_at_step_2_and_scaled_ones_are_well(act):
    assert findings(mlp(act, 13, 3), wine(standardise=True), steps=30) == []
    (finding,) = findings(mlp(act, 13, 3), wine(standardise=False))
    assert (finding.step, finding.cause) == (2, "unscaled_inputs")
    assert finding.kind == ("dead_units" if act is nn.ReLU else "saturated_activation")
    assert next(key for key in finding.evidence if key.startswith("feature_")) == "feature_12"  # proline, about 750
    assert "12 (rms" in finding.message


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_a_normalisation_before_the_first_layer_makes_raw_inputs_harmless(act):
    assert findings(nn.Sequential(nn.BatchNorm1d(13), *mlp(act, 13, 3)), wine(standardise=False), steps=30) == []


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_a_dead_layer_among_live_ones_is_named_at_step_2(act):
    (finding,) = findings(mlp(act, bias=-8.0), digits())
    assert (finding.step, finding.kind, finding.cause) == (2, "dead_units", "initialisation")
    assert finding.layers[0] == "net.3"


def test_weights_that_are_too_large_saturate_all_layers_from_the_start():
    net = mlp(nn.Tanh)
    for layer in net[::2]:
        layer.weight.data *= 30
    (finding,) = findings(net, digits())
    assert (finding.step, finding.kind, finding.cause) == (2, "saturated_activation", "weight_scale")


@pytest.mark.parametrize(
    ("act", "kind", "cause"),
    [
        (nn.ReLU, "dead_units", "learning_rate_too_large"),
        (nn.Tanh, "saturated_activation", "drift"),
    ],
)
def test_a_late_spike_of_the_learning_rate_is_named_in_the_next_sample(act, kind, cause):
    assert findings(mlp(act), digits(), steps=150) == []
    finding = findings(mlp(act), digits(), steps=150, spike=range(121, 126))[0]
    assert (finding.step, finding.kind, finding.cause) == (130, kind, cause)


class HandWrittenLSTM(nn.Module):
    """With a forget gate that starts wide open, for long memories."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.x, self.h, self.out = nn.Linear(8, 128), nn.Linear(32, 128), nn.Linear(32, 10)
        self.h.bias.data[32:64] = 7.0

    def forward(self, x):
        h = c = x.new_zeros(len(x), 32)
        for row in x.view(-1, 8, 8).unbind(1):
            i, f, g, o = (self.x(row) + self.h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


class Highway(nn.Module):
    """With gates that start all but shut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.candidate, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.gate.bias.data -= 8.0

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return self.out(gate * torch.relu(self.candidate(x)) + (1 - gate) * x)


@pytest.mark.parametrize("net", [HandWrittenLSTM, Highway])
def test_gates_that_saturate_by_design_are_well(net):
    assert findings(net(), digits(), steps=8) == []


def test_the_first_sample_of_a_window_tells_nothing_yet():
    assert findings(mlp(nn.ReLU, bias=-8.0), digits(), steps=2) == []
