"""A run that stands still is asked why, and goes on as if nobody had asked."""

import gc
import warnings
import weakref
from functools import partial
from typing import NamedTuple

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_gradflow import FindingKind, GradFlow, GradFlowWarning
from lightning_gradflow.callbacks.why import _dealt, _of_one_epoch
from lightning_gradflow.metrics import SCALARS
from tests.benchmarks.zoo import quiet_trainer

PIXELS, DIGITS = (torch.tensor(part) for part in load_digits(return_X_y=True))
PIXELS = PIXELS.float() / 8 - 1
SLOW = partial(torch.optim.SGD, lr=1e-6)


class Standing(L.LightningModule):
    """A classifier with what a probe could disturb: dropout, BatchNorm, a metric, and things that it logs."""

    def __init__(self, optimizer=SLOW, *, bears_copies=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
        self.seen = MeanMetric()
        self.optimizer = optimizer
        self.calls = 0
        self.own = None if bears_copies else (item for item in ())  # a generator cannot be copied

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen(loss)
        self.log("train_loss", loss)
        self.log("calls", float(self.calls))
        if self.logger is not None:
            self.logger.log_metrics({"own": loss.item()}, step=self.trainer.global_step)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def data(targets=DIGITS, inputs=PIXELS):
    order = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(inputs, targets), 32, shuffle=True, drop_last=True, generator=order)


def fit(module, loader=None, *, watched=True, steps=380, **arguments):
    flow = GradFlow(report=False, console=False)
    trainer = quiet_trainer(max_steps=steps, callbacks=[flow] if watched else [], **arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GradFlowWarning)
        trainer.fit(module, loader or data())
    return flow, trainer, [str(warning.message) for warning in told if issubclass(warning.category, GradFlowWarning)]


def plateaus(flow):
    return [finding for finding in flow.findings if finding.kind is FindingKind.LOSS_PLATEAU]


def test_too_small_steps_are_told_from_the_loss_along_them():
    L.seed_everything(0, verbose=False)
    flow, _, _ = fit(Standing())
    (found,) = plateaus(flow)
    assert found.cause == "learning_rate_too_small"
    assert found.evidence["line_gain_far"] > 0.01
    assert found.step <= 350
    assert (flow.history.scalar("loss_line") == 1).sum() == 1
    assert {name for row in flow.history.rows for name in row.scalars} <= set(SCALARS)


def test_targets_without_a_relation_to_the_inputs_are_told_from_gradients_without_a_direction():
    L.seed_everything(0, verbose=False)
    net = Standing(partial(torch.optim.SGD, lr=0.05))
    net.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    shuffled = torch.randint(0, 10, (100_000,), generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(100_000, 64, generator=torch.Generator().manual_seed(2))
    flow, _, _ = fit(net, data(shuffled, inputs), steps=1000)
    assert "no_signal_in_data" in [found.cause for found in plateaus(flow)]


def plain():
    net = Standing(partial(torch.optim.SGD, lr=0.05))
    net.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return net


def drawn(share, seed=1):
    """Labels of which a share is drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    is_drawn = torch.rand(len(DIGITS), generator=generator) < share
    return torch.where(is_drawn, torch.randint(0, 10, DIGITS.shape, generator=generator), DIGITS)


@pytest.mark.parametrize("seed", range(3))
def test_labels_drawn_at_random_are_found_although_the_loss_falls_to_the_prior_and_on(seed):
    L.seed_everything(seed, verbose=False)
    net = plain()
    nn.init.normal_(net.net[2].weight, std=1.0)
    flow, _, told = fit(net, data(drawn(1.0)), steps=400)
    assert flow.history.losses[-50:].mean() < 0.93 * flow.history.losses[:5].mean()
    (found,) = [finding for finding in plateaus(flow) if finding.severity.is_alarm]
    assert found.cause == "no_signal_in_data"
    assert found.evidence["line_shuffled"] < 0.15
    assert len(told) == 1


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_noisy_labels_that_can_be_learnt_are_well(share):
    L.seed_everything(0, verbose=False)
    flow, _, told = fit(plain(), data(drawn(share)), steps=700)
    assert (flow.history.scalar("loss_line") == 1).any()
    assert plateaus(flow) == []
    assert told == []


def test_inputs_that_are_all_alike_are_no_signal():
    L.seed_everything(0, verbose=False)
    net = Standing(partial(torch.optim.Adam, lr=1e-3))
    net.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    flow, _, _ = fit(net, data(inputs=torch.ones_like(PIXELS)), steps=400)
    assert [found.cause for found in plateaus(flow)] == ["no_signal_in_data"]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Remembers(L.pytorch.loggers.logger.DummyLogger):
    """Keeps the names and numbers of the user's own."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(name, value, step) for name, value in metrics.items() if not name.startswith("gradflow")]


@pytest.mark.parametrize("how", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_asking_changes_nothing_in_the_run(how):
    left = []
    for watched in (True, False):
        L.seed_everything(0, verbose=False)
        module, logger = Standing(partial(torch.optim.SGD, lr=1e-6, momentum=0.9)), Remembers()
        flow, trainer, _ = fit(module, watched=watched, logger=logger, **how)
        assert not watched or [found.cause for found in plateaus(flow)] == ["learning_rate_too_small"]
        state = [optimizer.state_dict() for optimizer in trainer.optimizers]
        metric = module.seen.metric_state
        left.append((module.state_dict(), state, torch.get_rng_state(), metric, module.calls, logger.rows))
    for mine, theirs in zip(*left, strict=True):
        assert same(mine, theirs)


def test_the_copy_is_gone_afterwards():
    copies = weakref.WeakSet()

    class Counted(Standing):
        def __deepcopy__(self, memo):
            del type(self).__deepcopy__
            made = __import__("copy").deepcopy(self, memo)
            copies.add(made)
            return made

    L.seed_everything(0, verbose=False)
    flow, _, _ = fit(Counted())
    gc.collect()
    assert plateaus(flow)[0].cause == "learning_rate_too_small"
    assert not copies


@pytest.mark.filterwarnings("ignore:.*is switched off:lightning_gradflow.GradFlowWarning")
def test_a_module_that_cannot_be_copied_leaves_the_cause_unknown_and_is_told_once(monkeypatch):
    monkeypatch.delenv("LIGHTNING_GRADFLOW_RAISE", raising=False)
    L.seed_everything(0, verbose=False)
    flow, trainer, told = fit(Standing(bears_copies=False), steps=500)
    assert trainer.global_step == 500
    assert [found.cause for found in plateaus(flow)] == ["unknown"]
    assert len([text for text in told if "the search for the cause of a plateau is switched off" in text]) == 1


def test_a_run_that_ends_while_it_is_asked_is_told_without_a_cause():
    L.seed_everything(0, verbose=False)
    flow, _, _ = fit(Standing(), steps=305)
    assert [found.cause for found in plateaus(flow)] == ["unknown"]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.arange(8.0).reshape(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "targets"),
    [
        ((X, Y), lambda dealt: dealt[1]),
        ([X, Y], lambda dealt: dealt[1]),
        (Pair(X, Y), lambda dealt: dealt.y),
        ({"pixel_values": X, "labels": Y}, lambda dealt: dealt["labels"]),
        ({"x": X, "y": Y, "name": "digits"}, lambda dealt: dealt["y"]),
    ],
)
def test_targets_are_dealt_to_other_samples(batch, targets):
    dealt = _dealt(batch)
    assert type(dealt) is type(batch)
    assert targets(dealt).tolist() == [2, 3, 0, 1]
    assert Y.tolist() == [0, 1, 2, 3]
    parts = dealt.values() if isinstance(dealt, dict) else dealt
    assert any(part is X for part in parts)


@pytest.mark.parametrize(
    "batch", [X, (X,), (X[:1], Y[:1]), (X, torch.tensor(1.0)), {"a": X, "b": Y}, (X, Y[:3]), "text"]
)
def test_a_batch_without_known_targets_is_not_dealt(batch):
    assert _dealt(batch) is None


def test_only_batches_of_one_epoch_are_compared():
    batches = [(None, at) for at in (7, 8, 9, 0, 1, 2, 3, 0, 1)]
    assert [at for _, at in _of_one_epoch(batches)] == [0, 1, 2, 3]
