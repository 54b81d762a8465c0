"""Are the steps out of proportion to the weights: so small that nothing moves, or so large that nothing stays?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import feature_evidence, offending_features
from lightning_gradflow.detectors.known import first_values
from lightning_gradflow.detectors.overwritten import not_by_steps, overwritten
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.rounding import MAX_LOST, lost_share
from lightning_gradflow.detectors.smothered import was_smothered
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

Bools = npt.NDArray[np.bool_]

_MIN_SAMPLES = 3  # the first step of momentum is a tenth of what is to come, the third a third
_MIN_GAIN = 0.05  # of the loss: what the gradient itself promises for the whole run
_SHORT = 50  # planned steps: a shorter run is a trial of the code
_ENDLESS = 1e5  # steps of a run without an end: most are shorter
_WARM = 50  # steps that a schedule gets before it is judged
_FADED = 0.01  # of the largest learning rate, throughout the last 32 steps and early in the run: not meant to be
_FADED_FOR = 32
_TAIL = 0.1  # of the largest learning rate: below, a schedule is meant to stand still
_AT_ONCE = 2.0  # times max_ratio: what may be judged by the third loss
_WORSE = 3.0  # times the loss at the start: weights that were merely shaken do better within four steps
_NO_BETTER = 1.1  # times the loss at the start, when there was time to recover
_RECOVERED = 32  # steps in which nets with a large first step come back below their starting loss
_LARGE = 0.1  # share of the weights that one step changes: a hundred times what is usual
_USUAL_GAIN = 0.5  # largest singular value; most initialisations give 0.6 to 3
_OVERGROWN = 3.0  # times the norm of the first weights, in the median layer: a ninth of the square is left of them
_GAINED = 0.1  # of the very first loss: less is what outputs gain by becoming a constant
_LEFT = 0.5  # of the very first loss, where it stands since
_STANDS = 0.02  # of the loss, between the third and the last quarter of the run so far
_JUMP = 30.0  # times the run's own update ratio; a restarted schedule makes less of it
_RATE_JUMP = 3.0  # times the largest learning rate so far
_LOOK_BACK = 6  # samples in which a jump is looked for


@dataclass(frozen=True)
class UpdateRatio:
    """Finds steps that cannot get anywhere, and steps that overwrite the weights.

    update ratio of a layer = norm of the step / norm of the weights, from the optimizer's real step. Layers that start
    at zero are left out, for they have no scale. Neither rule depends on the size of the loss.

    Too small: reach = largest update ratio of all layers and samples * planned steps. It bounds how far any layer can
    move in the whole run. It is found from the third sample on if the reach is below `min_reach` and the gradient
    promises to lower the loss by less than 5 % in the planned steps (sum of step norm * gradient norm, over the loss).
    Runs of fewer than 50 planned steps are not judged. Under a schedule only after 50 steps, and not while the learning
    rate rises or is below a tenth of its maximum. A rate that never rose, and in the first half of the run was below a
    hundredth of its maximum for 32 steps, is judged by those steps.

    Too large: the median of the layers was above `max_ratio` in some sample, and the loss is three times what it was at
    the start, or after 32 steps still above it. At the third loss twice `max_ratio` is asked for. A tenth of
    `max_ratio` is enough where, after 50 steps, the weights of the median layer have three times the norm they started
    with, which was no unusually small one, and 90 % of the very first loss is left: what the initialisation was made
    for is gone, and nothing has come of it. So it is where some layer could tell the samples apart in the first row and
    none can any more (see `best_share`): a collapse needs no growth where norms take the size out of the signal. Half
    of the loss is enough where a step was above `max_ratio` and the loss stands still since. Later on it is a jump to
    30 times the run's own ratio, or of the learning rate, that makes the loss three times what it was. Large steps
    alone are no finding: many a network starts with one and learns. Weights that were changed by something else than
    steps are told apart (see `overwritten`). Not judged with several optimizers, whose losses play against each other.

    Args:
        min_reach: share of its norm that some layer must be able to move by in the planned run, in [0, 1). By default
            0.01: of 17 small networks with 4 optimizers each, none with less learnt more than 5 % of what the best
            learning rate did. Even a network in the lazy regime moves by about 0.01.
        max_ratio: share of their norm by which one step may change the weights of the median layer, in (0, inf). By
            default 1: then the step is as large as what it changes.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Chizat et al. 2019, On lazy training in differentiable programming; Karpathy, CS231n, Ratio of weights:updates.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> for step in range(3):
        ...     ratio = {"update_ratio": np.array([1e-7, 2e-7]), "weight_norm": np.ones(2)}
        ...     history.append(Row(step, ratio, {"lr": 1e-8, "planned_steps": 1000.0}))
        >>> [(f.cause, round(f.evidence["reach"], 6)) for f in UpdateRatio().judge(history)]
        [('learning_rate_too_small', 0.0002)]
    """

    min_reach: float = 0.01
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_range("min_reach", self.min_reach, 0, 1, open_low=False)
        check_range("max_ratio", self.max_ratio, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        ratios = _ratios(history)
        if not ratios.size or np.isnan(ratios[-1]).all():
            return []
        return self._too_small(history, ratios) or self._too_large(history, ratios)

    def _too_small(self, history: History, ratios: Floats) -> list[Finding]:
        most = _largest(history)
        # the largest is finite unless something is infinite
        if (~np.isnan(most)).sum() < _MIN_SAMPLES or not (np.isfinite(most).any() or np.isfinite(ratios).any()):
            return []
        counts = np.ones(len(ratios), dtype=bool)
        if _has_faded(history):
            counts = history.steps > history.rows[-1].step - _FADED_FOR
        elif not _at_full_rate(history):
            return []
        largest = float(np.nanmax(most[counts]))
        planned = float(history.scalar("planned_steps")[-1])
        steps = planned if planned > 0 else _ENDLESS
        if steps < _SHORT or largest * steps >= self.min_reach:
            return []
        if _promise(history, counts) * steps >= _MIN_GAIN or has_learnt(history):
            return []
        evidence = {"update_ratio": largest, "reach": largest * steps, "planned_steps": steps}
        clip = history.scalar("clip_factor")
        if np.isfinite(clip[-1]) and clip[-1] < _TAIL:
            evidence["clip_factor"] = float(clip[-1])
        lost = lost_share(history)
        if lost > MAX_LOST:  # of the steps that were meant the weights show nothing
            return [_finding(history, "rounding", ratios[-1], evidence | {"unchanged_fraction": lost})]
        return [_finding(history, "learning_rate_too_small", ratios[-1], evidence)]

    def _too_large(self, history: History, ratios: Floats) -> list[Finding]:
        steps, losses = history.loss_steps, history.losses
        if history.scalar("optimizers")[-1] > 1 or len(losses) < _MIN_SAMPLES or not np.isfinite(losses[-1]):
            return []
        medians = _medians(history)
        return (
            self._from_the_start(history, ratios, medians, losses)
            or self._all_together(history, ratios, medians, losses)
            or self._from_now_on(history, ratios, medians, steps, losses)
            or overwritten(history)
        )

    def _from_the_start(self, history: History, ratios: Floats, medians: Floats, losses: Floats) -> list[Finding]:
        step, start = history.rows[-1].step, abs(float(losses[0]))
        peak = int(np.nanargmax(medians))
        if medians[peak] < self.max_ratio or has_learnt(history):
            return []
        if step < _RECOVERED:
            # a linear model comes back from anywhere
            if (~np.isnan(ratios[peak])).sum() < 2 or (step < 4 and medians[peak] < _AT_ONCE * self.max_ratio):
                return []
            recent = losses[2:][-2:] if step < 8 else losses[-(step // 2) :]
            now, limit = float(recent.min() if step < 8 else np.median(recent)), _WORSE
        else:
            now, limit = float(np.median(losses[-(step // 2) :])), _NO_BETTER
        if not now >= limit * start:
            return []
        evidence = {"update_ratio": float(medians[peak]), "growth": now / start if start > 0 else math.inf, "loss": now}
        return [_too_large(history, -ratios[peak], evidence | _when(history, peak))]

    def _all_together(self, history: History, ratios: Floats, medians: Floats, losses: Floats) -> list[Finding]:
        """Steps that have left next to nothing of the weights that the run started from, and led nowhere."""
        if history.steps[-1] < _WARM or np.isnan(medians).all() or np.nanmax(medians) < _LARGE * self.max_ratio:
            return []
        start = _start_of_steps(history)
        medians, since = medians[start:], losses[history.loss_steps >= history.steps[start]]
        if history.steps[-1] - history.steps[start] < _WARM or np.isnan(medians).all():
            return []
        peak = int(np.nanargmax(medians))
        # not `has_learnt`: such steps raise the loss first, and what only comes down from there would count
        now, first = float(np.median(losses[history.loss_steps > history.steps[-1] - _WARM])), float(since[0])
        with np.errstate(all="ignore"):  # weights that started from zero have no growth
            growth = history["weight_norm"][-1] / history["weight_norm"][start]
        # to grow is the way out for weights that started too small
        usual = history["spectral_norm"][start] >= _USUAL_GAIN
        known = growth[np.isfinite(ratios[start + peak]) & np.isfinite(growth) & usual]
        if medians[peak] < _LARGE * self.max_ratio or not known.size:
            return []
        if np.median(known) < _OVERGROWN and not was_smothered(history, start):
            return []
        is_stuck = medians[peak] >= self.max_ratio and now >= first - _LEFT * abs(first) and _stands(since)
        if not (now >= first - _GAINED * abs(first) or is_stuck):
            return []
        evidence = {"update_ratio": float(medians[peak]), "weight_growth": float(np.median(known)), "loss": now}
        return [_too_large(history, -ratios[start + peak], evidence | _when(history, start + peak))]

    def _from_now_on(
        self, history: History, ratios: Floats, medians: Floats, steps: Floats, losses: Floats
    ) -> list[Finding]:
        at, rates = history.steps, history.scalar("lr")
        if len(at) <= _LOOK_BACK:
            return []
        now = float(np.median(losses[steps > at[-2]])) if (steps > at[-2]).any() else math.nan
        for back in range(2, _LOOK_BACK):
            past, last = medians[:-back], medians[-back:]
            before = losses[steps <= at[-back - 1]][-_WARM:]
            if np.isnan(past).all() or np.isnan(last).all() or len(before) < _MIN_SAMPLES:
                continue
            usual, peak = float(np.nanmedian(past)), float(np.nanmax(last))
            jumps = peak >= self.max_ratio and peak >= _JUMP * usual
            jumps |= bool(rates[-back:].max() > _RATE_JUMP * rates[:-back].max())
            if jumps and now >= _WORSE * abs(float(np.median(before))):
                growth = now / max(abs(float(np.median(before))), 1e-300)
                evidence = {"update_ratio": peak, "growth": growth, "loss": now}
                row = ratios[len(ratios) - back + int(np.nanargmax(last))]
                return [_too_large(history, -row, evidence)]
        return []


def _stands(losses: Floats) -> bool:
    """Whether the loss has not fallen since the third quarter of some."""
    quarter = len(losses) // 4
    if quarter < _WARM // 2:
        return False
    before, now = float(np.median(losses[-2 * quarter : -quarter])), float(np.median(losses[-quarter:]))
    return before - now < _STANDS * abs(before)


def _when(history: History, row: int) -> dict[str, float]:
    """The step of a row that is not the newest."""
    return {} if row == len(history) - 1 else {"largest_step": float(history.steps[row])}


def _start_of_steps(history: History) -> int:
    """The row from which on steps alone have changed the weights: not somebody who drew some of them anew, say."""
    far = not_by_steps(history["weight_norm"], history["update_norm"], history.steps)
    changed = np.flatnonzero(far.any(axis=1))
    return int(changed[-1]) + 1 if changed.size else 0


def overwrites(history: History, row: int, max_ratio: float = 1.0) -> bool:
    """Whether one of the three samples before a row changed the median layer by more than there was of it."""
    recent = _medians(history)[max(0, row - _MIN_SAMPLES) : row]
    return bool((recent >= max_ratio).any())


def _ratios(history: History) -> Floats:
    """(R, L) update ratios, NaN for layers that were zero when they were first seen."""
    ratios, without = history["update_ratio"], _without_scale(history)
    return history.facts.of_now("ratios", lambda: np.where(without, np.nan, ratios)) if without.any() else ratios


def _without_scale(history: History) -> Bools:
    """(L,) layers that were zero when they were first seen."""
    return np.asarray(first_values(history, "weight_norm") == 0)


def _medians(history: History) -> Floats:
    """(R,) the median over the layers; NaN where none was measured."""
    ratios, key = _ratios(history), ("median ratios", _without_scale(history).tobytes())
    return history.facts.of_rows(
        key,
        len(ratios),
        lambda start: np.array(
            [np.median(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in ratios[start:]]
        ),
    )


def _largest(history: History) -> Floats:
    """(R,) the largest one of the layers; NaN where none was measured."""
    ratios, key = _ratios(history), ("largest ratios", _without_scale(history).tobytes())
    return history.facts.of_rows(
        key, len(ratios), lambda start: np.asarray(np.fmax.reduce(ratios[start:], axis=1, initial=np.nan))
    )


def _promise(history: History, counts: Bools) -> float:
    """Share of the loss that the largest of some steps (R,) promised to gain, by the gradient it was made with."""
    updates, norms = history["update_norm"], history["grad_norm"]

    def find(start: int) -> Floats:
        with np.errstate(invalid="ignore", over="ignore"):  # infinity times zero, and twice infinity
            return np.asarray(np.nan_to_num(updates[start:] * norms[start:]).sum(axis=1))

    gains = history.facts.of_rows("promises", len(updates), find)
    losses = np.abs(history.scalar("loss"))
    known = counts & np.isfinite(losses) & (losses > 0)
    return float((gains[known] / losses[known]).max(initial=0.0))


def _at_full_rate(history: History) -> bool:
    """Whether the learning rate is what the run is going to have, or was."""
    rates, epoch = history.scalar("lr"), float(np.nan_to_num(history.scalar("steps_per_epoch")[-1]))
    rates = rates[np.isfinite(rates)]
    constant = not rates.size or bool((rates == rates[0]).all())
    if constant and history.scalar("lr_scheduled")[-1] != 1:
        return True
    step, planned = history.rows[-1].step, float(history.scalar("planned_steps")[-1])
    # schedulers may step once an epoch, and the first epochs of a warm-up may be of next to no rate
    if step < max(_WARM, 2 * epoch) or len(rates) < 2:
        return False
    may_rise = bool((np.diff(rates) > 0).any()) and rates[-1] == rates.max() and not step > planned / 2
    return bool(not may_rise and rates[-1] <= rates[-2] and rates[-1] >= _TAIL * rates.max())


def _has_faded(history: History) -> bool:
    """Whether a schedule has brought the learning rate to next to nothing in the first half of the run."""
    rates, planned = history.scalar("lr"), float(history.scalar("planned_steps")[-1])
    step = history.rows[-1].step
    if not step >= _WARM or not step < planned / 2 or not np.isfinite(rates).all():
        return False
    recent = rates[history.steps > step - _FADED_FOR]
    return bool((np.diff(rates) <= 0).all() and recent.max() < _FADED * rates.max())


def _too_large(history: History, badness: Floats, evidence: dict[str, float]) -> Finding:
    """Whoever feeds inputs of a size that the weights are not made for makes any step too large."""
    if offending_features(history):
        return _finding(history, "unscaled_inputs", badness, evidence | feature_evidence(history))
    return _finding(history, "learning_rate_too_large", badness, evidence)


def _finding(history: History, cause: str, badness: Floats, evidence: dict[str, float]) -> Finding:
    """A warning that names the measured layers, the one with the lowest `badness` (L,) first."""
    order = [int(i) for i in np.argsort(badness, kind="stable") if not np.isnan(badness[i])]
    return Finding(
        kind=FindingKind.UPDATE_RATIO,
        severity=Severity.WARNING,
        step=history.rows[-1].step,
        layers=tuple(history.layers[i] for i in order),
        cause=cause,
        evidence=evidence,
    )
