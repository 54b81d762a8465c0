"""Real trainings with small gains of norm layers: drawn around 0 they are told of and cured, else they are not."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import flow

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")


class Block(nn.Module):
    def __init__(self, *, post):
        super().__init__()
        self.post, self.norm, self.up, self.down = post, nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        if self.post:
            return x + self.norm(self.down(torch.tanh(self.up(x))))
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(L.LightningModule):
    def __init__(self, gains, *, post=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), *[Block(post=post) for _ in range(4)])
        self.norm = nn.Identity() if post else nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                gains(part.weight)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.head(self.norm(self.net(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def _run(gains, mode="suggest", **kwargs):
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net, callback = Net(gains, **kwargs), flow(mitigate=mode)
    quiet_trainer(max_steps=100, callbacks=[callback]).fit(net, DataLoader(TensorDataset(x, y), 32))
    return net, callback


def _around_zero(gains):
    nn.init.normal_(gains, std=0.02)


def _small(gains):
    nn.init.constant_(gains, 0.01)


def test_gains_that_are_drawn_around_zero_are_told_of():
    _, seen = _run(_around_zero)
    found = [finding for finding in seen.findings if finding.severity.is_alarm]
    assert [(f.kind, f.cause, f.step, len(f.layers)) for f in found] == [("vanishing_gradient", "weight_scale", 2, 5)]
    assert "gains of norm layers were drawn around 0" in found[0].message
    assert "nn.init.ones_" in found[0].suggestions[0].code


def test_and_become_one():
    net, seen = _run(_around_zero, "apply")
    assert [(action.kind, action.step) for action in seen.actions] == [("reinit", 2)]
    assert {"norm", "net.1.norm"} <= set(seen.actions[0].layers)
    assert 0.5 < float(net.norm.weight.detach().mean()) < 2


@pytest.mark.parametrize(
    ("gains", "post"), [(nn.init.ones_, False), (nn.init.ones_, True), (nn.init.zeros_, True), (_small, True)]
)
def test_usual_gains_and_small_ones_at_the_ends_of_branches_are_not_told_of(gains, post):
    _, seen = _run(gains, post=post)
    assert not [f for f in seen.findings if "gain_rms" in f.evidence]
