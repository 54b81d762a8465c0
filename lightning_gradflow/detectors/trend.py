"""Robust slopes and trend tests."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from lightning_gradflow.history import Floats, Ints

_MAX_POINTS = 400  # 80,000 pairs; more points do not make a median slope better, only slower


def theil_sen(x: Floats, y: Floats) -> float:
    """The median slope over all pairs of points: a line that a quarter of wild points does not move.

    Args:
        x: (N,) positions, not all equal.
        y: (N,) finite values. Of more than 400 points an even selection is used.

    Returns:
        The slope, or NaN where no pair of different positions exists.

    References:
        Sen 1968, Estimates of the regression coefficient based on Kendall's tau.

    Example:
        >>> theil_sen(np.arange(5.0), np.array([0.0, 2.0, 4.0, 6.0, 1000.0]))
        2.0
    """
    if len(x) > _MAX_POINTS:
        pick = np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(np.int64)
        x, y = x[pick], y[pick]
    i, j = _pairs(len(x))
    dx, dy = x[j] - x[i], y[j] - y[i]
    slopes = dy / dx if dx.all() else dy[dx != 0] / dx[dx != 0]
    return float(np.median(slopes)) if slopes.size else math.nan


def mann_kendall(y: Floats) -> float:
    """How sure it is that a series has a monotone trend: the z score of the Mann-Kendall test.

    Args:
        y: (N,) finite values in order of time, N >= 2.

    Returns:
        z, standard normal for a series without a trend; negative where it falls. 0 for fewer than two values or a
        constant series.

    References:
        Mann 1945, Nonparametric tests against trend; Kendall 1975, Rank correlation methods (with ties).

    Example:
        >>> round(mann_kendall(np.array([5.0, 4.0, 3.0, 2.0, 1.0])), 3)
        -2.205
    """
    n = len(y)
    i, j = _pairs(n)
    score = float(np.sign(y[j] - y[i]).sum())
    _, ties = np.unique(y, return_counts=True)
    variance = _variance(np.array([n])) - _variance(ties)
    if variance <= 0 or score == 0:
        return 0.0
    return (score - math.copysign(1.0, score)) / math.sqrt(variance)


def steepest_fall(x: Floats, y: Floats, seasons: Ints, z: float) -> float:
    """The lowest slope that the noise of a series leaves room for: Sen's lower confidence limit, by seasons.

    Only points of the same season are compared, so that what returns in every period is no trend. No distribution of
    the noise is assumed, and a wild point counts as one point.

    Args:
        x: (N,) positions.
        y: (N,) finite values.
        seasons: (N,) the place of each point in its period; all equal for a series without one.
        z: how sure, as a standard normal score: at 3, once in 740 series the true slope is lower.

    Returns:
        The slope, or -inf where there are too few pairs to be so sure.

    References:
        Sen 1968; Hirsch, Slack and Smith 1982, Techniques of trend analysis for monthly water quality data.

    Example:
        >>> steepest_fall(np.arange(9.0), -np.arange(9.0), np.zeros(9, dtype=int), z=2)
        -1.0
    """
    i, j = _pairs(len(x))
    pairs = (seasons[i] == seasons[j]) & (x[i] != x[j])
    i, j = i[pairs], j[pairs]
    if not len(i):
        return -math.inf
    slopes = np.sort((y[j] - y[i]) / (x[j] - x[i]))
    _, sizes = np.unique(seasons, return_counts=True)
    rank = math.floor((len(slopes) - z * math.sqrt(_variance(sizes))) / 2)
    return float(slopes[rank]) if rank >= 0 else -math.inf


@lru_cache(maxsize=4)
def _pairs(n: int) -> tuple[Ints, Ints]:
    """All pairs i < j of n points: the same few numbers of points come again at each row."""
    i, j = np.triu_indices(n, k=1)
    return i, j


def _variance(sizes: Ints) -> float:
    """Variance of Kendall's score, summed over groups of these sizes."""
    return float((sizes * (sizes - 1) * (2 * sizes + 5)).sum()) / 18
