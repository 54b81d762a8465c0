"""Real trainings in which weights start from zero: one factor of a product at a time is well, two are not."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import flow

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")


class Adapted(nn.Module):
    def __init__(self, base, *, both):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(4, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 4))
        if not both:
            nn.init.normal_(self.down, std=base.in_features**-0.5)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Product(nn.Module):
    def __init__(self, *zero):
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        for name in zero:
            nn.init.zeros_(getattr(self, name).weight)
            nn.init.zeros_(getattr(self, name).bias)

    def forward(self, x):
        return F.pad((self.left(x) * self.right(x)).sum(1, keepdim=True), (0, 1))


class Clamped(nn.Sequential):
    def __init__(self, sign):
        super().__init__(nn.Linear(8, 32), nn.Linear(32, 2))
        self[0].weight.data = sign * self[0].weight.data.abs()
        nn.init.zeros_(self[0].bias)

    def forward(self, x):
        return self[1](self[0](x.abs()).clamp(min=0))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.end = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.end(self.wide(x).relu())


def _branches():
    """All weights are zero, and all biases in the branches: the first layer comes free, by next to nothing."""
    net = nn.Sequential(nn.Linear(8, 32), *(Branch() for _ in range(8)), nn.ReLU(), nn.Linear(32, 2))
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 or "." in name.removesuffix(".bias"):
            nn.init.zeros_(parameter)
    return net


def _norm(zero, act):
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), act, nn.Linear(32, 2))
    if zero:
        nn.init.zeros_(net[1].weight)
    return net


def _zeros(*which):
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    for i in which:
        nn.init.zeros_(net[i].weight)
        nn.init.zeros_(net[i].bias)
    return net


def _adapters(both):
    return nn.Sequential(Adapted(nn.Linear(8, 32), both=both), nn.Tanh(), Adapted(nn.Linear(32, 2), both=both))


SICK = {
    "all zero": (lambda: _zeros(0, 2, 4), {"net.0", "net.2"}, {"net.4"}),
    "branches": (_branches, {"net.0", *(f"net.{i}.wide" for i in range(1, 9))}, {"net.10"}),
    "the last two": (lambda: _zeros(2, 4), {"net.2"}, {"net.0", "net.4"}),
    "adapters": (lambda: _adapters(True), {"net.0", "net.2"}, {"net.0.base", "net.2.base"}),
    "both factors": (lambda: Product("left", "right"), {"net.left", "net.right"}, set()),
    "a scale before a relu": (lambda: _norm(True, nn.ReLU()), {"net.1"}, {"net.0", "net.3"}),
}
HEALTHY = {
    "a head": lambda: _zeros(4),
    "the first layer": lambda: _zeros(0),
    "adapters": lambda: _adapters(False),
    "one factor": lambda: Product("left"),
    "a scale before a gelu": lambda: _norm(True, nn.GELU()),
    "a scale before a relu": lambda: _norm(False, nn.ReLU()),
}


class Learner(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.losses = net, []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=5e-3)


def _trained(net, *callbacks, steps=120):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=generator)
    learner = Learner(net)
    quiet_trainer(max_steps=steps, callbacks=list(callbacks)).fit(learner, loader)
    return learner


def _net(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("name", SICK)
def test_what_is_zero_for_good_is_found_at_once_and_drawn_and_nothing_else(name):
    make, drawn, kept = SICK[name]
    monitor = flow(every_n_steps=10, mitigate="apply")
    learner = _trained(_net(make), monitor)
    alarm = next(finding for finding in monitor.findings if finding.severity.is_alarm)
    # where some come free with the first step, the others are looked at from then on
    assert (alarm.kind, alarm.cause, alarm.step) == ("no_gradient", "initialisation", 4 if name == "branches" else 2)
    action = monitor.actions[0]
    assert (action.kind, action.step, set(action.layers)) == ("reinit", alarm.step, drawn)
    assert not set(action.layers) & kept
    assert sum(learner.losses[-8:]) / 8 < 0.9 * learner.losses[0]
    assert not any(finding.is_open for finding in monitor.findings if finding.kind == "no_gradient")


@pytest.mark.parametrize("name", HEALTHY)
def test_what_comes_free_by_itself_is_left_alone(name):
    monitor = flow(every_n_steps=10, mitigate="apply")
    watched, plain = _trained(_net(HEALTHY[name]), monitor), _trained(_net(HEALTHY[name]))
    assert not any(finding.severity.is_alarm for finding in monitor.findings)
    assert monitor.actions == ()
    assert watched.losses == plain.losses


def test_a_relu_that_is_written_as_a_clamp_dies_like_any_other():
    monitor = flow(every_n_steps=10)
    _trained(_net(lambda: Clamped(-1)), monitor, steps=20)
    assert [(f.kind, f.cause) for f in monitor.findings if f.severity.is_alarm] == [("dead_units", "initialisation")]
    monitor = flow(every_n_steps=10)
    _trained(_net(lambda: Clamped(1)), monitor, steps=20)
    assert not any(f.severity.is_alarm for f in monitor.findings)
