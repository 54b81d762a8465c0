"""When did it set in, and what came with it?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import columns_of_layers, layer_mask
from lightning_gradflow.history import Floats, History

_BEFORE, _AFTER = 32, 5  # losses that tell where it stood, and where it stands
_RISEN = 0.05  # of the loss before
_CLEAR = 2.0  # z score of the rise
_LARGE_STEP = 0.03  # of the weight norm: thirty times what is usual
_MOVED = 0.1  # of the weight norm
_ROSE = 1.5  # times the learning rate


def loss_rose(history: History, row: int) -> bool:
    """Whether the newest losses are clearly above those up to a row.

    The median of the last 5 losses against that of the 32 up to the row: above by 5 % and by more than the noise.

    Args:
        history: where to read.
        row: index of the row up to which it was well.

    Returns:
        True too where the newest loss is not finite; False where no losses are known.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=9, losses=np.full(10, 0.3)))
        >>> history.append(Row(step=19, losses=np.full(10, 2.3)))
        >>> loss_rose(history, 0)
        True
    """
    return history.facts.of_now(("loss rose", row), lambda: _loss_rose(history, row))


def _loss_rose(history: History, row: int) -> bool:
    since = history.steps[row]
    steps, losses = history.loss_steps, history.losses
    before, after = losses[steps <= since][-_BEFORE:], losses[steps > since][-_AFTER:]
    before = before[np.isfinite(before)]
    if not before.size or not after.size:
        return False
    if not np.isfinite(after[-1]):
        return True
    level = float(np.median(before))
    noise = float(np.median(np.abs(np.diff(before)))) if len(before) > 1 else 0.0  # near the standard deviation
    risen = float(np.median(after[np.isfinite(after)])) - level
    return risen > max(_RISEN * abs(level), _CLEAR * 1.25 * noise / math.sqrt(len(after)))


def weight_growth(history: History, point: int, row: int) -> float:
    """By which factor the weights before a point have grown since a row.

    Args:
        history: where to read.
        point: index of the point, in order of execution.
        row: index of the row to compare the newest one with.

    Returns:
        The ratio of the weight norms; NaN where one is not known.
    """
    layer = _layer_before(history, point)
    if layer is None:
        return math.nan
    norms: Floats = history["weight_norm"][:, layer]
    is_known = np.isfinite(norms[[row, -1]]).all() and norms[row] > 0
    return float(norms[-1] / norms[row]) if is_known else math.nan


def has_moved(history: History, point: int, row: int) -> bool:
    """Whether a step that was large, or many, moved the weights before a point since a row.

    A sampled step of 3 % of their norm, a norm that changed by 10 %, or a learning rate that rose by half.

    Args:
        history: where to read.
        point: index of the point, in order of execution.
        row: index of the row to compare the newest one with.

    Returns:
        True too where neither steps nor weights were measured.
    """
    layer = _layer_before(history, point)
    if layer is None:
        return True
    ratios, growth = history["update_ratio"][row:, layer], weight_growth(history, point, row)
    rates = history.scalar("lr")[row:]
    if np.isnan(ratios).all() and math.isnan(growth):
        return True
    stepped = bool((ratios >= _LARGE_STEP).any())
    return stepped or abs(growth - 1) >= _MOVED or bool((rates > _ROSE * rates[0]).any())


def _layer_before(history: History, point: int) -> int | None:
    before = np.flatnonzero(layer_mask(history)[: point + 1])
    layer = columns_of_layers(history)[before[-1]] if before.size else -1
    return int(layer) if layer >= 0 else None
