"""Has the run learnt anything yet?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.history import Floats, History

_CLEAR = 2.0  # z score of a fall since the start
_BY_FAR = 0.5  # of the very first loss: what has halved it in a handful of steps has learnt
_NOW = 32  # losses at least that tell where it stands now


def has_learnt(history: History, min_learnt: float = 0.05, window: int = 200) -> bool:
    """Whether the training loss is clearly below what it was in the first steps.

    The median of the last `window` steps is compared with the medians of the first 10, 30 and 100 losses, beside their
    noise, and with half of the very first loss.

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
    steps, losses = history.loss_steps, history.losses
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    if not losses.size:
        return False
    recent = int((steps > steps[-1] - window).sum())
    # in a short run the last third, or the start would be compared with itself
    now = float(np.median(losses[-min(max(_NOW, recent), max(1, len(losses) // 3)) :]))
    noise = float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0  # near the standard deviation
    for count, share in ((1, _BY_FAR), (10, min_learnt), (30, min_learnt), (100, min_learnt)):
        first: Floats = losses[: max(1, min(count, len(losses) // 10))]
        start = float(np.median(first))
        if start - now > max(share * abs(start), _CLEAR * 1.25 * noise / math.sqrt(len(first))):
            return True
    return False
