"""What each remedy does to a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.learning_rate import RateFactor
from lightning_gradflow.remedies.readers import centres_behind
from lightning_gradflow.remedies.recurrent import GATED
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.training import RehearsalError, Training

_USUAL_RATIO = 0.01  # ||step|| / ||weights||: ten times what is usual later in a run, and what is usual at its start
_MAX_RATIO = 0.03  # the same at most, for weights that were just drawn anew: gated recurrences take larger steps
_UNKNOWN_FACTOR = 0.1  # for the learning rate, where nothing tells by how much it is too large
_SMALLEST_FACTOR = 1e-6
LARGEST_FACTOR = 0.5  # less of a change would not be one
_RISEN = 1.5  # times the learning rate of when the run went well


@dataclass(frozen=True)
class Treatment:
    """What a remedy has done.

    Args:
        layers: that it changed; empty for all.
        before: numbers from before.
        after: the same from after it.
    """

    layers: tuple[str, ...] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Patient:
    """What a remedy is applied to.

    Args:
        training: the run, between two optimizer steps; where it broke, with its last good weights.
        finding: what is to be cured.
        held: the remedies in force.
        has_past: whether the run had learnt something before.
        good_step: the step of its last good weights; -1 for those that it started from.
        clips: whether gradients may be clipped, too.
    """

    training: Training
    finding: Finding
    held: Held
    has_past: bool
    good_step: int = -1
    clips: bool = False


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
    if patient.held.clipper is not None:
        patient.held.clipper.restart()
    elif patient.clips:
        # the learning rate was not chosen for these weights; while nothing is known of their gradients, only the
        # size of the steps says what is too much
        ratio = _USUAL_RATIO if _is_plain_recurrence(patient, done.layers) else _MAX_RATIO
        patient.held.start_clipping(replace(patient.training, history=History()), max_ratio=ratio)
    return Treatment(done.layers, done.before, done.after)


def _is_plain_recurrence(patient: Patient, layers: Sequence[str]) -> bool:
    """Whether recurrences without gates were drawn anew: what a step changes counts once for each time step there."""
    modules = [patient.training.model.get_submodule(name) for name in layers]
    return patient.finding.cause == "recurrence" and not any(isinstance(module, GATED) for module in modules)


def _recycle(patient: Patient) -> Treatment | None:
    with patient.training.whole() as training:
        done = recycle(training, patient.finding)
    return Treatment(done.layers, done.before, done.after) if done is not None else None


def _scale_inputs(patient: Patient) -> Treatment | None:
    keeps = patient.has_past and inputs_jumped(patient.training.history)
    if patient.has_past and not keeps:
        return None
    with patient.training.whole() as whole:
        # what is rehearsed is whole; what is folded, and trains from then on, are the parts
        training = replace(patient.training, rehearse=whole.rehearse, averaged=whole.averaged)
        done = patient.held.scaling.start(training, keep_function=keeps)
    return Treatment(done.layers, done.before, done.after) if done is not None else None


def _rollback(patient: Patient) -> Treatment | None:
    """The weights have been put back already; what is left is to go on more slowly, where the rate is to blame."""
    held = patient.held
    before = {"lr_factor": held.rate.factor, "max_lr": held.rate.cap}
    factor, cap = _slower(patient)
    if not patient.has_past and factor > LARGEST_FACTOR:
        return None  # to start once more as before would end as before
    if (factor < 1 or cap < held.rate.cap) and not RateFactor.can_treat(patient.training.optimizers):
        return None
    held.rate.factor = max(min(factor, held.rate.factor), _SMALLEST_FACTOR)
    held.rate.cap = min(held.rate.cap, cap)
    held.slowest = min(held.slowest, held.rate.factor)
    held.rollbacks += 1
    after = {"lr_factor": held.rate.factor, "max_lr": held.rate.cap}
    changed = [name for name in before if before[name] != after[name]]
    return Treatment(
        before={name: before[name] for name in changed if math.isfinite(before[name])},
        after={name: after[name] for name in changed},
    )


def _slower(patient: Patient) -> tuple[float, float]:
    """The factor of the learning rate, and what it must not exceed."""
    history, held = patient.training.history, patient.held
    slower = _UNKNOWN_FACTOR * held.slowest
    if not patient.has_past:
        return (slower if held.rollbacks else start_factor(history)), math.inf
    rates = history.scalar("lr")
    before, after = (
        rates[where & np.isfinite(rates)]
        for where in (history.steps <= patient.good_step, history.steps > patient.good_step)
    )
    # one group's rate is what is known: of several it would be the cap of others
    is_one = sum(len(optimizer.param_groups) for optimizer in patient.training.optimizers) == 1
    if is_one and before.size and after.size and after.max() > _RISEN * before[-1] > 0:
        return 1.0, float(before[-1])
    if held.rollbacks:
        return slower, math.inf
    # what broke a run that went well at this rate may have been a batch: it is slowed down for good the next time
    return (LARGEST_FACTOR if patient.finding.cause == "learning_rate_too_large" else 1.0), math.inf


def start_factor(history: History) -> float:
    """What brings the first step to the size that first steps usually have, at most 1.

    Example:
        >>> history = History()
        >>> start_factor(history)
        0.1
    """
    ratios = history["update_ratio"]
    finite = np.where(np.isfinite(ratios) & (ratios > 0), ratios, np.nan)
    finite = finite[~np.isnan(finite).all(axis=1)] if finite.size else finite
    if not finite.size:
        return _UNKNOWN_FACTOR
    # the first step that was too large: those that came of it are larger still
    return min(_USUAL_RATIO / float(np.nanmedian(finite[0])), 1.0)


_TREATMENTS: dict[str, Callable[[Patient], Treatment | None]] = {
    "clip": _clip,
    "reinit": _reinit,
    "recycle": _recycle,
    "rollback": _rollback,
    "scale_inputs": _scale_inputs,
}
