"""Callbacks of Lightning that average weights beside the monitor."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn

from tests.integration.traces import Tiny, Validated, assert_same_run, data, fit, flow, traces

BATCHES = 12


class Normed(Tiny):
    """With BatchNorm, for whose statistics SWA adds an epoch without a backward pass."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8))


class NormedSum(Normed):
    """The same, validated."""

    validation_step = Validated.validation_step


needs_averages = pytest.mark.skipif(
    not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has these callbacks from 2.6 on"
)


def _swa():
    return callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)


def _moving():
    return callbacks.EMAWeightAveraging(decay=0.5)


def _weight_averaging():
    return callbacks.WeightAveraging()


MOVING = [pytest.param(make, marks=needs_averages) for make in (_weight_averaging, _moving)]


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 4, 5])
@pytest.mark.parametrize("every", [1, 4, 5])
def test_the_extra_epoch_for_batch_norm_adds_no_rows_and_no_warning(accumulate, every):
    monitor = flow(every_n_steps=every)
    fit([monitor, _swa()], Normed(), max_epochs=3, accumulate_grad_batches=accumulate)  # warnings are errors
    assert monitor.history.steps.max() < 3 * -(-BATCHES // accumulate)
    assert np.isfinite(monitor.history["grad_norm"]).all()


def test_the_extra_epoch_is_seen_by_lightning():
    """Without it the test above would claim nothing."""
    starts = []

    class Counts(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.append(trainer.current_epoch)

    fit([Counts(), _swa()], Normed(), max_epochs=3)
    assert max(starts) == 3


@pytest.mark.parametrize("accumulate", [1, 5])
def test_the_rows_before_the_extra_epoch_are_those_of_a_run_without_averaging(accumulate):
    averaged, plain = flow(), flow()
    fit(
        [averaged, callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)],
        Normed(),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    fit([plain], Normed(), max_epochs=2, accumulate_grad_batches=accumulate)
    first = plain.history.steps < -(-BATCHES // accumulate)
    np.testing.assert_array_equal(averaged.history["grad_norm"][: first.sum()], plain.history["grad_norm"][first])
    assert averaged.history.steps.tolist() == plain.history.steps.tolist()


def test_losses_of_the_extra_epoch_are_no_training_losses():
    monitor = flow()
    fit([monitor, _swa()], Normed(), max_epochs=3)
    assert len(monitor.history.losses) == 3 * BATCHES


@pytest.mark.parametrize("model", [Tiny, Normed])
@pytest.mark.parametrize("average", [_swa, *MOVING])
def test_averaged_weights_are_those_of_a_run_without_the_monitor(model, average):
    found = []
    for watching in ([flow()], []):
        trained = model()
        fit([*watching, average()], trained, max_epochs=3)
        found.append(_weights(trained))
        assert traces(trained) == []
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("average", MOVING)
def test_rows_under_a_moving_average_are_those_of_the_weights_that_are_trained(average):
    averaged, plain = flow(), flow()
    fit([averaged, average()], Normed(), max_epochs=2)
    fit([plain], Normed(), max_epochs=2)
    assert_same_run(averaged, plain)


@needs_averages
@pytest.mark.parametrize("order", [1, -1])
def test_under_a_moving_average_the_validation_loss_is_that_of_the_average(order):
    """As Lightning logs it: it swaps the weights for the validation."""
    monitor = flow()
    trainer = fit([monitor, _moving()][::order], NormedSum(), val=data(2), max_epochs=2)
    assert monitor.history.scalar("val_loss")[-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
