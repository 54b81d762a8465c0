"""By how much the learning rate is to be lowered: after a rollback, and for weights that are new."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from lightning_gradflow.findings import FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies.clip_state import follows_size
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.learning_rate import RateFactor, top_rate
from lightning_gradflow.remedies.patient import Patient
from lightning_gradflow.remedies.rate_test import AT_ALL, STEPS, fitting_factor, reached
from lightning_gradflow.remedies.recurrent import GATED
from lightning_gradflow.remedies.training import RehearsalError, Training

USUAL_RATIO = 0.01
"""||step|| / ||weights|| that is usual at the start of a run: ten times what it is later on."""

GATED_RATIO = 0.03
"""The same for gated recurrences, which take larger steps."""

MAX_RATIO = "max_update_ratio"
"""How large a step may be, as a share of the weights, where gradients are clipped to that."""

LARGEST_FACTOR = 0.5
"""For the learning rate: less of a change would not be one."""

_UNKNOWN_FACTOR = 0.1  # for the learning rate, where nothing tells by how much it is too large
_SMALLEST_FACTOR = 1e-6
_FAR_TOO_LARGE = 0.1  # what a trial has to say of the rate of a run that went well with it, not to be chance
_RISEN = 1.5  # times the learning rate of when the run went well

Numbers = dict[str, float]


def slow_down(patient: Patient) -> tuple[Numbers, Numbers] | None:
    """Lowers the learning rate after a rollback, where it is to blame; what changed, the old and the new.

    Where gradients are clipped instead, the new numbers are `MAX_RATIO` alone.

    Returns:
        None where there is nothing to do, or nothing that can be done. Nothing has changed then.
    """
    held, now = patient.held, _own_rate(patient.training)
    before = _rate_facts(held, now)
    factor, cap = _slower(patient)
    # the rate of several groups is not known, and neither is a cap on it
    if not patient.has_past and factor > LARGEST_FACTOR and not cap < LARGEST_FACTOR * before["lr"]:
        return None  # to start once more as before would end as before
    if _is_for_clipping(patient, min(factor, cap / now if 0 < now < math.inf else factor)):
        held.start_clipping(replace(patient.training, history=History()), max_ratio=GATED_RATIO)
        held.rollbacks += 1
        return {}, {MAX_RATIO: GATED_RATIO}
    if (factor < 1 or cap < held.rate.cap) and not RateFactor.can_treat(patient.training.optimizers):
        return None
    held.rate.factor = max(min(factor, held.rate.factor), _SMALLEST_FACTOR)
    held.rate.cap = min(held.rate.cap, cap)
    base = now if now < math.inf else _top_rate(patient.training)
    share = _in_force(held, base) / base if 0 < base < math.inf else 1.0
    held.slowest = min(held.slowest, held.rate.factor, max(share, _SMALLEST_FACTOR))
    held.rollbacks += 1
    return _changed(before, _rate_facts(held, now))


def slow_down_anew(patient: Patient) -> tuple[Numbers, Numbers]:
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
    # a schedule that rises would leave behind what was found
    factor, cap = (1.0, tried * rate) if _rises(training, rate) else _lowered(training, tried)
    held.rate.factor = max(min(factor, held.rate.factor), _SMALLEST_FACTOR)
    held.rate.cap = min(held.rate.cap, cap)
    return _changed(before, _rate_facts(held, rate))


def _is_for_clipping(patient: Patient, slower: float) -> bool:
    """Whether a run that starts once more does as well at its full rate, if gradients are clipped, as at a smaller one.

    That is asked of gated recurrences whose steps are in proportion to the gradient. It is small nearly everywhere and
    huge at cliffs, and a rate that these bear hardly moves the rest (Pascanu et al. 2013).
    """
    held, training = patient.held, patient.training
    is_first = not (patient.has_past or held.rollbacks or held.clipper is not None)
    is_gated = any(isinstance(module, GATED) for module in training.model.modules())
    in_proportion = all(follows_size(optimizer) for optimizer in training.optimizers)
    train = training.pace
    if train is None or not (is_first and is_gated and in_proportion and "clip" in patient.allow):
        return False
    scaling = _coordinates(held)
    try:
        slow = reached(train(slower, STEPS, scaling))
        clipped = reached(train(1.0, STEPS, scaling, GATED_RATIO))
    except RehearsalError:
        return False
    return clipped < math.inf and clipped <= slow + AT_ALL * abs(slow)


def _rate_facts(held: Held, rate: float) -> Numbers:
    return {"lr_factor": held.rate.factor, "max_lr": held.rate.cap, "lr": _in_force(held, rate)}


def _changed(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Numbers, Numbers]:
    changed = [name for name in before if before[name] != after[name]]
    return {n: before[n] for n in changed if math.isfinite(before[n])}, {n: after[n] for n in changed}


def _own_rate(training: Training) -> float:
    """The learning rate that the schedule has set; infinite where there are several, or none that is a number."""
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rate = groups[0].get("lr") if len(groups) == 1 else None
    return float(rate) if isinstance(rate, (Real, Tensor)) else math.inf


def _lowered(training: Training, factor: float) -> tuple[float, float]:
    """The factor and the cap that lower the learning rate by a factor: that of the largest groups, or of all."""
    top = _top_rate(training)
    return (1.0, factor * top) if math.isfinite(top) else (factor, math.inf)


def _top_rate(training: Training) -> float:
    """The learning rate that a trial lowers, where it is that of some groups; NaN where it is that of all."""
    return top_rate([group for optimizer in training.optimizers for group in optimizer.param_groups])


def _in_force(held: Held, rate: float) -> float:
    return min(rate * held.rate.factor, held.rate.cap) if math.isfinite(rate) else math.inf


def _slower(patient: Patient) -> tuple[float, float]:
    """The factor of the learning rate, and what it must not exceed."""
    history, held = patient.training.history, patient.held
    slower = _UNKNOWN_FACTOR * held.slowest
    if not patient.has_past:
        if held.rollbacks:
            return _lowered(patient.training, slower)
        found = _from_the_start(patient.training, held)
        return _lowered(patient.training, slower) if _shows_late(patient, found) else found
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
        if _rises(patient.training, rate):
            return 1.0, min(tried * rate, cap)
        factor, its_cap = _lowered(patient.training, tried)
        return factor, min(its_cap, cap)
    if cap < math.inf:
        return 1.0, cap
    if held.rollbacks:
        return _lowered(patient.training, slower)
    # what broke a run that went well at this rate may have been a batch: it is slowed down for good the next time
    return (LARGEST_FACTOR if patient.finding.cause == "learning_rate_too_large" else 1.0), math.inf


def _shows_late(patient: Patient, found: tuple[float, float]) -> bool:
    """Whether steps became too large so slowly that neither the first ones nor a trial of a few tell by how much.

    So it is with a momentum of 0.999, which takes a thousand steps to gather. Where a batch may be to blame, clipping
    comes next.
    """
    history, (factor, cap), finding = patient.training.history, found, patient.finding
    may_be_a_batch = finding.kind in (FindingKind.NONFINITE_GRADIENT, FindingKind.EXPLODING_GRADIENT)
    if finding.cause != "learning_rate_too_large" or may_be_a_batch or history.rows[-1].step <= 2 * STEPS:
        return False
    return factor > LARGEST_FACTOR and not cap < LARGEST_FACTOR * _own_rate(patient.training)


def _from_the_start(training: Training, held: Held) -> tuple[float, float]:
    """The same for a run that starts once more, from where it began."""
    history, rate = training.history, _own_rate(training)
    rises, tried = _rises(training, rate), _tried(training, held)
    if tried < 1:
        # a schedule that rises would leave behind what was found
        return (1.0, tried * rate) if rises else _lowered(training, tried)
    factor, at = start_factor(history), first_rate(history)
    if rises and factor < 1 and rate > _RISEN * at > 0:
        return 1.0, factor * at
    return factor, math.inf


def _rises(training: Training, rate: float) -> bool:
    """Whether the schedule has raised the learning rate since the start, or above what the optimizer was given.

    What it comes down to afterwards is what was meant to be trained with, and is not to be lowered as well.
    """
    rates = training.history.scalar("lr")
    rates = rates[np.isfinite(rates)]
    if not math.isfinite(rate) or not rates.size:
        return False
    given = training.optimizers[0].param_groups[0].get("initial_lr")  # what a scheduler of torch notes
    is_lifted = isinstance(given, (Real, Tensor)) and rate > _RISEN * float(given) > 0
    return is_lifted or max(rate, float(rates[-1])) > rates[0]


def _tried(training: Training, held: Held) -> float:
    """The factor that does best on batches of the run; 1 where that is not known."""
    train = training.pace
    if train is None:
        return 1.0
    scaling = _coordinates(held)
    try:
        return fitting_factor(lambda factor, steps: train(factor, steps, scaling)) or 1.0
    except RehearsalError:
        return 1.0


def _coordinates(held: Held) -> dict[str, Any] | None:
    return held.coordinates.state_dict() if held.coordinates.is_in_force else None


def start_factor(history: History) -> float:
    """What brings the first step to the size that first steps usually have, at most 1.

    Example:
        >>> history = History()
        >>> start_factor(history)
        0.1
    """
    first = _first_sized(history)
    # the first step that was too large: those that came of it are larger still
    return _UNKNOWN_FACTOR if first is None else min(USUAL_RATIO / first[1], 1.0)


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
