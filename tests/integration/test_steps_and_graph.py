"""Learning rates that are far off, and trunks that are cut from the loss, in real trainings."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo.case import quiet_trainer
from tests.benchmarks.zoo.data import digits

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")


class Digits(L.LightningModule):
    def __init__(self, optimize, between=lambda h: h, norm=False):
        super().__init__()
        middle = [nn.BatchNorm1d(32)] if norm else []
        self.trunk = nn.Sequential(nn.Linear(64, 32), *middle, nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimize, self.between = optimize, between

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.between(self.trunk(batch[0]))), batch[1])

    def configure_optimizers(self):
        return self.optimize(self.parameters())


def _flow(module, steps=9):
    L.seed_everything(0, verbose=False)
    flow = GradFlow(console=False, report=False)
    quiet_trainer(max_steps=steps, callbacks=[flow]).fit(module, digits(0))
    return flow


def _of(flow, kind):
    return [(f.severity.value, f.cause, f.step) for f in flow.findings if f.kind == kind]


def _adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def _sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("optimize", [_adam(1e-6), _adam(1e-8), _sgd(1e-5)])
def test_a_rate_that_gets_nowhere_is_told_in_the_third_sample(optimize):
    flow = _flow(Digits(optimize), 60)
    assert _of(flow, "update_ratio") == [("warning", "learning_rate_too_small", 2)]
    assert flow.history.scalar("planned_steps")[-1] == 60


@pytest.mark.parametrize("optimize", [_adam(1.0), _adam(10.0), _sgd(30.0)])
def test_a_rate_that_overwrites_the_weights_is_told_within_four_steps(optimize):
    flow = _flow(Digits(optimize))
    named = [f for f in flow.findings if f.cause == "learning_rate_too_large" and f.severity != "info"]
    assert named
    assert named[0].step <= 4


@pytest.mark.parametrize("optimize", [_adam(1e-3), _adam(1e-2), _sgd(0.5), _sgd(0.01)])
@pytest.mark.parametrize("norm", [False, True])
def test_a_usual_rate_is_left_alone(optimize, norm):
    assert _of(_flow(Digits(optimize, norm=norm), 60), "update_ratio") == []


def test_a_schedule_is_seen():
    def scheduled(parameters):
        optimizer = torch.optim.Adam(parameters, lr=1e-9)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    flow = _flow(Digits(scheduled))
    assert flow.history.scalar("lr_scheduled")[-1] == 1
    assert _of(flow, "update_ratio") == []


@pytest.mark.parametrize(
    "between",
    [lambda h: h.detach(), lambda h: h.data, lambda h: torch.from_numpy(h.detach().numpy()), lambda h: (h > 0).float()],
)
def test_a_trunk_that_is_cut_from_the_loss_is_told_at_the_second_step(between):
    flow = _flow(Digits(_adam(1e-3), between))
    assert _of(flow, "no_gradient") == [("warning", "detached", 1)]
    (finding,) = [f for f in flow.findings if f.kind == "no_gradient"]
    assert finding.layers == ("trunk.0", "trunk.2")


class Teacher(Digits):
    """A trunk that gives targets only, in the graph, and held by the optimizer."""

    def training_step(self, batch, batch_idx):
        target = self.trunk(batch[0]).detach()
        return F.mse_loss(self.head[0](batch[0][:, :32]), target)


class Extractor(Digits):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            features = self.trunk(batch[0])
        return F.cross_entropy(self.head(features), batch[1])


class HeadFirst(Digits):
    """An auxiliary head that runs before the trunk and that the loss does not use."""

    def __init__(self, optimize):
        super().__init__(optimize)
        self.aux = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        self.aux(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Teacher, Extractor, HeadFirst])
def test_layers_that_are_meant_to_get_no_gradient_raise_no_alarm(kind):
    assert _of(_flow(kind(_adam(1e-3))), "no_gradient") == [("info", "unused", 1)]


def test_a_step_that_makes_weights_nan_out_of_finite_gradients_is_named():
    class Broken(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure):
            with torch.enable_grad():
                closure()
            first, *_ = self.param_groups[0]["params"]
            self.state[first]["steps"] = self.state[first].get("steps", 0) + 1
            if self.state[first]["steps"] == 2:
                first.fill_(torch.nan)

    flow = _flow(Digits(lambda parameters: Broken(parameters, {"lr": 0.1})))
    (finding,) = [f for f in flow.findings if f.kind == "nonfinite_gradient"]
    assert (finding.cause, finding.step, finding.layers) == ("optimizer_step", 1, ("trunk.0",))
