"""Has the run learnt anything yet?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import newest_known
from lightning_gradflow.history import Floats, History

_CLEAR = 2.0  # z score of a fall since the start
_BY_FAR = 0.5  # of the very first loss: what has halved it in a handful of steps has learnt
_NOW = 32  # losses at least that tell where it stands now
_NEWEST = 5  # losses that tell of a fault that has just set in
_SINCE = 30  # losses from which on there is a level to fall back from
_LOST = 0.5  # of what was gained
_SURE = 4.0  # z score of such a fall back: it is asked at every sample
_SAME_OUTPUT = 1e-4  # of its size: far above rounding, far below what a regression with a large offset needs


def has_learnt(history: History, min_learnt: float = 0.05, window: int = 200) -> bool:
    """Whether the training loss is clearly below what it was in the first steps, by something that was learnt.

    The median of the last `window` steps is compared with the medians of the first 10, 30 and 100 losses, beside their
    noise, and with half of the very first loss. Not learnt is

    - what only undoes a rise: the loss must be below the very first one too;
    - what was learnt and lost: the newest five losses have fallen back by more than half of what was gained;
    - a fall to what a constant gives: the network's output is the same for every sample (see `is_blind`).

    Args:
        history: where to read.
        min_learnt: share of the starting loss that must be gone, in (0, 1). By default 5 %: above what the first steps
            gain by mere calibration of the output bias.
        window: steps that tell where the loss stands now, in [1, inf); 32 losses at least are taken, but no more than a
            third of them all.

    Returns:
        False too where there are no losses.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=99, losses=np.linspace(2.3, 1.3, 100)))
        >>> has_learnt(history)
        True
    """
    return history.facts.of_now(("has learnt", min_learnt, window), lambda: _has_learnt(history, min_learnt, window))


def _has_learnt(history: History, min_learnt: float, window: int) -> bool:
    steps, losses = history.loss_steps, history.losses
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    if not losses.size:
        return False
    recent = int((steps > steps[-1] - window).sum())
    # in a short run the last third, or the start would be compared with itself
    now = float(np.median(losses[-min(max(_NOW, recent), max(1, len(losses) // 3)) :]))
    noise = float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0  # near the standard deviation
    first = float(losses[0])
    if now > first - min_learnt * abs(first) + _CLEAR * noise:
        return False
    for count, share in ((1, _BY_FAR), (10, min_learnt), (30, min_learnt), (100, min_learnt)):
        start = float(np.median(losses[: max(1, min(count, len(losses) // 10))]))
        margin = _CLEAR * 1.25 * noise / math.sqrt(max(1, min(count, len(losses) // 10)))
        if start - now > max(share * abs(start), margin):
            return not _falls_back(losses, start, now, noise) and not is_blind(history)
    return False


def is_blind(history: History) -> bool:
    """Whether the network gives the same output for every sample: then all it can have learnt is a constant.

    Asked of the layers in the second half, in order of execution, so that one that is constant by design (a
    temperature, a position embedding) does not decide. Where nothing was measured it is not.
    """
    newest = newest_known(history, "output_spread")
    if newest is None:
        return False
    late = newest[~np.isnan(newest)]
    return bool(late[len(late) // 2 :].max() < _SAME_OUTPUT)


def _falls_back(losses: Floats, start: float, now: float, noise: float) -> bool:
    if len(losses) < _SINCE:
        return False
    risen = float(np.median(losses[-_NEWEST:])) - now
    return risen > max(_LOST * (start - now), _SURE * 1.25 * noise / math.sqrt(_NEWEST))
