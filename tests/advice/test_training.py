"""After a suggestion is carried out, a real training of the same length learns, and the finding is gone."""

from functools import cache

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_gradflow import GradFlow
from tests.advice.test_recurrent import transformer
from tests.benchmarks.zoo import SICK, quiet_trainer
from tests.benchmarks.zoo.task import Task

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")  # the sick ones are to be found


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def trained(name, code=None):
    """What GradFlow found, and the mean loss at the start and at the end."""

    def build(seed):
        module = SICK[name].build(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            exec(code or "", {"self": module})
        return module

    flow, losses = GradFlow(every_n_steps=5, report=False, console=False), Losses()
    SICK[name].fit(0, build=build, callbacks=[flow, losses])
    return flow.findings, float(np.mean(losses.values[:3])), float(np.mean(losses.values[-20:]))


sick = cache(trained)


@pytest.mark.parametrize(
    ("name", "kind", "title"),
    [
        ("sigmoid_10", "vanishing_gradient", "ReLU"),
        ("sigmoid_10", "vanishing_gradient", "BatchNorm"),
        ("sigmoid_10", "vanishing_gradient", "residual"),
        ("sigmoid_10", "vanishing_gradient", "highway"),
        ("tanh_3_std_3", "saturated_activation", "orthogonal"),
        ("dead_biases_all", "dead_units", "these layers by He's"),
        ("dead_biases_all", "dead_units", "LeakyReLU"),
        ("relu_wine_one_column_sgd", "exploding_gradient", "feature 5"),
        ("rnn_tanh_40", "vanishing_gradient", "orthogonally"),
    ],
)
def test_a_cure_cures(name, kind, title):
    findings, start, sick_end = sick(name)
    alarm = next(finding for finding in findings if finding.kind == kind and finding.severity.is_alarm)
    (cure,) = [suggestion for suggestion in alarm.suggestions if title in suggestion.title]
    after, _, end = trained(name, cure.code)
    assert kind not in {finding.kind for finding in after if finding.severity.is_alarm}
    assert end < 0.6 * min(start, sick_end)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_order_of_a_real_transformer_tells_where_it_normalises(norm_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformer(norm_first)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    flow = GradFlow(every_n_steps=1, report=False, console=False)
    module = Task(Net(), lambda parameters: torch.optim.SGD(parameters, lr=1e6))
    data = torch.utils.data.DataLoader([(torch.randn(5, 16), i % 3) for i in range(32)], batch_size=8)
    quiet_trainer(max_steps=12, callbacks=[flow]).fit(module, data)
    alarms = [finding for finding in flow.findings if finding.severity.is_alarm]
    offered = {cure.code for alarm in alarms for cure in alarm.suggestions if "Pre-LN" in cure.title}
    assert alarms
    assert bool(offered) != norm_first
    for code in offered:
        exec(code, {"self": module})
        assert all(block.norm_first for block in module.net.encoder.layers)
