"""Robust slopes and trend tests."""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.history import Floats

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
    i, j = np.triu_indices(len(x), k=1)
    dx, dy = x[j] - x[i], y[j] - y[i]
    slopes = dy[dx != 0] / dx[dx != 0]
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
    i, j = np.triu_indices(n, k=1)
    score = float(np.sign(y[j] - y[i]).sum())
    _, ties = np.unique(y, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0 or score == 0:
        return 0.0
    return (score - math.copysign(1.0, score)) / math.sqrt(variance)
