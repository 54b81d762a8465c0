"""Learning rate and batch size are searched before a fit: the search is no part of what is watched, nor disturbed."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import Tiny, assert_same_run, data, fit, flow, process_traces, traces

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*You have overridden `.*batch_size` attribute"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


class Tuned(Tiny):
    """A model that makes its own batches, of a size that can be tuned, and looks around in each step."""

    def __init__(self, lr=0.05, batch_size=4):
        super().__init__(lr)
        self.batch_size = batch_size
        self.seen = []

    def train_dataloader(self):
        return data(48 // self.batch_size, self.batch_size)

    def training_step(self, batch, batch_idx):
        self.seen.append(bool(process_traces()))
        return super().training_step(batch, batch_idx)


def _lr_find(trainer, model):
    found = Tuner(trainer).lr_find(model, num_training=10, early_stop_threshold=None)
    return found.results["lr"], found.results["loss"], found.suggestion(), model.lr


def _scale_batch_size(trainer, model):
    return Tuner(trainer).scale_batch_size(model, max_trials=3, steps_per_trial=2)


SEARCHES = {"lr_find": _lr_find, "scale_batch_size": _scale_batch_size}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the tuner keeps a checkpoint there
    # it frees memory of a GPU between two trials; without one it only collects garbage, for seconds
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


def _trainer(callbacks, **kwargs):
    torch.manual_seed(0)
    return quiet_trainer(**{"max_epochs": 1, "callbacks": callbacks, **kwargs})


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_what_it_finds_without_the_monitor(search):
    watched = SEARCHES[search](_trainer([flow()]), Tuned())
    assert watched == SEARCHES[search](_trainer([]), Tuned())


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_is_not_observed_and_leaves_nothing_behind(search):
    model, monitor = Tuned(), flow()
    SEARCHES[search](_trainer([monitor]), model)
    assert model.seen
    assert not any(model.seen)
    assert traces(model) == []
    assert len(monitor.history) == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_a_monitor_that_only_saw_a_search_says_that_there_is_nothing_to_tell(search):
    monitor = flow()
    SEARCHES[search](_trainer([monitor]), Tuned())
    assert re.search(r"no fit|no sampled|nothing", monitor.summary(), flags=re.IGNORECASE)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_history_of_a_fit_after_a_search_is_that_of_the_fit(search):
    searched, monitor = Tuned(), flow()
    trainer = _trainer([monitor])
    SEARCHES[search](trainer, searched)
    trainer.fit(searched)
    alone = flow()
    _trainer([alone]).fit(Tuned(searched.lr, searched.batch_size))
    assert len(alone.history) == 48 // searched.batch_size
    assert_same_run(monitor, alone)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_fit_after_a_search_ends_with_the_weights_it_has_without_the_monitor(search):
    weights = []
    for callbacks in ([flow()], []):
        model, trainer = Tuned(), _trainer(callbacks)
        SEARCHES[search](trainer, model)
        trainer.fit(model)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("finder", ["before", "after"])
def test_a_learning_rate_finder_among_the_callbacks_is_not_in_the_history(finder):
    monitor, model = flow(), Tuned()
    search = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
    trainer = _trainer([search, monitor] if finder == "before" else [monitor, search])
    trainer.fit(model)
    assert monitor.history.steps.tolist() == list(range(trainer.global_step)) != []
    assert model.seen == [False] * 10 + [True] * trainer.global_step
    np.testing.assert_array_equal(monitor.history.scalar("lr"), model.lr)
    assert traces(model) == []


def test_a_learning_rate_finder_finds_what_it_finds_without_the_monitor():
    found = []
    for callbacks in ([flow()], []):
        search = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
        _trainer([*callbacks, search]).fit(Tuned())
        found.append((search.optimal_lr.results, search.optimal_lr.suggestion()))
    assert found[0] == found[1]


def test_a_batch_size_finder_among_the_callbacks_is_not_in_the_history():
    monitor, model = flow(), Tuned()
    trainer = _trainer([monitor, BatchSizeFinder(steps_per_trial=2, max_trials=3)])
    trainer.fit(model)
    assert monitor.history.steps.tolist() == list(range(trainer.global_step)) != []
    assert traces(model) == []


class Repeats(LearningRateFinder):
    """Searches anew at the start of the second epoch, as Lightning's documentation shows it."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def test_a_search_between_two_epochs_is_not_in_the_history():
    monitor, model = flow(), Tuned()
    finder = Repeats(num_training_steps=10, early_stop_threshold=None)
    _trainer([monitor, finder], max_epochs=3).fit(model)
    assert monitor.history.steps.tolist() == list(range(36))
    assert model.seen == [True] * 12 + [False] * 10 + [True] * 24


def test_a_search_between_two_epochs_does_not_cut_the_history_of_the_next_fit():
    monitor, model = flow(), Tuned()
    trainer = _trainer([monitor, Repeats(num_training_steps=10, early_stop_threshold=None)], max_epochs=3)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model)
    assert monitor.history.steps.tolist() == list(range(48))


def test_a_second_search_does_not_cut_the_history_of_the_first_fit():
    monitor, model = flow(), Tuned()
    trainer = _trainer([monitor])
    trainer.fit(model)
    before = monitor.history.state_dict()
    Tuner(trainer).lr_find(model, num_training=10, early_stop_threshold=None)
    np.testing.assert_equal(monitor.history.state_dict(), before)


# the search dies before it has put the callbacks back, and loads its checkpoint without them
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_a_search_that_dies_leaves_nothing_behind():
    class Dies(Tuned):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    monitor, model = flow(), Dies()
    with pytest.raises(RuntimeError, match="out of luck"):
        Tuner(_trainer([monitor])).lr_find(model, num_training=10)
    assert traces(model) == []
    fit([monitor])
    assert monitor.history.steps.tolist() == list(range(12))
