"""The gradients at the points, out of what was fetched: all points and backward passes at once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from lightning_gradflow.history import Floats, Ints, Point
from lightning_gradflow.probes.flat_rows import Fetched, places, starts
from lightning_gradflow.probes.packing import DELTA, DELTA_COUNTS, N_DELTA_COUNTS, TIME
from lightning_gradflow.probes.point_columns import PointColumns, measured, weighted, weights_of_parts


class ArrivedDeltas:
    """(n,) columns over points and backward passes, each joined over ranks that called it another number of times.

    Args:
        fetched: what was fetched.
        parts: of the model, which several ranks hold.
    """

    def __init__(self, fetched: Fetched, parts: int) -> None:
        names: list[tuple[int, Point, int]] = fetched.names(DELTA)
        lengths = np.array([length for _, _, length in names], dtype=np.int64)
        tables = list(_tables(fetched, names, lengths, parts))
        has = np.zeros(len(names), dtype=bool)
        for rows, _, _ in tables:
            has[rows] = True
        slots: dict[tuple[int, Point], int] = {}
        slot = np.full(len(names), -1)
        slot[has] = [slots.setdefault(names[i][:2], len(slots)) for i in np.flatnonzero(has).tolist()]
        self.points: dict[int, list[Point]] = {}  # by backward pass
        for k, point in slots:
            self.points.setdefault(k, []).append(point)
        self._passes = np.array([k for k, _ in slots], dtype=np.int64)
        widths = np.zeros(len(slots), dtype=np.int64)
        np.maximum.at(widths, slot[has], lengths[has])
        self._starts = starts(widths)
        self._squares, self._fired = np.zeros(int(widths.sum())), np.zeros(int(widths.sum()))
        self._entries = np.zeros(len(slots))
        self.floors = np.zeros(len(slots))
        for rows, own, told in tables:
            at = self._starts[slot[rows], None] + np.arange(own.shape[1])
            self._squares[at] += own
            self._fired[at] += told[:, N_DELTA_COUNTS:]
            self._entries[slot[rows]] += told[:, 1]
            self.floors[slot[rows]] = told[:, 2] / told[:, 0]
        # behind the last call that got a gradient stand those that others made, or nobody
        last = np.where(self._fired > 0, places(widths) + 1, 0)
        self._lengths = np.maximum.reduceat(last, self._starts) if slots else widths
        used = places(widths) < np.repeat(self._lengths, widths)
        self._squares, self._fired, self._starts = self._squares[used], self._fired[used], starts(self._lengths)

    def into(self, found: PointColumns, passes: Sequence[int], factors: Mapping[int, float]) -> dict[str, Floats]:
        """Adds what the first of the passes tells about each point; gives the norms of single calls by its name."""
        squares = self._sums()
        means = (squares / self._entries).tolist()
        logs = np.array([0.5 * math.log2(x) if 0 < x < math.inf else -math.inf for x in means])
        headroom = np.where(np.isfinite(squares), logs - self.floors, np.inf)
        calls: dict[str, Floats] = {}
        taken = np.zeros(len(found.place) + len(self._passes), dtype=bool)
        for k in passes:
            points = self.points.get(k, [])
            at = found.places(points)
            new = ~taken[at]
            taken[at] = True
            at, slot = at[new], np.flatnonzero(self._passes == k)[new]
            found.add("delta_norm", at, measured(np.sqrt(squares[slot]) * factors[k]))
            found.add("delta_headroom", at, headroom[slot])
            found.add("backward_pass", at, np.full(len(at), float(k)))
            several = self._lengths[slot] > 1
            found.add("calls", at[several], self._lengths[slot[several]].astype(np.float64))
            for i, row in zip(np.flatnonzero(new)[several].tolist(), slot[several].tolist(), strict=True):
                calls[points[i].name] = self._norms_of_calls(row, factors[k])
        return calls

    def _sums(self) -> Floats:
        """(n,) sums over calls; as each row is summed alone, for `reduceat` adds in another order."""
        found = np.zeros(len(self._lengths))
        for length in np.unique(self._lengths).tolist():
            rows = np.flatnonzero(self._lengths == length)
            found[rows] = self._squares[self._starts[rows, None] + np.arange(length)].sum(axis=1)
        return found

    def _norms_of_calls(self, i: int, factor: float) -> Floats:
        mine = slice(self._starts[i], self._starts[i] + self._lengths[i])
        return np.where(self._fired[mine] > 0, measured(np.sqrt(self._squares[mine]) * factor), np.nan)


def _tables(
    fetched: Fetched, names: Sequence[Hashable], lengths: Ints, parts: int
) -> Iterator[tuple[Ints, Floats, Floats]]:
    """Of all rows of a length that a gradient came for: which they are, squares by call, and what was counted."""
    squares, counts = fetched.flat(DELTA, names), fetched.flat(DELTA_COUNTS, names)
    square_starts, count_starts = starts(parts * lengths), starts(parts * (lengths + N_DELTA_COUNTS))
    for length in np.unique(lengths).tolist():
        rows, width = np.flatnonzero(lengths == length), length + N_DELTA_COUNTS
        own = squares[square_starts[rows, None] + np.arange(parts * length)].reshape(-1, parts, length)
        told = counts[count_starts[rows, None] + np.arange(parts * width)].reshape(-1, parts, width)
        ran = told[:, :, 0] > 0
        some = ran.any(axis=1)
        # the zeros of a part that did not run are no copy of the zeros of one that did
        weights = weights_of_parts(own.sum(axis=2), told[:, :, 3] + ~ran)[some]
        yield rows[some], weighted(weights, own[some]), weighted(weights, told[some])


def arrived_times(fetched: Fetched, parts: int) -> dict[Point, dict[int, Floats]]:
    """Point -> backward pass -> (2, T) sums of squares by time, and of how many sequences."""
    names: list[tuple[int, Point, int]] = fetched.names(TIME)
    flat = fetched.flat(TIME, names)
    times: dict[Point, dict[int, Floats]] = {}
    end = 0
    for k, point, length in names:
        rows = flat[end : end + 2 * length * parts].reshape(parts, 2 * length)
        end += rows.size
        weights = weights_of_parts(rows[None, :, :length].sum(axis=2), np.zeros((1, 1)))
        series = weighted(weights, rows[None]).reshape(2, length)
        by_k = times.setdefault(point, {})
        by_k[k] = _plus_at_end(by_k[k], series) if k in by_k else series
    return times


def norms_by_time(sums: Floats, counts: Floats) -> Floats:
    """(T,) norms as they would be if all sequences were as long as the longest; none where no gradient came."""
    reached = counts > 0
    return measured(np.sqrt(sums[reached] / counts[reached] * counts.max()))


def _plus_at_end(one: Floats, other: Floats) -> Floats:
    """(2, T) series of unequal lengths that end together."""
    length = max(one.shape[1], other.shape[1])
    first, second = (np.pad(series, ((0, 0), (length - series.shape[1], 0))) for series in (one, other))
    return first + second
