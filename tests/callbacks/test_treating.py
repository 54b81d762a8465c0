"""The mitigator in a fit: when it acts, on what, and what it leaves as it was."""

import logging
import random
import warnings
from collections import UserDict
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlowWarning
from lightning_gradflow.border import RAISE_VARIABLE
from lightning_gradflow.findings import FindingKind
from lightning_gradflow.remedies import slowing, treatments
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.learning_rate import RateFactor
from lightning_gradflow.sinks.base import Sink
from tests.callbacks.treated import (
    EXPLODES,
    SICK,
    STAYS_SICK,
    TOO_FAST,
    Doctor,
    Each,
    Net,
    Says,
    Steady,
    buffers,
    weights,
)
from tests.integration.traces import data, fit, traces

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile looks at it
]


SICK_LATER = Says(start=32, end=33)


def _told(actions):
    return [(action.kind, action.outcome, action.step, action.decided_step) for action in actions]


@pytest.fixture
def as_users_have_it(monkeypatch):
    monkeypatch.delenv(RAISE_VARIABLE)


@pytest.fixture
def seen(monkeypatch):
    """What every call of the training step was given, those of copies too."""
    calls = []
    monkeypatch.setattr(Net, "seen", calls)
    return calls


@pytest.fixture
def any_step_is_too_large(monkeypatch):
    """What is made up is that the rate is too large: the real steps are small ones."""
    monkeypatch.setattr(slowing, "USUAL_RATIO", 1e-6)


def _unscaled():
    """The data in another unit, far from 0."""
    x, y = data().dataset.tensors
    return DataLoader(TensorDataset(1000 * x + 5000, y), 4)


# -- when it acts, and who hears of it


def test_a_remedy_is_tried_for_a_while_and_then_kept():
    doctor = Doctor(SICK)
    fit([doctor], Net(), max_epochs=3)
    assert _told(doctor.actions) == [("reinit", "kept", 4, 20)]


def test_a_remedy_that_does_not_help_is_taken_back_and_the_weights_are_those_from_before():
    model = Steady()
    early, doctor, each = Each(weights), Doctor(STAYS_SICK, allow=("reinit",)), Each(weights)
    fit([early, doctor, each], model, max_epochs=3)
    before = early.kept[4]
    assert _told(doctor.actions) == [("reinit", "rolled_back", 4, 20)]
    assert not torch.equal(each.kept[4], before)
    assert torch.equal(each.kept[20], before)
    torch.testing.assert_close(weights(model), before)


def test_every_output_hears_of_an_action_and_of_what_came_of_it():
    heard = []

    class Keeps(Sink):
        name = "a list"

        def on_action(self, action, view):
            heard.append((action.outcome, action.decided_step, view.actions[-1] == action))

    class Adds(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                doctor._session.recorder.sinks.append(Keeps())

    doctor = Doctor(SICK)
    fit([doctor, Adds()], Net(), max_epochs=3)
    assert heard == [("applied", None, True), ("kept", 20, True)]


@pytest.mark.parametrize("batches", [3, 4])
def test_with_accumulation_it_acts_only_between_two_steps(batches):
    steps = []
    doctor, each = Doctor(STAYS_SICK, every_n_steps=1), Each(weights)
    counts = Each(lambda module: steps.append(module.trainer.global_step))
    fit([doctor, each, counts], Steady(), max_epochs=12, accumulate_grad_batches=batches)
    changed = [i for i in range(1, len(steps)) if not torch.equal(each.kept[i], each.kept[i - 1])]
    moved = [i for i in changed if (each.kept[i] - each.kept[i - 1]).abs().max() > 1e-6]
    assert doctor.actions
    assert moved
    assert all(steps[i] > steps[i - 1] for i in changed)


def test_each_action_and_each_verdict_is_told_in_a_line(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit([Doctor(SICK)], Net(), max_epochs=3)
    lines = [line for record in caplog.records if (line := record.getMessage()).startswith("lightning_gradflow: step")]
    assert [line.split(":")[1] for line in lines] == [" step 4", " step 20"]
    assert "on trial" in lines[0]
    assert "step 20: kept" in lines[1]
    assert "on trial" not in lines[1]


def test_what_is_not_allowed_is_told_once():
    told = _warnings([Doctor(STAYS_SICK, allow=("clip",))], max_epochs=3)
    assert len([text for text in told if "would fit, and may not be used" in text]) == 1


# -- a rehearsal leaves no trace


def _surroundings(module):
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002 - what users may draw from
        "python": torch.tensor(random.getstate()[1]),
        "buffers": buffers(module),
        "calls": torch.tensor(module.calls),
        "logged": torch.stack([v for k, v in sorted(module.trainer.callback_metrics.items())]),
        "mode": torch.tensor([m.training for m in module.modules()]),
    }


def test_a_rehearsal_changes_nothing_but_the_weights(seen):
    before, after, counts = Each(_surroundings), Each(_surroundings), Each(lambda _: len(seen))
    lengths = []
    doctor = Doctor(SICK, allow=("reinit",))  # not to go back, which brings the buffers back too
    early = Each(lambda _: lengths.append(len(seen)))
    fit([before, early, doctor, after, counts], Net())
    assert [kind for kind, *_ in _told(doctor.actions)] == ["reinit"]
    assert counts.kept[4] > lengths[4]  # else there was no rehearsal
    assert all(n == m for i, (n, m) in enumerate(zip(lengths, counts.kept, strict=True)) if i != 4)
    for mine, theirs in zip(before.kept, after.kept, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_rehearsal_calls_no_hook_of_the_user():
    heard = []
    model = Net()
    model.net[0].register_forward_hook(lambda *_: heard.append(1))
    fit([Doctor(SICK)], model)
    assert len(heard) == 12


def test_a_rehearsal_sees_the_batch_as_the_training_step_got_it(seen):
    class Changes(Net):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(10.0)
            return super().training_step(batch, batch_idx)

    fit([Doctor(SICK, allow=("reinit", "clip"))], Changes())  # a trial of the rate sees other batches too
    fifth = 10 * list(data())[4][0]
    rehearsed = seen[5:-7]
    assert len(rehearsed) > 0
    assert all(torch.equal(x, fifth) for x in rehearsed)


class _Pops(Net):
    """Takes its batch out of a mapping that is no dict, and leaves it empty."""

    def training_step(self, batch, batch_idx):
        return super().training_step([batch.pop("x"), batch.pop("y")], batch_idx)


def test_a_rehearsal_has_a_batch_that_the_training_step_has_emptied(seen):
    def together(pairs):
        x, y = zip(*pairs, strict=True)
        return UserDict(x=torch.stack(x), y=torch.stack(y))

    train = DataLoader(data().dataset, 4, collate_fn=together)
    doctor = Doctor(SICK, allow=("reinit",))
    with mock.patch("lightning_gradflow.remedies.reinit._by_the_book", wraps=_by_the_book) as book:
        fit([doctor], _Pops(), train=train)
    assert [(action.kind, action.step) for action in doctor.actions] == [("reinit", 4)]
    assert book.call_count == 0
    assert len(seen) > 13
    assert all(torch.equal(x, list(data())[4][0]) for x in seen[5:-7])


class _Once(Net):
    """Its training step can't be called a second time."""

    last = -1

    def training_step(self, batch, batch_idx):
        if batch_idx == self.last:
            raise RuntimeError("the data is gone")
        self.last = batch_idx
        return super().training_step(batch, batch_idx)


class _Handle(Net):
    """Holds something that can't be copied."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lines = (line for line in "abc")


class _Manual(Net):
    """Makes its own steps, with two optimizers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        first, *rest = self.net.children()
        others = [p for layer in rest for p in layer.parameters()]
        return [torch.optim.SGD(first.parameters(), lr=0.05), torch.optim.Adam(others, lr=0.01)]


class _Searches(Net):
    """Its optimizer calls the training step itself."""

    def __init__(self):
        super().__init__(lr=1e-3, optimizer=torch.optim.LBFGS)


class _GoesPast(_Manual):
    """Steps once more with an optimizer of the Trainer, which is the same for a copy."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.trainer.optimizers[1].step()


@pytest.mark.parametrize("kind", [_Manual, _Searches])
def test_where_the_training_step_makes_steps_none_is_made_in_a_rehearsal(kind, seen):
    class Counts(L.Callback):
        steps = 0

        def on_train_start(self, trainer, pl_module):
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self.add)

        def add(self, *_):
            self.steps += 1

    counts, doctor = [], Doctor(SICK)
    for callbacks in ([doctor], []):
        counter = Counts()
        fit([*callbacks, counter], kind())
        counts.append((counter.steps, len(seen)))
        seen.clear()
    (steps, calls), (plain_steps, plain_calls) = counts
    assert [action.kind for action in doctor.actions] == ["reinit"]
    assert steps == plain_steps
    if kind is _Manual:  # the other one calls its step as often as it needs to
        assert calls > plain_calls


@pytest.mark.parametrize("kind", [_Once, _Handle, _GoesPast])
def test_where_nothing_can_be_rehearsed_layers_are_drawn_by_the_book(kind):
    model, doctor, each = kind(), Doctor(SICK), Each(weights)
    with mock.patch("lightning_gradflow.remedies.reinit._by_the_book", wraps=_by_the_book) as book:
        trainer = fit([doctor, each], model)
    assert book.call_count == 1
    assert [(action.kind, action.layers) for action in doctor.actions] == [("reinit", ("net.0", "net.2"))]
    assert trainer.global_step >= 12
    assert not traces(model, *trainer.optimizers)


from lightning_gradflow.remedies.reinit import _by_the_book  # noqa: E402

# -- the ways to train

WAYS = {
    "automatic": (Net, {}),
    "manual": (_Manual, {}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "clipped": (Net, {"gradient_clip_val": 0.01}),
    "scheduled": (lambda: Net(schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)), {}),
    "adam": (lambda: Net(optimizer=torch.optim.Adam), {}),
    "fused": (lambda: Net(optimizer=lambda *a, **k: torch.optim.Adam(*a, fused=True, **k)), {}),
    "accumulated": (Net, {"accumulate_grad_batches": 2, "max_epochs": 6}),
    "epochs of a step": (lambda: Net(lr=1e-4), {"limit_train_batches": 1, "max_epochs": 36}),
}


def _scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)}


def _compiled():
    model = Net()
    model.net = torch.compile(model.net, backend="eager")
    return model


WAYS["scaled"] = (Net, _scaled)
WAYS["compiled"] = (_compiled, {})


@pytest.mark.usefixtures("any_step_is_too_large")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_in_force_leaves_learning_rates_and_hooks_as_they_were(way):
    """Clipping, a lower rate, and then new weights, one after the other."""
    build, kwargs = WAYS[way]
    kwargs = kwargs() if callable(kwargs) else kwargs
    prefix = "net._orig_mod." if way == "compiled" else "net."
    doctor = Doctor(
        Says(FindingKind.EXPLODING_GRADIENT, "unknown", 0, 1),
        Says(FindingKind.UPDATE_RATIO, "learning_rate_too_large", 0, 30),
        max_actions=2,
        allow=("clip", "rollback"),
    )
    rates = []
    for callbacks in ([doctor], []):
        model = build()
        each = Each(lambda module: [optimizer.param_groups[0]["lr"] for optimizer in module.trainer.optimizers])
        trainer = fit([*callbacks, each], model, **{"max_epochs": 3, **kwargs})
        rates.append(each.kept)
        assert all(name.startswith(prefix) for name, _ in model.net.named_parameters(prefix="net"))
        assert torch.isfinite(weights(model)).all()
        assert not traces(model, *trainer.optimizers)
    assert rates[0] == rates[1]
    assert {kind for kind, *_ in _told(doctor.actions)} == {"clip", "rollback"}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_layers_are_drawn_anew_whatever_the_way_to_train(way):
    build, kwargs = WAYS[way]
    kwargs = kwargs() if callable(kwargs) else kwargs
    model, doctor = build(), Doctor(SICK)
    before = [p.detach().clone() for p in model.net.parameters()]
    trainer = fit([doctor], model, **{"max_epochs": 3, **kwargs})
    assert [(kind, step) for kind, _, step, _ in _told(doctor.actions)] == [("reinit", 4)]
    assert (model.net[0].weight - before[0]).abs().max() > 0.1
    assert torch.isfinite(weights(model)).all()
    assert not traces(model, *trainer.optimizers)


def test_a_compiled_network_is_drawn_from_data():
    @torch.no_grad()
    def gains(model):
        return model.net[0].weight.std().item()

    class Watches(Says):
        def judge(self, history):
            from dataclasses import replace

            return [replace(f, layers=("net._orig_mod.0", "net._orig_mod.2")) for f in super().judge(history)]

    model, plain = _compiled(), Net()
    doctor, other = Doctor(Watches()), Doctor(SICK)
    one, two = Each(weights), Each(weights)
    fit([doctor, one], model)
    fit([other, two], plain)
    assert [action.kind for action in doctor.actions] == ["reinit"]
    torch.testing.assert_close(one.kept[4], two.kept[4], atol=1e-5, rtol=1e-4)


def test_the_measured_step_is_that_of_the_weights_though_they_train_in_other_coordinates():
    """What a remedy does for the time of a step must not look like a large update."""

    def far(model):
        model.norm = nn.Identity()
        return model

    doctor = Doctor(Says(FindingKind.DEAD_UNITS, "unscaled_inputs"), every_n_steps=1)
    each = Each(lambda module: module.net[0].weight.detach().clone())
    fit([doctor, each], far(Net(lr=1e-3)), train=_unscaled())
    assert [action.kind for action in doctor.actions] == ["scale_inputs"]
    ratios = doctor.history["update_ratio"][:, list(doctor.history.layers).index("net.0")]
    norms = doctor.history["weight_norm"][:, list(doctor.history.layers).index("net.0")]
    for step in range(5, 12):
        moved = (each.kept[step] - each.kept[step - 1]).norm()
        assert ratios[step] * norms[step] >= 0.99 * moved  # the bias moves too
        assert ratios[step] < 1


# -- averages of weights


def _warnings(callbacks, **kwargs):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(callbacks, Net(), **kwargs)
    return [str(w.message) for w in told if issubclass(w.category, GradFlowWarning)]


def _averages():
    found = [StochasticWeightAveraging(swa_lrs=0.01)]
    if hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):  # from Lightning 2.6 on
        found.append(L.pytorch.callbacks.EMAWeightAveraging())
    return found


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@pytest.mark.parametrize("callback", _averages(), ids=lambda callback: type(callback).__name__)
def test_an_average_of_the_weights_is_told_once(callback):
    told = _warnings([Doctor(SICK), callback], max_epochs=3)
    about = [text for text in told if "averages the weights" in text]
    assert len(about) == 1
    assert type(callback).__name__ in about[0]


def test_without_an_average_nothing_is_told_of_one():
    assert not [text for text in _warnings([Doctor(SICK)]) if "averages" in text]


# -- one fit after the other


@pytest.mark.usefixtures("any_step_is_too_large")
def test_a_second_fit_goes_on_with_what_is_in_force():
    doctor, model = Doctor(EXPLODES, TOO_FAST, max_actions=1, allow=("rollback",)), Net()
    trainer = fit([doctor], model, max_epochs=3)
    factor = doctor.actions[0].after["lr_factor"]
    factors = []

    def note(module):
        return [hook for o in module.trainer.optimizers for hook in o._optimizer_step_pre_hooks.values()]

    each = Each(lambda module: factors.append(len(note(module))))
    trainer.callbacks.append(each)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data())
    assert factor < 1
    assert factors == [1] * 12
    assert len(doctor.actions) == 1
    assert not traces(model, *trainer.optimizers)


@pytest.mark.parametrize(("found", "outcome"), [(SICK, "kept"), (STAYS_SICK, "rolled_back")])
def test_a_trial_that_the_end_of_a_fit_interrupts_is_decided_in_the_next(found, outcome):
    doctor, model = Doctor(found, allow=("reinit",)), Steady()
    trainer = fit([doctor], model)
    assert _told(doctor.actions) == [("reinit", "applied", 4, None)]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data())
    assert _told(doctor.actions) == [("reinit", outcome, 4, 20)]


def test_after_an_error_the_next_fit_has_a_mitigator_again(as_users_have_it):
    doctor, model = Doctor(Says(start=2, end=30)), Net()
    with mock.patch.dict(treatments._TREATMENTS, reinit=mock.Mock(side_effect=ZeroDivisionError)):
        trainer = fit([doctor], model)
    assert doctor.actions == ()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data())
    assert [action.kind for action in doctor.actions] == ["reinit"]


# -- errors


class _Dies(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 10:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


class _DiesInBackward(Net):
    def on_after_backward(self):
        if self.global_step == 10:
            raise RuntimeError("out of luck")


class _DiesBeforeItsStep(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.global_step == 10:
            raise RuntimeError("out of luck")


@pytest.mark.usefixtures("any_step_is_too_large")
@pytest.mark.parametrize("kind", [_Dies, _DiesInBackward, _DiesBeforeItsStep])
@pytest.mark.parametrize("found", [TOO_FAST, Says(FindingKind.DEAD_UNITS, "unscaled_inputs")], ids=lambda f: f.cause)
def test_a_run_that_dies_has_its_learning_rate_back_and_no_hook_left(kind, found):
    model, doctor = kind(lr=1e-3), Doctor(found, allow=("rollback", "scale_inputs"))
    model.norm = nn.Identity()
    rates = []
    optimizers = []
    each = Each(lambda module: (rates.append(weights(module)), optimizers.append(module.trainer.optimizers[0])))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit([doctor, each], model, train=_unscaled())
    assert len(doctor.actions) == 1
    assert optimizers[-1].param_groups[0]["lr"] == 1e-3
    assert not traces(model, optimizers[-1])
    torch.testing.assert_close(weights(model), rates[-1], rtol=1e-5, atol=1e-6)


def _spoils(patient):
    patient.training.model.net[0].weight.data.fill_(7.0)
    patient.held.rate.factor = 0.5
    raise ZeroDivisionError("on purpose")


def test_an_error_in_a_remedy_is_told_once_and_the_run_is_the_plain_one(as_users_have_it):
    plain = Net()
    fit([], plain, max_epochs=3)
    model, doctor = Net(), Doctor(Says(start=4, end=30))
    with warnings.catch_warnings(record=True) as told, mock.patch.dict(treatments._TREATMENTS, reinit=_spoils):
        warnings.simplefilter("always")
        trainer = fit([doctor], model, max_epochs=3)
    said = [str(w.message) for w in told if "switched off" in str(w.message)]
    assert len(said) == 1
    assert "the mitigator is switched off (ZeroDivisionError: on purpose)" in said[0]
    assert torch.equal(weights(model), weights(plain))
    assert doctor.actions == ()
    assert len(doctor.history) > 8  # the rest goes on
    assert not traces(model, *trainer.optimizers)


def test_an_error_in_a_remedy_in_force_ends_it_and_the_run_goes_on(as_users_have_it):
    model, doctor = Net(), Doctor(EXPLODES)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with mock.patch.object(Clipper, "before_step", side_effect=ZeroDivisionError("on purpose")):
            trainer = fit([doctor], model, max_epochs=2)
    said = [str(w.message) for w in told if "switched off" in str(w.message)]
    assert len(said) == 1
    assert trainer.global_step == 24
    assert not traces(model, *trainer.optimizers)


@pytest.mark.usefixtures("any_step_is_too_large")
def test_where_the_monitor_fails_what_is_in_force_ends_too(as_users_have_it):
    model, doctor = Net(), Doctor(TOO_FAST, allow=("rollback",))
    hooks = []

    class Breaks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hooks.append(len(trainer.optimizers[0]._optimizer_step_pre_hooks))
            if trainer.global_step == 8:
                patch.start()

    patch = mock.patch("lightning_gradflow.callbacks.sampler.Sampler.end_batch", side_effect=ZeroDivisionError)
    try:
        trainer = fit([doctor, Breaks()], model)
    finally:
        patch.stop()
    assert hooks == [0] * 5 + [1] * 4 + [0] * 3
    assert trainer.global_step == 12
    assert not traces(model, *trainer.optimizers)


def test_an_error_while_it_begins_leaves_the_rest_at_work(as_users_have_it):
    doctor = Doctor(SICK)
    with mock.patch.object(RateFactor, "__init__", side_effect=ZeroDivisionError("on purpose")):
        fit([doctor], Net())
    assert doctor.actions == ()
    assert len(doctor.history) > 3


@pytest.mark.usefixtures("any_step_is_too_large")
def test_a_rehearsal_that_would_step_with_the_optimizers_of_the_run_leaves_the_learning_rate_whole():
    doctor, model = Doctor(TOO_FAST, SICK_LATER, allow=("rollback", "reinit")), _GoesPast()
    each = Each(lambda module: [optimizer.param_groups[0]["lr"] for optimizer in module.trainer.optimizers])
    fit([doctor, each], model, max_epochs=4)
    assert {action.kind for action in doctor.actions} == {"rollback", "reinit"}
    assert each.kept == [[0.05, 0.01]] * 48
