"""The ways a fit can be cut, repeated, validated and fed: rows are those of the optimizer steps that were made."""

import datetime
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradflow import GradFlow, GradNormLogger, SaturationMonitor
from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import Tiny, Validated, assert_same_run, data, fit, flow, process_traces, traces

BATCHES = 12


class _Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        yield from data()


def _losses_of(batches, **kwargs):
    """What the losses are, by a loop that knows nothing of the monitor."""
    seen = []

    class Keeps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    fit([Keeps()], train=batches, **kwargs)
    return np.array(seen)


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"overfit_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 5}, 5),
        ({"limit_train_batches": 0.5}, 6),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 17, "max_epochs": -1}, 17),
        ({"min_epochs": 2, "max_epochs": 2}, 24),
        ({"accumulate_grad_batches": 5, "max_epochs": 3}, 9),
        ({"accumulate_grad_batches": 5, "max_epochs": 3, "limit_train_batches": 7}, 6),
        ({"accumulate_grad_batches": 20, "max_epochs": 3}, 3),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, 36),
        ({"gradient_clip_val": 0.1}, 12),
        ({"detect_anomaly": True}, 12),
        ({"inference_mode": False}, 12),
    ],
    ids=str,
)
def test_each_optimizer_step_is_a_row(kwargs, steps):
    monitor = flow()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*You are using `overfit_batches`")
        fit([monitor], **kwargs)
    assert monitor.history.steps.tolist() == list(range(steps))
    assert np.isfinite(monitor.history["grad_norm"]).all()
    assert len(monitor.history.losses) == steps


@pytest.mark.parametrize("accumulate", [1, 5, 12, 20])
@pytest.mark.parametrize("source", [data, lambda: DataLoader(_Stream(), batch_size=None)], ids=["sized", "stream"])
def test_losses_are_the_means_of_the_windows_over_all_epochs(source, accumulate):
    monitor = flow(every_n_steps=3)
    fit([monitor], train=source(), max_epochs=3, accumulate_grad_batches=accumulate)
    losses = _losses_of(source(), max_epochs=3, accumulate_grad_batches=accumulate).reshape(3, BATCHES)
    windows = [losses[epoch, at : at + accumulate].mean() for epoch in range(3) for at in range(0, BATCHES, accumulate)]
    np.testing.assert_allclose(monitor.history.losses, windows, rtol=1e-6)
    assert monitor.history.loss_steps.tolist() == list(range(len(windows)))


@pytest.mark.parametrize("accumulate", [1, 5])
def test_a_stream_without_length_gives_the_rows_of_a_data_set(accumulate):
    sized, stream = flow(), flow()
    fit([sized], max_epochs=2, accumulate_grad_batches=accumulate)
    fit([stream], train=DataLoader(_Stream(), batch_size=None), max_epochs=2, accumulate_grad_batches=accumulate)
    assert stream.history.steps.tolist() == sized.history.steps.tolist()
    np.testing.assert_array_equal(stream.history["grad_norm"], sized.history["grad_norm"])
    np.testing.assert_array_equal(stream.history["delta_norm"], sized.history["delta_norm"])


@pytest.mark.parametrize(
    "kwargs", [{"val_check_interval": 3}, {"val_check_interval": 0.5}, {"num_sanity_val_steps": 2}]
)
def test_validation_changes_no_row(kwargs):
    validated, plain = flow(), flow()
    fit([validated], Validated(), val=data(2), max_epochs=2, accumulate_grad_batches=5, **kwargs)
    fit([plain], max_epochs=2, accumulate_grad_batches=5)
    for name in ("grad_norm", "delta_norm", "output_rms", "weight_norm", "dead_fraction"):
        np.testing.assert_array_equal(validated.history[name], plain.history[name])
    assert validated.history.steps.tolist() == plain.history.steps.tolist()


@pytest.mark.parametrize(
    "kwargs", [{"val_check_interval": 1}, {"val_check_interval": 5, "check_val_every_n_epoch": None}]
)
def test_validation_in_the_middle_of_a_window_is_not_observed(kwargs):
    seen = []

    class Looks(Validated):
        def validation_step(self, batch, batch_idx):
            seen.append(process_traces())
            super().validation_step(batch, batch_idx)

    fit([flow()], Looks(), val=data(2), max_epochs=2, accumulate_grad_batches=4, **kwargs)
    assert len(seen) >= 8
    assert not any(seen)


def test_the_loss_of_the_sanity_check_is_not_taken():
    class Worse(Validated):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1e6 if self.trainer.sanity_checking else 1.0)

    monitor = flow()
    fit([monitor], Worse(), val=data(2), num_sanity_val_steps=2, max_epochs=2)
    val_loss = monitor.history.scalar("val_loss")
    assert np.unique(val_loss[np.isfinite(val_loss)]).tolist() == [1.0]


def test_the_sanity_check_is_not_observed():
    seen = []

    class Looks(Validated):
        def validation_step(self, batch, batch_idx):
            seen.append(process_traces())
            super().validation_step(batch, batch_idx)

    fit([flow()], Looks(), val=data(2), num_sanity_val_steps=2, limit_train_batches=1, limit_val_batches=1)
    assert seen[:2] == [[], []]


def test_a_run_out_of_time_keeps_what_it_saw():
    monitor = flow(report=False)

    class Late(L.Callback):
        """Lets the time run out after a number of batches, whatever the speed of the machine."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 20:
                timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
                timer._duration = 0.0

    model = Tiny()
    trainer = fit([Late(), monitor], model, max_epochs=-1, max_time=datetime.timedelta(days=1))
    assert monitor.history.steps[-1] == trainer.global_step - 1
    assert 20 <= trainer.global_step <= 36
    assert traces(model) == []


def test_a_run_that_is_asked_to_stop_ends_as_any_other():
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 6

    monitor, model = flow(every_n_steps=5), Tiny()
    fit([monitor, Stops()], model, max_epochs=3)
    assert monitor.history.steps.tolist() == [0, 1, 2, 4, 5]
    assert len(monitor.history.losses) == 7
    assert traces(model) == []


def test_no_batches_at_all_give_an_empty_history():
    monitor = flow()
    fit([monitor], limit_train_batches=0)
    assert len(monitor.history) == 0
    assert isinstance(monitor.summary(), str)


def test_without_epochs_nothing_happens():
    monitor = flow()
    fit([monitor], max_epochs=0)
    assert len(monitor.history) == 0


# -- one monitor, several fits ----------------------------------------------------------------------------------


class Plain(Tiny):
    """Trained by an optimizer without a state: each fit makes a new one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_fit_that_is_continued_has_the_history_of_one_fit():
    continued, whole = flow(), flow()
    model = Plain()
    trainer = fit([continued], model, max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data())
    fit([whole], Plain(), max_epochs=3)
    assert continued.history.steps.tolist() == whole.history.steps.tolist() == list(range(3 * BATCHES))
    for metric in ("grad_norm", "delta_norm", "weight_norm"):
        np.testing.assert_array_equal(continued.history[metric], whole.history[metric])
    np.testing.assert_array_equal(continued.history.losses, whole.history.losses)


def test_a_validation_between_two_fits_changes_nothing():
    between, without = flow(), flow()
    for monitor in (between, without):
        model = Validated()
        trainer = fit([monitor], model, val=data(2), max_epochs=1)
        if monitor is between:
            trainer.validate(model, data(2), verbose=False)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, data(), data(2))
    assert_same_run(between, without)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_validation_of_an_older_checkpoint_does_not_cut_the_history(tmp_path):
    monitor, model = flow(), Validated()
    keeps = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    trainer = fit([monitor, keeps], model, val=data(2), enable_checkpointing=True)
    trainer.validate(model, data(2), ckpt_path=next(tmp_path.glob("*step=5.ckpt")), verbose=False)
    assert len(monitor.history) == BATCHES
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data(), data(2))
    assert monitor.history.steps.tolist() == list(range(2 * BATCHES))


def test_a_fit_that_has_nothing_left_to_do_keeps_the_history():
    monitor, model = flow(), Tiny()
    trainer = fit([monitor], model)
    trainer.fit(model, data())
    assert monitor.history.steps.tolist() == list(range(BATCHES))


def test_a_monitor_holds_the_history_of_the_trainer_that_fitted_last():
    monitor, model = flow(), Tiny()
    first, second = (quiet_trainer(max_epochs=1, limit_train_batches=n, callbacks=[monitor]) for n in (5, 7))
    first.fit(model, data())
    second.fit(model, data())
    assert monitor.history.steps.tolist() == list(range(7))
    assert traces(model) == []


def test_going_back_to_the_first_of_two_trainers_starts_where_that_one_stands():
    monitor = flow()
    first, second = (quiet_trainer(max_epochs=1, limit_train_batches=n, callbacks=[monitor]) for n in (5, 7))
    model = Tiny()
    first.fit(model, data())
    second.fit(Tiny(), data())
    first.fit_loop.max_epochs = 2
    first.fit(model, data())
    assert monitor.history.steps.tolist() == list(range(5, 10))


def test_two_trainers_with_a_monitor_each_can_fit_one_model_in_turn():
    one, other, model = flow(), flow(), Tiny()
    fit([one], model)
    fit([other], model)
    assert one.history.steps.tolist() == other.history.steps.tolist() == list(range(BATCHES))
    assert one.history.losses[0] > other.history.losses[0]


def test_a_fit_inside_a_fit_disturbs_neither():
    inner, outer, alone = flow(), flow(), flow()

    class Nests(L.Callback):
        """Fits another model in the middle of a step, as a search or a distillation does."""

        def on_train_epoch_start(self, trainer, pl_module):
            fit([inner])

    fit([outer, Nests()])
    fit([alone])
    assert_same_run(inner, alone)
    assert_same_run(outer, alone)


# -- two monitors that do the same ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: [GradFlow(), GradFlow()], lambda: [GradNormLogger(), GradNormLogger()]], ids=["GradFlow", "part"]
)
def test_two_monitors_of_a_kind_are_refused_by_name(make):
    kind = type(make()[0]).__name__
    with pytest.raises((RuntimeError, ValueError), match=kind) as caught:
        fit(make())
    assert "more than one" in str(caught.value)


@pytest.mark.parametrize("part", [GradNormLogger, SaturationMonitor])
@pytest.mark.parametrize("order", [1, -1])
def test_a_part_beside_the_whole_is_refused_with_what_to_do(part, order):
    message = rf"each monitor once \(GradFlow holds all four\), got {part.__name__} more than once"
    with pytest.raises(ValueError, match=message):
        fit([flow(), part()][::order])


def test_a_refused_set_can_be_mended_and_used():
    monitor = flow()
    with pytest.raises(ValueError, match="more than once"):
        fit([monitor, GradNormLogger()])
    fit([monitor])
    assert math.isfinite(monitor.history.scalar("loss")[0])
    assert process_traces() == []


def test_a_monitor_that_is_put_in_twice_is_refused():
    monitor = flow()
    with pytest.raises((RuntimeError, ValueError), match="GradFlow"):
        fit([monitor, monitor])


def test_the_monitor_of_a_model_is_used_like_that_of_a_trainer():
    monitor = flow()

    class Brings(Tiny):
        def configure_callbacks(self):
            return [monitor]

    fit([], Brings())
    assert monitor.history.steps.tolist() == list(range(BATCHES))


def test_a_batch_of_more_than_one_loader_is_a_batch():
    class Pairs(Tiny):
        def training_step(self, batch, batch_idx):
            return sum(super(Pairs, self).training_step(part, batch_idx) for part in batch.values())

    monitor = flow()
    fit([monitor], Pairs(), train={"a": data(3), "b": data(6)}, max_epochs=2)
    assert monitor.history.steps.tolist() == list(range(12))  # the shorter one is repeated


def test_a_step_without_a_loss_waits_for_the_next_that_has_one():
    class Skips(Tiny):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (3, 4) else super().training_step(batch, batch_idx)

    monitor = flow()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step.* returned `None`")
        warnings.filterwarnings("ignore", message=".*had no backward pass")
        fit([monitor], Skips())
    norms = monitor.history["grad_norm"]
    assert len(norms) == BATCHES - 2
    assert (np.isfinite(norms) & (norms > 0)).all()
