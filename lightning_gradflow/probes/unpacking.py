"""The statistics of each point, out of what was fetched: all points of a kind at once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_gradflow.history import Floats, Ints, Point
from lightning_gradflow.probes.arrived_deltas import ArrivedDeltas, arrived_times, norms_by_time
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.flat_rows import Fetched, starts
from lightning_gradflow.probes.packing import (
    GATE,
    N_OUTPUT_COUNTS,
    N_UNIT_COUNTS,
    OUTPUT,
    OUTPUT_COUNTS,
    SATURATED,
    SCALE,
    SPREAD,
    UNIT_COUNTS,
    UNITS,
)
from lightning_gradflow.probes.point_columns import PointColumns, measured, weighted, weights_of_parts
from lightning_gradflow.probes.ranks import Topology

_MIN_INPUTS = 16  # of fewer, units that fire for one in five are often silent by chance


@dataclass(frozen=True)
class Signals:
    """What a sample saw, on the host.

    Args:
        order: the points in order of execution.
        columns: metric -> (n,) the places in `order` where it was measured, and (n,) the values there.
        calls: name of a point that ran more than once in a forward pass -> (K,) delta norm of each call; of an RNN,
            LSTM or GRU -> (T,) norm of the gradient at its input by time step, the end last.
        floor: log2 of the smallest positive number that the narrowest of the deltas can hold; NaN without deltas.
        input_rms: (F,) root mean square of each feature of the input, NaN for columns that other layers have made;
            empty where it was not measured.
        input_deviation: (F,) standard deviation of each.
        input_layer: the layer that it went into.
        dropped_at: the first layer whose output dropout has a part in.
    """

    order: Sequence[Point] = ()
    columns: Mapping[str, tuple[Ints, Floats]] = field(default_factory=dict)
    calls: Mapping[str, Floats] = field(default_factory=dict)
    floor: float = math.nan
    input_rms: Floats = field(default_factory=lambda: np.empty(0))
    input_deviation: Floats = field(default_factory=lambda: np.empty(0))
    input_layer: str | None = None
    dropped_at: str | None = None

    @property
    def points(self) -> dict[Point, dict[str, float]]:
        """Point -> metric -> value, in order of execution."""
        found: dict[Point, dict[str, float]] = {point: {} for point in self.order}
        for metric, (at, values) in self.columns.items():
            for i, value in zip(at.tolist(), values.tolist(), strict=True):
                found[self.order[i]][metric] = value
        return found


def unpack(host: Mapping[Hashable, Floats], topology: Topology, silent: SilentUnits, multiplier: float) -> Signals:
    """The statistics of each point, in order of execution, out of what was fetched.

    Args:
        host: what was fetched: the sums over all ranks.
        topology: the ranks.
        silent: counts the samples in which a unit was silent.
        multiplier: turns the gradients as they were into those of the mean loss.
    """
    fetched, found = Fetched(host), PointColumns()
    with np.errstate(all="ignore"):  # what is not finite was measured, and is told as infinite
        _outputs(fetched, topology.model, found)
        _units(fetched, topology.model, found, silent)
        _gates(fetched, found)
        deltas = ArrivedDeltas(fetched, topology.model)
        times = arrived_times(fetched, topology.model)
        # only norms of one backward pass can be compared, so that the pass through the most points comes first
        known = {*deltas.points, *(k for by_k in times.values() for k in by_k)}
        passes = sorted(known, key=lambda k: (-len(deltas.points.get(k, ())), k))
        # the loss of each rank is a mean over its own batch, and a scaler may have changed between two passes
        scales = {k: float(host.get((SCALE, k), np.ones(1))[0]) for k in passes}
        # one that was halved until it is zero leaves nothing to go by
        factors = {k: multiplier / topology.data / (scale or math.nan) for k, scale in scales.items()}
        calls = deltas.into(found, passes, factors)
        in_time: list[Point] = []
        for point, by_k in times.items():
            k = min(by_k, key=passes.index)
            norms = norms_by_time(*by_k[k]) * factors[k]
            if norms.size > 1:
                in_time.append(point)
                calls[point.name] = norms
        turns = np.array([len(calls[point.name]) for point in in_time], dtype=np.float64)
        found.add("calls", found.places(in_time), turns)
    return Signals(tuple(found.place), found.columns, calls, max(deltas.floors.tolist(), default=math.nan))


def _outputs(fetched: Fetched, parts: int, found: PointColumns) -> None:
    points: list[Point] = fetched.names(OUTPUT)
    squares = fetched.flat(OUTPUT, points).reshape(-1, parts, 1)
    counts = fetched.flat(OUTPUT_COUNTS, points).reshape(-1, parts, N_OUTPUT_COUNTS)
    weights = weights_of_parts(squares[:, :, 0], counts[:, :, 2])
    square = weighted(weights, squares)[:, 0]
    count, bounded, _, ran, in_graph, detached, untold = weighted(weights, counts).T
    is_layer = np.array([point.is_layer for point in points], dtype=bool)
    row = {point: i for i, point in enumerate(points)}
    columns: dict[str, tuple[Ints, Floats]] = {}

    at = np.flatnonzero(count)
    columns["output_rms"] = at, measured(np.sqrt(square[at] / count[at]))
    names = fetched.names(SATURATED)
    at = np.array([row[point] for point in names], dtype=np.int64)
    near = weighted(weights[at], fetched.flat(SATURATED, names).reshape(-1, parts, 1))[:, 0]
    some = bounded[at] > 0  # none ran it in this sample
    columns["saturated_fraction"] = at[some], near[some] / bounded[at[some]]
    at = np.flatnonzero(is_layer & (ran > 0))
    columns["input_detached"] = at, detached[at] / ran[at]
    at = np.flatnonzero(is_layer & (ran > untold))
    columns["in_graph"] = at, in_graph[at] / (ran - untold)[at]
    names = fetched.names(SPREAD)
    at = np.array([row[point] for point in names], dtype=np.int64)
    deviation, of = weighted(weights[at], fetched.flat(SPREAD, names).reshape(-1, parts, 2)).T
    some = of != 0
    spread = np.sqrt(deviation[some] / of[some])
    columns["output_spread"] = at[some], measured(np.where(spread > 1, 1.0, spread))  # rounding can exceed 1

    has = np.zeros(len(points), dtype=bool)
    for at, _ in columns.values():
        has[at] = True
    place = np.full(len(points), -1)
    place[has] = found.places([point for point, is_there in zip(points, has.tolist(), strict=True) if is_there])
    for metric, (at, values) in columns.items():
        found.add(metric, place[at], values)


def _gates(fetched: Fetched, found: PointColumns) -> None:
    points = fetched.names(GATE)
    if not points:
        return
    ranks, gates = fetched.flat(GATE, points).reshape(len(points), -1, 2).sum(axis=1).T
    at = found.known(points)
    some = (ranks > 0) & (at >= 0)  # none ran it in this sample
    found.add("gate_fraction", at[some], gates[some] / ranks[some])


def _units(fetched: Fetched, parts: int, found: PointColumns, silent: SilentUnits) -> None:
    names: list[tuple[Point, int]] = fetched.names(UNITS)
    if not names:
        return
    counts = fetched.flat(UNIT_COUNTS, names).reshape(-1, N_UNIT_COUNTS)
    padded = np.repeat(np.array([length for _, length in names], dtype=np.int64), parts)
    at = np.repeat(found.known([point for point, _ in names]), parts)
    ranks, units, inputs = counts.T
    lengths = np.rint(np.where((ranks > 0) & (at >= 0), units / ranks, 0)).astype(np.int64)
    rows = np.argsort(at, kind="stable")
    begins, ends = starts(padded)[rows], (starts(padded) + lengths)[rows]
    flat = fetched.flat(UNITS, names)
    active = np.concatenate([flat[i:j] for i, j in zip(begins.tolist(), ends.tolist(), strict=True)]) > 0
    order = tuple(found.place)
    # of a layer that is split unevenly the parts have several lengths
    lengths = np.bincount(at + 1, lengths, len(order) + 1)[1:].astype(np.int64)
    there = np.flatnonzero(lengths)
    lengths = lengths[there]
    found.add("dead_fraction", there, silent.update([order[i].name for i in there.tolist()], lengths, active))
    seen = np.bincount(at[::parts] + 1, inputs.reshape(-1, parts).max(axis=1), len(order) + 1)[1:][there]
    enough = seen >= _MIN_INPUTS
    share = np.add.reduceat(~active, starts(lengths), dtype=np.int64) / lengths
    found.add("silent_fraction", there[enough], share[enough])
