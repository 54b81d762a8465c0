"""Fits that start, stop, die, go on and are copied."""

import contextlib
import copy
import gc
import math
import pickle
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.overrides import _get_current_function_mode_stack

from lightning_gradflow import GradFlow, GradFlowWarning, PlateauDetector, VanishingGradientWarning
from tests.benchmarks.zoo import HEALTHY, SICK, quiet_trainer

RESUMED = "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"


def _flow(**kwargs):
    return GradFlow(**{"every_n_steps": 5, "report": False, "console": False, **kwargs})


def _data(case="tanh_4_default_init"):
    return (HEALTHY | SICK)[case].data(0)


def _fit(flow, steps, case="tanh_4_default_init", ckpt=None, **kwargs):
    L.seed_everything(0)
    model = (HEALTHY | SICK)[case].build(0)
    trainer = quiet_trainer(**{"max_steps": steps, "callbacks": [flow], "max_epochs": -1, **kwargs})
    trainer.fit(model, _data(case), ckpt_path=ckpt)
    return trainer


@pytest.mark.filterwarnings(RESUMED)
def test_a_resumed_run_continues_its_history(tmp_path):
    whole = _flow()
    _fit(whole, 40)
    first, second = _flow(), _flow()
    _fit(first, 21).save_checkpoint(tmp_path / "half.ckpt")
    _fit(second, 40, ckpt=tmp_path / "half.ckpt")
    assert second.history.steps.tolist() == whole.history.steps.tolist()
    assert second.history.layers == whole.history.layers
    before = whole.history.steps <= 20
    np.testing.assert_array_equal(second.history["grad_norm"][before], whole.history["grad_norm"][before])


def test_a_checkpoint_of_a_run_with_findings_loads_with_weights_only(tmp_path):
    with pytest.warns(VanishingGradientWarning):
        trainer = _fit(_flow(), 12, case="sigmoid_30")
    trainer.save_checkpoint(tmp_path / "sick.ckpt")
    state = torch.load(tmp_path / "sick.ckpt", weights_only=True)
    assert state["callbacks"]["GradFlow"]["recorder"]["ledger"]["findings"]


@pytest.mark.filterwarnings(RESUMED)
def test_a_resumed_run_does_not_tell_a_finding_again(tmp_path):
    with pytest.warns(VanishingGradientWarning):
        _fit(_flow(), 12, case="sigmoid_30").save_checkpoint(tmp_path / "sick.ckpt")
    again = _flow()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradFlowWarning)
        _fit(again, 30, case="sigmoid_30", ckpt=tmp_path / "sick.ckpt")
    assert [finding.step for finding in again.findings] == [0]


def test_a_second_fit_with_another_trainer_starts_a_new_history():
    flow = _flow()
    _fit(flow, 12)
    _fit(flow, 7)
    assert flow.history.steps.tolist() == [0, 1, 2, 4, 5]
    assert len(flow.history.losses) == 7  # those after the last sample are not lost


def test_a_second_fit_of_the_same_trainer_goes_on():
    flow = _flow()
    trainer = _fit(flow, 12)
    trainer.fit_loop.epoch_loop.max_steps = 22
    trainer.fit(trainer.lightning_module, _data())
    assert flow.history.steps[-1] > 15
    assert (np.diff(flow.history.steps) > 0).all()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_a_copy_is_a_callback_without_a_run(make):
    flow = _flow(mitigate="off")
    _fit(flow, 7)
    other = make(flow)
    assert other.findings == ()
    assert len(other.history) == 0
    _fit(other, 5)
    assert other.history.steps.tolist() == [0, 1, 2, 4]


def test_a_fit_that_dies_leaves_its_report(tmp_path):
    class Dies(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                raise RuntimeError("out of luck")

    flow = GradFlow(every_n_steps=5, console=False)
    with pytest.raises(RuntimeError, match="out of luck"):
        _fit(flow, 20, callbacks=[flow, Dies()], default_root_dir=tmp_path)
    assert flow.report_path == tmp_path / "gradflow_report.html"
    assert flow.report_path.stat().st_size > 100_000


def test_a_warning_that_is_made_an_error_stops_the_run():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=VanishingGradientWarning)
        with pytest.raises(VanishingGradientWarning, match=r"The gradient vanishes .* What to do: "):
            _fit(_flow(), 20, case="sigmoid_30")
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_without_a_fit_nothing_happens(method):
    class Evaluates(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def validation_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        test_step = predict_step = validation_step

    flow = _flow()
    data = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)
    getattr(quiet_trainer(callbacks=[flow]), method)(Evaluates(), data)
    assert flow.findings == ()
    assert len(flow.history) == 0


def test_fast_dev_run_works_and_writes_nothing(tmp_path):
    flow = GradFlow(console=False)
    _fit(flow, 5, fast_dev_run=True, default_root_dir=tmp_path)
    assert flow.report_path is None


def test_barebones_works():
    flow = _flow()
    L.seed_everything(0)
    trainer = L.Trainer(barebones=True, max_steps=3, callbacks=[flow], accelerator="cpu")
    trainer.fit(HEALTHY["tanh_4_default_init"].build(0), _data())
    assert flow.history.steps.tolist() == [0, 1, 2]


class _Losses(L.LightningModule):
    """Logs its losses under names of the test's choice."""

    def __init__(self, train_name=None, val_name=None, automatic=True):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.names = (train_name, val_name)
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean() + 1
        if self.names[0]:
            self.log(self.names[0], loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean() + 2
        if self.names[1]:
            self.log(self.names[1], loss)
            return None
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("train", "val", "automatic"),
    [
        (None, None, True),
        ("train/loss", "val/loss", True),
        ("objective", "objective_val", True),
        ("my-own-nll", "validation.nll", False),
        ("anything", "val_anything", False),
    ],
)
def test_losses_are_found_whatever_they_are_called(train, val, automatic):
    flow = _flow()
    data = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=2)
    L.seed_everything(0)
    model = _Losses(train, val, automatic)
    bias = model.layer.bias.item()
    quiet_trainer(max_epochs=2, callbacks=[flow]).fit(model, data, data)
    losses, validation = flow.history.losses, flow.history.scalar("val_loss")
    np.testing.assert_allclose(losses[np.isfinite(losses)], bias**2 + 1, rtol=1e-6)
    assert np.isfinite(losses).any()
    np.testing.assert_allclose(validation[np.isfinite(validation)], bias**2 + 2, rtol=1e-6)
    assert np.isfinite(validation).any()


def test_a_loss_can_be_named():
    flow = _flow(plateau=PlateauDetector(train_loss="special", val_loss="other"))

    class Named(_Losses):
        def training_step(self, batch, batch_idx):
            self.log("special", 7.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("other", 9.0)
            return super().validation_step(batch, batch_idx)

    data = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=2)
    quiet_trainer(max_epochs=2, callbacks=[flow]).fit(Named("train_loss", "val_loss"), data, data)
    assert set(flow.history.losses) == {7.0}
    assert np.nanmax(flow.history.scalar("val_loss")) == 9.0


class _Unnamed(_Losses):
    """Logs an accuracy and returns its loss."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.5)
        return super().validation_step(batch, batch_idx)


def test_an_accuracy_is_not_taken_for_the_loss():
    flow = _flow()
    data = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=2)
    quiet_trainer(max_epochs=2, callbacks=[flow]).fit(_Unnamed(), data, data)
    assert np.nanmin(flow.history.scalar("val_loss")) >= 2


def test_a_validation_loss_that_is_no_number_is_infinite_and_not_left_out():
    class Broken(_Losses):
        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1)

    flow = _flow()
    data = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=2)
    quiet_trainer(max_epochs=2, callbacks=[flow]).fit(Broken(), data, data)
    assert np.isposinf(flow.history.scalar("val_loss")).any()


def test_validation_between_the_batches_of_a_sample_is_not_observed():
    hooks = []

    class Watches(_Losses):
        def __init__(self):
            super().__init__(automatic=False)

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.layer(batch).square().mean())
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

        def validation_step(self, batch, batch_idx):
            hooks.append(len(torch.nn.modules.module._global_forward_hooks))

    data = torch.utils.data.DataLoader(torch.ones(16, 2), batch_size=2)
    trainer = quiet_trainer(max_epochs=1, callbacks=[_flow(every_n_steps=1)], val_check_interval=1)
    trainer.fit(Watches(), data, data)
    assert len(hooks) > 8
    assert set(hooks) == {0}


def test_nobody_looks_on_while_gradients_are_deleted():
    """Our function mode would be asked about each of them, twice: it took as long as a tenth of the measuring."""
    modes = []

    class Deletes(BoringModel):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            modes.append(len(_get_current_function_mode_stack()))
            optimizer.zero_grad()

    flow = _flow(every_n_steps=1)
    quiet_trainer(max_steps=4, callbacks=[flow], limit_val_batches=0).fit(Deletes())
    assert modes == [0] * 4
    assert np.isfinite(flow.history["delta_norm"]).all()


@pytest.mark.parametrize("dies", [False, True])
def test_the_collector_of_garbage_is_left_as_it_was(dies):
    before, seen = gc.get_threshold(), []

    class Watches(BoringModel):
        def training_step(self, batch, batch_idx):
            seen.append(gc.get_threshold()[0])
            if dies and batch_idx == 3:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    with pytest.raises(ArithmeticError) if dies else contextlib.nullcontext():
        quiet_trainer(max_steps=6, callbacks=[_flow(every_n_steps=1)], limit_val_batches=0).fit(Watches())
    assert gc.get_threshold() == before
    assert max(seen) > before[0] == min(seen)


def test_what_failed_in_one_fit_is_tried_again_in_the_next(monkeypatch):
    monkeypatch.delenv("LIGHTNING_GRADFLOW_RAISE")
    flow = _flow()
    with monkeypatch.context() as broken:
        broken.setattr("lightning_gradflow.callbacks.sampler.Sampler.start_batch", lambda *_: 1 / 0)
        with pytest.warns(GradFlowWarning, match="the monitor is switched off"):
            trainer = _fit(flow, 5)
    assert len(flow.history) == 0
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit(trainer.lightning_module, _data())
    assert len(flow.history) > 0


def test_each_fit_that_vanishes_says_so():
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            _fit(_flow(), 3, case="sigmoid_30")
        assert [warning.category for warning in told].count(VanishingGradientWarning) == 1
