"""Monitors, models and Trainers are copied and pickled: before, in the middle of, and after a fit."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch

from lightning_gradflow import AutoMitigator, GradNormLogger, PlateauDetector, SaturationMonitor
from tests.integration.traces import Tiny, assert_same_run, data, fit, flow, traces


def _pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def _saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


HOOKS = [
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_end",
]
COPIES = pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])


class _Copies(L.Callback):
    """Copies something in each hook of each step."""

    def __init__(self, duplicate, what):
        self.made = {hook: [] for hook in HOOKS}

        def act_in(hook):
            return lambda trainer, pl_module, *_: self.made[hook].append(duplicate(what(trainer, pl_module)))

        for hook in HOOKS:
            setattr(self, hook, act_in(hook))


@COPIES
@pytest.mark.parametrize("kind", [flow, GradNormLogger, SaturationMonitor, PlateauDetector, AutoMitigator])
def test_a_copy_from_before_a_fit_works_like_the_original(duplicate, kind):
    monitor = kind(every_n_steps=1)
    other = duplicate(monitor)
    fit([monitor])
    fit([other])
    assert_same_run(other, monitor)


@COPIES
def test_a_copy_from_the_middle_of_a_fit_is_a_callback_without_a_run(duplicate):
    monitor, alone = flow(), flow()
    copies = _Copies(duplicate, lambda *_: monitor)
    fit([monitor, copies])
    fit([alone])
    for made in copies.made.values():
        other = made[-1]
        assert len(other.history) == 0
        fit([other])
        assert_same_run(other, alone)


@COPIES
def test_copies_in_the_middle_of_a_fit_do_not_disturb_it(duplicate):
    monitor, alone = flow(), flow()
    fit([monitor, _Copies(duplicate, lambda *_: monitor)])
    fit([alone])
    assert_same_run(monitor, alone)


@COPIES
def test_a_copy_from_after_a_fit_is_a_callback_without_a_run(duplicate):
    monitor = flow()
    fit([monitor])
    other = duplicate(monitor)
    assert (other.findings, other.actions, len(other.history)) == ((), (), 0)
    fit([other])
    assert_same_run(other, monitor)


@COPIES
def test_a_copy_of_a_monitor_that_was_resumed_does_not_go_on_with_the_run(duplicate, tmp_path):
    fit([flow()]).save_checkpoint(tmp_path / "end.ckpt")

    class CopiesEarly(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.made = duplicate(monitor)

    monitor, early, alone = flow(), CopiesEarly(), flow()
    fit([monitor, early], max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    fit([early.made])
    fit([alone])
    assert_same_run(early.made, alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_model_carries_nothing_of_ours(duplicate):
    copies = _Copies(duplicate, lambda trainer, pl_module: pl_module.net)
    fit([flow(), copies])
    for made in copies.made.values():
        assert all(type(module).__module__.startswith("torch.") for module in made[-1].modules())
        assert traces(made[-1]) == []


def test_a_copy_of_the_module_can_be_trained():
    copies = _Copies(copy.deepcopy, lambda trainer, pl_module: pl_module)
    fit([flow(), copies])
    for made in copies.made.values():
        monitor = flow()
        fit([monitor], made[0])
        assert len(monitor.history) == 12


def test_a_teacher_that_is_copied_inside_of_a_sampled_step_is_not_watched():
    class Distils(Tiny):
        def training_step(self, batch, batch_idx):
            teacher = copy.deepcopy(self.net)
            with torch.no_grad():
                target = teacher(batch[0])
            return (self(batch[0]) - target - 1).square().mean() + super().training_step(batch, batch_idx)

    monitor, model = flow(), Distils()
    fit([monitor], model)
    assert monitor.history.layers == ("net.0", "net.2", "net.4")
    assert traces(model) == []


@COPIES
def test_a_trainer_can_be_copied_after_a_fit(duplicate):
    monitor = flow()
    trainer = fit([monitor], max_epochs=1)
    other = duplicate(trainer)
    (copied,) = (callback for callback in other.callbacks if type(callback) is type(monitor))
    assert len(copied.history) == 0
    other.fit_loop.max_epochs = 2
    other.fit(Tiny(), data())
    assert copied.history.steps.tolist() == list(range(12, 24))
    assert len(monitor.history) == 12
