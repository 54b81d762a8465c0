"""Whatever comes in, training goes on as it would without us, and one clear warning says what is off."""

import contextlib
import math
import signal
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

from lightning_gradflow import (
    GradFlow,
    GradFlowWarning,
)
from tests.benchmarks.zoo import quiet_trainer
from tests.benchmarks.zoo.data import digits
from tests.benchmarks.zoo.stacks import mlp

STEPS = 12


class Plain(L.LightningModule):
    """A small classifier; what is bad about it is overridden."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, nn.Tanh, width=16)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class NoParameters(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Flatten()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean().requires_grad_()

    def configure_optimizers(self):
        return None


class NoActivations(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 10))


class AllFrozen(Plain):
    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).requires_grad_()


class AlwaysNone(Plain):
    def training_step(self, batch, batch_idx):
        self.net(batch[0])


class SometimesNone(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


class NanAtFirst(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step == 0 else loss


class BatchSizeZero(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0][:0]).sum() if batch_idx == 1 else super().training_step(batch, batch_idx)


class Fails(Plain):
    """Raises in the middle of the fourth step."""

    error, where = RuntimeError, "forward"

    def __init__(self):
        super().__init__()
        self.net.insert(3, Bomb(self))


class Bomb(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, x):
        owner = self.owner[0]
        if owner.global_step < 3:
            return x
        if owner.where == "forward":
            raise owner.error("mine")
        return Detonates.apply(x, owner.error)


class Detonates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error("mine")


def _flow(**kwargs):
    return GradFlow(**{"every_n_steps": 1, "report": False, "console": False, **kwargs})


def _fit(make, callbacks=(), **kwargs):
    """The trained module, and the warnings of ours."""
    L.seed_everything(0, verbose=False)
    module = make()
    trainer = quiet_trainer(**{"max_steps": STEPS, "max_epochs": 1, "callbacks": list(callbacks), **kwargs})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, digits(0))
    return module, [str(warning.message) for warning in told if issubclass(warning.category, GradFlowWarning)]


def _nothing_is_left(module):
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    assert not any(p._backward_hooks for p in module.parameters())
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not _get_current_function_mode_stack()


def _same_as_alone(make, flow, **kwargs):
    """Trains with and without us; the same weights must come out. Returns our warnings."""
    alone, _ = _fit(make)
    watched, told = _fit(make, [flow], **kwargs)
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight.nan_to_num(7.0), watched.state_dict()[name].nan_to_num(7.0))
    assert all(map(torch.equal, map(torch.isnan, alone.parameters()), map(torch.isnan, watched.parameters())))
    _nothing_is_left(watched)
    return told


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("make", [NoParameters, AllFrozen])
def test_a_model_without_trainable_parameters_is_told_once(make):
    (told,) = _same_as_alone(make, _flow())
    assert "no trainable parameters" in told


def test_a_model_without_activations_is_watched_like_any_other():
    flow = _flow()
    assert _same_as_alone(NoActivations, flow) == []
    assert len(flow.history) == STEPS


def test_a_training_step_that_always_returns_none_is_told_once():
    flow = _flow()
    (told,) = _same_as_alone(AlwaysNone, flow, max_steps=20)
    assert "no backward pass" in told
    assert len(flow.history) == 0


def test_a_step_that_returns_none_makes_way_for_the_next():
    flow = _flow()
    assert _same_as_alone(SometimesNone, flow) == []
    assert len(flow.history) >= STEPS // 2


def test_a_nan_loss_at_step_0_is_a_finding_and_no_error():
    flow = _flow()
    told = _same_as_alone(NanAtFirst, flow)
    assert flow.findings[0].kind == "nonfinite_gradient"
    assert flow.findings[0].step == 0
    assert sum("step 0" in text for text in told) == 1


def test_an_empty_batch_is_a_step_like_any_other():
    flow = _flow()
    assert _same_as_alone(BatchSizeZero, flow) == []
    assert len(flow.history) == STEPS


class BrokenLogger(CSVLogger):
    """The disk is full, for what we log."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("gradflow") for name in metrics):
            raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.usefixtures("errors_inside_the_monitor_are_caught")
def test_a_logger_that_raises_is_told_once_and_the_rest_goes_on(tmp_path):
    flow = _flow()
    (told,) = _same_as_alone(Plain, flow, logger=BrokenLogger(tmp_path))
    assert "output to" in told
    assert "No space left on device" in told
    assert len(flow.history) == STEPS


@pytest.mark.usefixtures("errors_inside_the_monitor_are_caught")
def test_a_report_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    flow = _flow(report=True)
    (told,) = _same_as_alone(Plain, flow, default_root_dir=tmp_path / "file" / "below")
    assert "output to report is switched off" in told


@pytest.mark.usefixtures("errors_inside_the_monitor_are_caught")
def test_a_full_disk_leaves_no_half_a_report(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    flow = _flow(report=True)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    (told,) = _same_as_alone(Plain, flow, default_root_dir=tmp_path)
    assert "No space left on device" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_of_the_user_arrives_as_it_was_and_nothing_is_left(where):
    def make():
        module = Fails()
        module.where = where
        made.append(module)
        return module

    made, flow = [], _flow()
    with pytest.raises(RuntimeError, match="mine"):
        _fit(make, [flow])
    _nothing_is_left(made[0])
    assert len(flow.history) == 3


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ctrl_c_ends_the_run_and_nothing_is_left(where):
    def make():
        module = Fails()
        module.where, module.error = where, KeyboardInterrupt
        made.append(module)
        return module

    made, flow = [], _flow()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            _fit(make, [flow])
    finally:
        signal.signal(signal.SIGINT, handler)
    _nothing_is_left(made[0])
    assert len(flow.history) == 3


def test_an_interrupted_run_still_gets_its_report(tmp_path):
    flow = _flow(report=True)
    with pytest.raises(RuntimeError, match="mine"):
        _fit(Fails, [flow], default_root_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gradflow_report.html"]


OURS = {
    "in forward": "lightning_gradflow.probes.gathering.saturated",
    "in forward and backward": "lightning_gradflow.probes.gathering._waits",
    "at the optimizer": "lightning_gradflow.probes.gradients._exponents",
    "in the observer": "lightning_gradflow.probes.observer.first_tensor",
    "at the layers": "lightning_gradflow.probes.layers.LayerMap.is_layer",
    "at the start": "lightning_gradflow.callbacks.session.Sampler",
    "at the end of a step": "lightning_gradflow.probes.transfer.Transfer.fetch",
    "at the batch start": "lightning_gradflow.probes.observer.register_module_forward_hook",
}


@pytest.mark.usefixtures("errors_inside_the_monitor_are_caught")
@pytest.mark.parametrize("place", OURS)
def test_an_error_of_ours_does_not_reach_the_training(place, monkeypatch):
    def breaks(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(OURS[place], breaks)
    (told,) = _same_as_alone(Plain, _flow())
    assert "the monitor is switched off (ZeroDivisionError: ours)" in told


@pytest.mark.usefixtures("errors_inside_the_monitor_are_caught")
def test_a_detector_that_raises_is_switched_off_alone(monkeypatch):
    def breaks(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lightning_gradflow.detectors.vanishing.VanishingGradient.judge", breaks)
    flow = _flow()
    (told,) = _same_as_alone(Plain, flow)
    assert "detector VanishingGradient is switched off" in told
    assert len(flow.history) == STEPS


@pytest.fixture
def errors_inside_the_monitor_are_caught(monkeypatch):
    monkeypatch.delenv("LIGHTNING_GRADFLOW_RAISE", raising=False)
