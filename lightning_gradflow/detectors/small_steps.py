"""Are the steps so small that nothing moves?"""

from __future__ import annotations

import numpy as np

from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.rounding import MAX_LOST, lost_share
from lightning_gradflow.detectors.update_sizes import finding_of, largest_of, ratios_of
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import Bools, Floats, History

MIN_REACH = 0.01
"""Share of its norm that some layer must be able to move by in the planned run; see `UpdateRatio`."""

MIN_LEFT = 0.1
"""Of the gradient, by clipping; with less it is the limit that sets the length of the steps."""

_MIN_SAMPLES = 3  # the first step of momentum is a tenth of what is to come, the third a third
_MIN_GAIN = 0.05  # of the loss: what the gradient itself promises for the whole run
_SHORT = 50  # planned steps: a shorter run is a trial of the code
_ENDLESS = 1e5  # steps of a run without an end: most are shorter
_WARM = 50  # steps that a schedule gets before it is judged
_FADED = 0.01  # of the largest learning rate, throughout the last 32 steps and early in the run: not meant to be
_FADED_FOR = 32
_TAIL = 0.1  # of the largest learning rate: below, a schedule is meant to stand still


def too_small(history: History, ratios: Floats, min_reach: float) -> list[Finding]:
    """The finding of the newest row, if there is one; see `UpdateRatio` for the rule.

    Args:
        history: where to read.
        ratios: (R, L) update ratios.
        min_reach: share of its norm that some layer must be able to move by in the planned run, in [0, 1).
    """
    if not ratios.size or np.isnan(ratios[-1]).all():
        return []
    most = largest_of(history)
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
    if steps < _SHORT or largest * steps >= min_reach:
        return []
    if _promise(history, counts) * steps >= _MIN_GAIN or has_learnt(history):
        return []
    evidence = {"update_ratio": largest, "reach": largest * steps, "planned_steps": steps} | clipped_away(history)
    lost = lost_share(history)
    if lost > MAX_LOST:  # of the steps that were meant the weights show nothing
        return [finding_of(history, "rounding", ratios[-1], evidence | {"unchanged_fraction": lost})]
    return [finding_of(history, "learning_rate_too_small", ratios[-1], evidence)]


def clipped_away(history: History) -> dict[str, float]:
    """Evidence of clipping that leaves next to nothing of the newest gradient; empty where it leaves more."""
    left = history.scalar("clip_factor")[-1]
    return {"clip_factor": float(left)} if left < MIN_LEFT else {}


def reaches_of(history: History) -> Floats:
    """(L,) share of its norm by which each layer can move in the planned run; NaN where that is not known.

    Not known is it before the third sample, while a schedule has not shown its learning rate, in a run of less than 50
    steps, and of layers that were zero.
    """
    ratios = ratios_of(history)
    planned = float(history.scalar("planned_steps")[-1])
    steps = planned if planned > 0 else _ENDLESS
    known = (~np.isnan(ratios)).sum(axis=0) >= _MIN_SAMPLES
    if not known.any() or steps < _SHORT or not _at_full_rate(history):
        return np.full(len(known), np.nan)
    return np.where(known, np.fmax.reduce(ratios, axis=0, initial=np.nan) * steps, np.nan)


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
