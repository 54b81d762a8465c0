"""Numbers of many points, each metric a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_gradflow.history import Floats, Ints, Point


class PointColumns:
    """Points in the order in which they come up, and what was measured there."""

    def __init__(self) -> None:
        self.place: dict[Point, int] = {}
        self.columns: dict[str, tuple[Ints, Floats]] = {}

    def places(self, points: Sequence[Point]) -> Ints:
        """(n,) where these points stand; new ones at the end."""
        return np.array([self.place.setdefault(point, len(self.place)) for point in points], dtype=np.int64)

    def known(self, points: Sequence[Point]) -> Ints:
        """(n,) the same, with -1 for new ones."""
        return np.array([self.place.get(point, -1) for point in points], dtype=np.int64)

    def add(self, metric: str, at: Ints, values: Floats) -> None:
        """Takes the values of a metric at some of the points; where there was one, it is replaced."""
        if at.size:
            before = self.columns.get(metric, (at[:0], values[:0]))
            kept = ~np.isin(before[0], at)
            self.columns[metric] = np.append(before[0][kept], at), np.append(before[1][kept], values)


def weights_of_parts(squares: Floats, cut: Floats) -> Floats:
    """(n, parts) what each part of a split model counts, out of its sums of squares and of whether it was cut up.

    Where it is not known that a tensor was cut up, equal sums of squares are one tensor, there several times.
    """
    weights = np.ones(squares.shape)
    if squares.shape[1] > 1:
        alike = np.isclose(squares, squares[:, :1], rtol=1e-9, atol=0, equal_nan=True).all(axis=1)
        weights[alike & ~cut.any(axis=1), 1:] = 0
    return weights


def weighted(weights: Floats, rows: Floats) -> Floats:
    """(n, parts), (n, parts, width) -> (n, width)."""
    total: Floats = (weights[:, :, None] * rows).sum(axis=1)
    return total


def measured(values: Floats) -> Floats:
    """Numbers that were measured: NaN would say that they were not."""
    return np.where(np.isfinite(values), values, np.inf)
