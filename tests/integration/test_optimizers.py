"""Several optimizers, optimizers that share, and such as only look like one."""

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import data


class Manual(L.LightningModule):
    """Two layers, an optimizer each, stepped after so many batches."""

    def __init__(self, first=1, second=1):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)
        self.periods = (first, second)
        self.norms = []

    def loss(self, batch):
        return self.b(torch.tanh(self.a(batch[0]))).square().mean()

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, period in zip(optimizers, self.periods, strict=False):
            if (batch_idx + 1) % period == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.a, self.b)]


def _flow(interval=1):
    return GradFlow(every_n_steps=interval, mitigate="off", report=False, console=False)


def _fit(module, flow, batches, **kwargs):
    L.seed_everything(0, verbose=False)
    quiet_trainer(max_epochs=1, callbacks=[flow], **kwargs).fit(module, data(batches))
    return flow.history


def _measured(history, layer):
    return history.steps[~np.isnan(history["grad_norm"][:, history.layers.index(layer)])]


@pytest.mark.parametrize("periods", [(1, 5), (4, 8), (2, 3)])
def test_an_optimizer_that_steps_seldom_is_measured_all_the_same(periods):
    history = _fit(Manual(*periods), _flow(20), 160)
    late = history.steps >= 40
    for layer in ("a", "b"):
        assert len(_measured(history, layer)) >= late.sum() // 2
        assert _measured(history, layer)[-1] >= 130


def test_a_step_of_more_batches_than_a_sample_waits_for_is_measured():
    class Rare(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01)]

    history = _fit(Rare(32), _flow(32), 200)
    assert len(_measured(history, "a")) >= 3


def test_in_manual_optimization_nothing_is_said_of_clipping():
    class Clips(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                self.clip_gradients(optimizer, gradient_clip_val=1e-3)
                optimizer.step()
                optimizer.zero_grad()

    history = _fit(Clips(), _flow(), 4)
    assert np.isnan(history.scalar("clip_factor")).all()
    assert np.isnan(history.scalar("clipped_fraction")).all()


def test_deltas_of_each_backward_pass_are_unscaled_by_its_own_scale():
    class TwoPasses(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.manual_backward(self.loss(batch))
                optimizer.step()
                optimizer.zero_grad()

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)  # it doubles with each step
    scaled = _fit(TwoPasses(), _flow(), 3, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    plain = _fit(TwoPasses(), _flow(), 3)
    np.testing.assert_allclose(scaled["delta_norm"], plain["delta_norm"], rtol=2e-2)


def test_a_parameter_that_two_optimizers_share_counts_once():
    class Shares(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    module = Shares()
    weight = math.sqrt(sum(float(p.detach().square().sum()) for p in module.a.parameters()))
    history = _fit(module, _flow(), 1)
    assert history["weight_norm"][0, history.layers.index("a")] == pytest.approx(weight)


class Wrapper(torch.optim.Optimizer):
    """As some wrappers are written: it never calls the constructor of its base."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


def test_under_an_optimizer_without_hooks_only_the_update_is_missing():
    class Wrapped(Manual):
        def configure_optimizers(self):
            return [Wrapper(optimizer) for optimizer in super().configure_optimizers()]

    history = _fit(Wrapped(), _flow(), 2)
    assert np.isfinite(history["grad_norm"]).all()
    assert np.isnan(history["update_norm"]).all()


def test_a_lazy_layer_that_never_runs_is_missing():
    class Lazy(Manual):
        def __init__(self):
            super().__init__()
            self.never = nn.LazyLinear(3)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01), torch.optim.SGD(self.b.parameters(), lr=0.01)]

    history = _fit(Lazy(), _flow(), 2)
    assert np.isnan(history["grad_norm"][:, history.layers.index("never")]).all()
    assert np.isfinite(history["grad_norm"][:, history.layers.index("a")]).all()


class DeepGAN(L.LightningModule):
    """A generator of 30 sigmoid layers beside a sound discriminator, updated every third batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        deep = [module for _ in range(30) for module in (nn.Linear(4, 4), nn.Sigmoid())]
        self.generator = nn.Sequential(*deep, nn.Linear(4, 4))
        self.judge = nn.Sequential(
            nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )

    def training_step(self, batch, batch_idx):
        of_generator, of_judge = self.optimizers()
        x = batch[0]
        self.manual_backward(
            self.judge(self.generator(x.flip(0)).detach()).square().mean() + (self.judge(x) - 1).square().mean()
        )
        of_judge.step()
        of_judge.zero_grad()
        if batch_idx % 3 == 2:
            self.manual_backward((self.judge(self.generator(x.flip(0))) - 1).square().mean())
            of_generator.step()
            of_generator.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.judge)]


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_a_network_that_vanishes_is_named_beside_one_that_steps_more_often_and_stays_so():
    flow = _flow(10)
    _fit(DeepGAN(), flow, 120)
    (finding,) = [finding for finding in flow.findings if finding.kind == "vanishing_gradient"]
    assert finding.layers[0] == "generator.0"
    assert finding.step <= 5
    assert finding.resolved_step is None


def test_a_row_of_several_batches_is_logged_at_the_last_one_of_them(tmp_path):
    flow = _flow(4)
    history = _fit(Manual(4, 4), flow, 12, logger=CSVLogger(tmp_path, version=0, flush_logs_every_n_steps=1))
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["gradflow/grad_norm_total"]]
    assert logged == [step + 3 for step in history.steps if step % 4 == 0]
