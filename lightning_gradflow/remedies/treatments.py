"""What each remedy does to a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np
from torch import Tensor

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History
from lightning_gradflow.probes.layers import module_named
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.learning_rate import RateFactor
from lightning_gradflow.remedies.plan import UNTOUCHED
from lightning_gradflow.remedies.rate_test import fitting_factor
from lightning_gradflow.remedies.readers import centres_behind
from lightning_gradflow.remedies.recurrent import GATED
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.reinit import Reinit, reinitialise
from lightning_gradflow.remedies.training import Rehearsal, RehearsalError, Training

_USUAL_RATIO = 0.01  # ||step|| / ||weights||: ten times what is usual later in a run, and what is usual at its start
_MAX_RATIO = 0.03  # the same at most, for weights that were just drawn anew: gated recurrences take larger steps
_UNKNOWN_FACTOR = 0.1  # for the learning rate, where nothing tells by how much it is too large
_SMALLEST_FACTOR = 1e-6
LARGEST_FACTOR = 0.5  # less of a change would not be one
_FAR_TOO_LARGE = 0.1  # what a trial has to say of the rate of a run that went well with it, not to be chance
_RISEN = 1.5  # times the learning rate of when the run went well


@dataclass(frozen=True)
class Treatment:
    """What a remedy has done.

    Args:
        layers: that it changed; empty for all.
        before: numbers from before.
        after: the same from after it.
        note: what else it did.
    """

    layers: tuple[str, ...] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Patient:
    """What a remedy is applied to.

    Args:
        training: the run, between two optimizer steps; where it broke, with its last good weights.
        finding: what is to be cured.
        held: the remedies in force.
        has_past: whether the run had learnt something before.
        good_step: the step of its last good weights; -1 for those that it started from.
        allow: remedies that may be used, out of `plan.REMEDIES`, where one needs another.
    """

    training: Training
    finding: Finding
    held: Held
    has_past: bool
    good_step: int = -1
    allow: Collection[str] = ()


def treat(remedy: str, patient: Patient) -> Treatment | None:
    """Applies a remedy, one of `plan.REMEDIES`; None where it has nothing to do here, and then nothing has changed."""
    try:
        return _TREATMENTS[remedy](patient)
    except RehearsalError:
        return None


def _clip(patient: Patient) -> Treatment | None:
    patient.held.start_clipping(patient.training)
    norms = patient.training.history.scalar("grad_norm_total")
    return Treatment(before={"grad_norm_total": float(norms[-1])} if norms.size else {})


def _reinit(patient: Patient) -> Treatment | None:
    finding = patient.finding
    with patient.training.whole() as training:
        done = reinitialise(training, finding, only_far=finding.cause in ("learning_rate_too_large", "drift"))
        behind = centres_behind(training, done.layers) if done is not None and finding.cause == "recurrence" else {}
    if done is None:
        return None
    patient.held.centre({**behind, **done.centres})
    _clip_new(patient, done.layers)
    before, after = _slow_down(patient)
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after})


def _clip_new(patient: Patient, layers: Sequence[str]) -> None:
    """Clips the gradients of weights that were just drawn: the learning rate was not chosen for them."""
    if patient.held.clipper is not None:
        patient.held.clipper.restart()
    elif "clip" in patient.allow:
        # while nothing is known of their gradients, only the size of the steps says what is too much
        ratio = _USUAL_RATIO if _is_plain_recurrence(patient, layers) else _MAX_RATIO
        patient.held.start_clipping(replace(patient.training, history=History()), max_ratio=ratio)


def _slow_down(patient: Patient) -> tuple[dict[str, float], dict[str, float]]:
    """Lowers the learning rate where a trial says that it is far too large for the new weights; the old, the new.

    Clipping is no help there for optimizers that divide by the size of the gradients.
    """
    held, training = patient.held, patient.training
    if "rollback" not in patient.allow or not RateFactor.can_treat(training.optimizers):
        return {}, {}
    tried, rate = _tried(training, held), _own_rate(training)
    if not tried < _FAR_TOO_LARGE:
        return {}, {}
    before = _rate_facts(held, rate)
    if _rises(training, rate):
        held.rate.cap = min(held.rate.cap, tried * rate)
    else:
        held.rate.factor = max(min(tried, held.rate.factor), _SMALLEST_FACTOR)
    return _changed(before, _rate_facts(held, rate))


def _rate_facts(held: Held, rate: float) -> dict[str, float]:
    return {"lr_factor": held.rate.factor, "max_lr": held.rate.cap, "lr": _in_force(held, rate)}


def _changed(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    changed = [name for name in before if before[name] != after[name]]
    return {n: before[n] for n in changed if math.isfinite(before[n])}, {n: after[n] for n in changed}


def _is_plain_recurrence(patient: Patient, layers: Sequence[str]) -> bool:
    """Whether recurrences without gates were drawn anew: what a step changes counts once for each time step there."""
    modules = [module_named(patient.training.model, name) for name in layers]
    return patient.finding.cause == "recurrence" and not any(isinstance(module, GATED) for module in modules)


def _recycle(patient: Patient) -> Treatment | None:
    with patient.training.whole() as training:
        done = recycle(training, patient.finding)
    return Treatment(done.layers, done.before, done.after) if done is not None else None


def _scale_inputs(patient: Patient) -> Treatment | None:
    """Unscaled inputs hide what else is wrong: what is far off any usual size on scaled ones is drawn anew with it."""
    keeps = patient.has_past and inputs_jumped(patient.training.history)
    if patient.has_past and not keeps and (patient.finding.kind, patient.finding.cause) != UNTOUCHED:
        return None
    with patient.training.whole() as whole:
        # what is rehearsed is whole; what is folded, and trains from then on, are the parts
        training = replace(patient.training, rehearse=whole.rehearse, averaged=whole.averaged)
        drawn: list[Reinit] = []
        draws = "reinit" in patient.allow and not keeps and whole is patient.training

        def draw(rehearse: Rehearsal) -> None:
            scaled = replace(training, rehearse=rehearse)
            far = reinitialise(scaled, patient.finding, only_far=True)
            # where one is far off, the others were drawn as badly
            rest = reinitialise(scaled, patient.finding) if far is not None else None
            drawn.extend(anew for anew in (far, rest) if anew is not None)

        done = patient.held.scaling.start(training, keep_function=keeps, before_fold=draw if draws else None)
    if done is None:
        return None
    for anew in drawn:
        patient.held.centre(anew.centres)
        _clip_new(patient, anew.layers)
    before, after = _slow_down(patient) if not keeps else ({}, {})
    names = dict.fromkeys(name for anew in drawn for name in anew.layers)
    note = f"drawn anew as well: {', '.join(names)}" if names else ""
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after}, note)


def _rollback(patient: Patient) -> Treatment | None:
    """The weights have been put back already; what is left is to go on more slowly, where the rate is to blame."""
    held, now = patient.held, _own_rate(patient.training)
    before = _rate_facts(held, now)
    factor, cap = _slower(patient)
    # the rate of several groups is not known, and neither is a cap on it
    if not patient.has_past and factor > LARGEST_FACTOR and not cap < LARGEST_FACTOR * before["lr"]:
        return None  # to start once more as before would end as before
    if (factor < 1 or cap < held.rate.cap) and not RateFactor.can_treat(patient.training.optimizers):
        return None
    held.rate.factor = max(min(factor, held.rate.factor), _SMALLEST_FACTOR)
    held.rate.cap = min(held.rate.cap, cap)
    held.slowest = min(held.slowest, held.rate.factor)
    held.rollbacks += 1
    before, after = _changed(before, _rate_facts(held, now))
    return Treatment(before=before, after=after)


def _own_rate(training: Training) -> float:
    """The learning rate that the schedule has set; infinite where there are several, or none that is a number."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rate = groups[0].get("lr") if len(groups) == 1 else None
    return float(rate) if isinstance(rate, (Real, Tensor)) else math.inf


def _in_force(held: Held, rate: float) -> float:
    return min(rate * held.rate.factor, held.rate.cap) if math.isfinite(rate) else math.inf


def _slower(patient: Patient) -> tuple[float, float]:
    """The factor of the learning rate, and what it must not exceed."""
    history, held = patient.training.history, patient.held
    slower = _UNKNOWN_FACTOR * held.slowest
    if not patient.has_past:
        return (slower, math.inf) if held.rollbacks else _from_the_start(patient.training, held)
    rates = history.scalar("lr")
    before, after = (
        rates[where & np.isfinite(rates)]
        for where in (history.steps <= patient.good_step, history.steps > patient.good_step)
    )
    # one group's rate is what is known: of several it would be the cap of others
    rate = _own_rate(patient.training)
    cap = math.inf
    if math.isfinite(rate) and before.size and after.size and after.max() > _RISEN * before[-1] > 0:
        cap = float(before[-1])
    tried = _tried(patient.training, held)
    if tried < _FAR_TOO_LARGE:
        return (1.0, min(tried * rate, cap)) if _rises(patient.training, rate) else (tried, cap)
    if cap < math.inf:
        return 1.0, cap
    if held.rollbacks:
        return slower, math.inf
    # what broke a run that went well at this rate may have been a batch: it is slowed down for good the next time
    return (LARGEST_FACTOR if patient.finding.cause == "learning_rate_too_large" else 1.0), math.inf


def _from_the_start(training: Training, held: Held) -> tuple[float, float]:
    """The same for a run that starts once more, from where it began."""
    history, rate = training.history, _own_rate(training)
    rises, tried = _rises(training, rate), _tried(training, held)
    if tried < 1:
        # a schedule that rises would leave behind what was found
        return (1.0, tried * rate) if rises else (tried, math.inf)
    factor, at = start_factor(history), first_rate(history)
    if rises and factor < 1 and rate > _RISEN * at > 0:
        return 1.0, factor * at
    return factor, math.inf


def _rises(training: Training, rate: float) -> bool:
    """Whether the schedule has raised the learning rate since the start."""
    rates = training.history.scalar("lr")
    rates = rates[np.isfinite(rates)]
    return math.isfinite(rate) and rates.size > 0 and max(rate, float(rates[-1])) > rates[0]


def _tried(training: Training, held: Held) -> float:
    """The factor that does best on batches of the run; 1 where that is not known."""
    train = training.pace
    if train is None:
        return 1.0
    scaling = held.scaling.state_dict() if held.scaling.layers else None
    try:
        return fitting_factor(lambda factor, steps: train(factor, steps, scaling)) or 1.0
    except RehearsalError:
        return 1.0


def start_factor(history: History) -> float:
    """What brings the first step to the size that first steps usually have, at most 1.

    Example:
        >>> history = History()
        >>> start_factor(history)
        0.1
    """
    first = _first_sized(history)
    # the first step that was too large: those that came of it are larger still
    return _UNKNOWN_FACTOR if first is None else min(_USUAL_RATIO / first[1], 1.0)


def first_rate(history: History) -> float:
    """The learning rate of the step that `start_factor` goes by; NaN where that is not known."""
    first = _first_sized(history)
    return math.nan if first is None else float(history.scalar("lr")[first[0]])


def _first_sized(history: History) -> tuple[int, float] | None:
    """The first row that tells how large its step was, and the median over its layers."""
    ratios = history["update_ratio"]
    finite = np.where(np.isfinite(ratios) & (ratios > 0), ratios, np.nan)
    known = np.flatnonzero(~np.isnan(finite).all(axis=1)) if finite.size else np.array([], dtype=int)
    return (int(known[0]), float(np.nanmedian(finite[known[0]]))) if known.size else None


_TREATMENTS: dict[str, Callable[[Patient], Treatment | None]] = {
    "clip": _clip,
    "reinit": _reinit,
    "recycle": _recycle,
    "rollback": _rollback,
    "scale_inputs": _scale_inputs,
}
