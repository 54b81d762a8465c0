"""What a sample saw, on its way from the device, over the ranks, to the host: packed here, unpacked here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats, Point
from lightning_gradflow.metrics import measured
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.ranks import Topology
from lightning_gradflow.probes.recurrence import Series
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

# names of what is transferred begin with one of these
_OUTPUT, _OUTPUT_COUNT, _DELTA, _DELTA_COUNT = "output", "output count", "delta", "delta count"
_UNITS, _UNIT_COUNT, _SCALE = "units", "unit count", "delta scale"
_GATE = "gate"
_MIN_INPUTS = 16  # of fewer, units that fire for one in five are often silent by chance
_SPREAD = "output spread"
_TIME = "time"


@dataclass
class Deltas:
    """Loss gradients at one point in one backward pass; tensors stay on the device."""

    squares: dict[int, Tensor] = field(default_factory=dict)  # by call
    entries: int = 0
    floor: float = math.nan  # log2 of the smallest positive number that they can hold


@dataclass
class Seen:
    """What one point gave in the present sample; tensors stay on the device."""

    calls: int = 0  # in the present forward pass
    without_graph: list[int] = field(default_factory=list)  # those of them that checkpointing may still repeat
    output_square: Tensor | None = None
    output_count: int = 0
    deviation_square: Tensor | None = None  # of the outputs from their mean over the batch
    batched_square: Tensor | None = None  # of those outputs that have more than one sample
    ran: int = 0  # calls in all forward passes of the sample
    in_graph: int = 0  # those of them whose output was part of the autograd graph
    untold: int = 0  # those of them of which only a repetition would tell
    input_detached: int = 0  # those of them whose input came from the network, but without its graph
    saturated: Tensor | None = None
    bounded_count: int = 0
    is_gate: bool = False  # whether what comes out of a bounded activation is multiplied with another signal
    is_cut: bool = False  # whether each part of a split model has other entries; else that is told by the values
    active: Tensor | None = None  # (U,) units that left the flat side at least once
    inputs: int = 0  # for which they had the occasion
    deltas: dict[int, Deltas] = field(default_factory=dict)  # by backward pass
    # of a recurrence, by backward pass: (T,) sums of squared gradients at its input, and of how many sequences
    times: dict[int, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class Signals:
    """What a sample saw, on the host.

    Args:
        points: point -> metric -> value, in order of execution.
        calls: name of a point that ran more than once in a forward pass -> (K,) delta norm of each call; of an RNN,
            LSTM or GRU -> (T,) norm of the gradient at its input by time step, the end last.
        floor: log2 of the smallest positive number that the narrowest of the deltas can hold; NaN without deltas.
        input_rms: (F,) root mean square of each feature of the input; empty where it was not measured.
    """

    points: Mapping[Point, Mapping[str, float]]
    calls: Mapping[str, Floats]
    floor: float = math.nan
    input_rms: Floats = field(default_factory=lambda: np.empty(0))


def pack(sample: Mapping[Point, Seen], scales: Mapping[int, Tensor], transfer: Transfer) -> None:
    """Hands all that was seen to the transfer, point by point, so that ranks that saw other points can agree.

    Args:
        sample: what each point gave.
        scales: backward pass -> the factor of the gradient scaler that it was made with, the same on all ranks.
        transfer: takes it.
    """
    for k, scale in scales.items():
        transfer.put((_SCALE, k), scale.reshape(1))
    scalars: dict[Hashable, list[Tensor]] = {}
    for point, seen in sample.items():
        if seen.output_square is not None:
            scalars[_OUTPUT, point] = [seen.output_square, _or_zero(seen.saturated, seen.output_square)]
            counts = [seen.output_count, seen.bounded_count, float(seen.is_cut), seen.ran, seen.in_graph]
            counts += [seen.input_detached, seen.untold]
            _share_numbers(transfer, (_OUTPUT_COUNT, point), counts)
        if seen.deviation_square is not None and seen.batched_square is not None:
            scalars[_SPREAD, point] = [seen.deviation_square, seen.batched_square]
        for k, deltas in seen.deltas.items():
            some = next(iter(deltas.squares.values()))
            # ranks agree on lengths, and sequences differ: few lengths are few agreements
            length = max(deltas.squares) + 1
            padded = length if transfer.is_alone else 1 << (length - 1).bit_length()
            scalars[_DELTA, k, point, padded] = [_or_zero(deltas.squares.get(call), some) for call in range(padded)]
            fired = [float(call in deltas.squares) for call in range(padded)]
            numbers = [1.0, deltas.entries, deltas.floor, float(seen.is_cut), *fired]
            _share_numbers(transfer, (_DELTA_COUNT, k, point, padded), numbers)
    _share_scalars(transfer, scalars)
    for point, seen in sample.items():
        for k, series in seen.times.items():
            length = len(series[0])
            padded = length if transfer.is_alone else 1 << (length - 1).bit_length()
            rows = [torch.nn.functional.pad(row, (padded - length, 0)) for row in series]
            _share(transfer, (_TIME, k, point, padded), torch.cat(rows))
        if seen.bounded_count:
            _share_numbers(transfer, (_GATE, point), [1.0, float(seen.is_gate)])
        if seen.active is not None:
            units = seen.active.numel()
            padded = units if transfer.is_alone else 1 << (units - 1).bit_length()
            _share_numbers(transfer, (_UNIT_COUNT, point, padded), [1.0, units, seen.inputs])
            _share(transfer, (_UNITS, point, padded), torch.nn.functional.pad(seen.active, (0, padded - units)))


def _share_scalars(transfer: Transfer, rows: Mapping[Hashable, Sequence[Tensor]]) -> None:
    if rows:
        device = next(iter(rows.values()))[0].device
        dtype = wide_dtype(device)
        flat = torch.stack([value.to(device, dtype) for row in rows.values() for value in row])
        for name, piece in zip(rows, flat.split([len(row) for row in rows.values()]), strict=True):
            _share(transfer, name, piece)


def _share(transfer: Transfer, name: Hashable, piece: Tensor) -> None:
    """Each part of a model that is split over ranks has a row of its own: equal rows are one and the same thing."""
    topology = transfer.topology
    if topology.model > 1:
        rows = piece.new_zeros((topology.model, piece.numel()))
        rows[topology.model_rank] = piece
        piece = rows.flatten()
    transfer.share(name, piece)


def _share_numbers(transfer: Transfer, name: Hashable, numbers: list[float]) -> None:
    topology = transfer.topology
    before = [0.0] * (len(numbers) * topology.model_rank)
    after = [0.0] * (len(numbers) * (topology.model - 1 - topology.model_rank))
    transfer.share_numbers(name, [*before, *numbers, *after])


def unpack(host: Mapping[Hashable, Floats], topology: Topology, silent: SilentUnits, multiplier: float) -> Signals:
    """The statistics of each point, in order of execution, out of what was fetched.

    Args:
        host: what was fetched: the sums over all ranks.
        topology: the ranks.
        silent: counts the samples in which a unit was silent.
        multiplier: turns the gradients as they were into those of the mean loss.
    """
    found: dict[Point, dict[str, float]] = {}
    by_pass: dict[int, dict[Point, _Arrived]] = {}
    times: dict[Point, dict[int, Floats]] = {}
    active: dict[Point, list[Floats]] = {}
    inputs: dict[Point, float] = {}
    is_gate: dict[Point, float] = {}
    for name in host:
        kind, *rest = name if isinstance(name, tuple) else (name,)
        if kind == _OUTPUT:
            values = _output_values(host, rest[0], topology.model)
            if values:
                found.setdefault(rest[0], {}).update(values)
        elif kind == _DELTA:
            k, point, length = rest
            arrived = _arrived(host, k, point, length, topology.model)
            if arrived is not None:
                mine = by_pass.setdefault(k, {})
                mine[point] = mine[point] + arrived if point in mine else arrived
        elif kind == _TIME:
            k, point, length = rest
            rows = host[name].reshape(topology.model, 2 * length)
            series = (_weights(rows[:, :length].sum(axis=1), np.zeros(1)) @ rows).reshape(2, length)
            by_k = times.setdefault(point, {})
            by_k[k] = _plus_at_end(by_k[k], series) if k in by_k else series
        elif kind == _GATE:
            ranks, gates = host[name].reshape(-1, 2).sum(axis=0)
            if ranks:  # none ran it in this sample
                is_gate[rest[0]] = float(gates / ranks)
        elif kind == _UNITS:
            rows = host[name].reshape(topology.model, -1)
            counts = host[(_UNIT_COUNT, *rest)].reshape(topology.model, 3)
            inputs[rest[0]] = inputs.get(rest[0], 0.0) + float(counts[:, 2].max())
            for row, (ranks, units, _) in zip(rows, counts, strict=True):
                if ranks:
                    active.setdefault(rest[0], []).append(row[: round(units / ranks)])
    for point, parts in active.items():  # of a layer that is split unevenly they have several lengths
        if parts and point in found:
            units_active = np.concatenate(parts) > 0
            found[point]["dead_fraction"] = silent.update(point.name, units_active)
            if inputs[point] >= _MIN_INPUTS:
                found[point]["silent_fraction"] = float((~units_active).mean())
    for point, share in is_gate.items():
        if point in found:
            found[point]["gate_fraction"] = share
    calls: dict[str, Floats] = {}
    # only norms of one backward pass can be compared, so that the pass through the most points comes first
    known = {*by_pass, *(k for by_k in times.values() for k in by_k)}
    passes = sorted(known, key=lambda k: (-len(by_pass.get(k, ())), k))
    # the loss of each rank is a mean over its own batch, and a scaler may have changed between two passes
    factors = {k: multiplier / topology.data / float(host.get((_SCALE, k), np.ones(1))[0]) for k in passes}
    for k in passes:
        factor = factors[k]
        for point, arrived in by_pass.get(k, {}).items():
            values = found.setdefault(point, {})
            if "delta_norm" not in values:
                values |= _delta_values(arrived, factor) | {"backward_pass": float(k)}
                if len(arrived.squares) > 1:
                    values["calls"] = float(len(arrived.squares))
                    calls[point.name] = _norms_of_calls(arrived, factor)
    for point, by_k in times.items():
        k = min(by_k, key=passes.index)
        norms = _norms_by_time(*by_k[k]) * factors[k]
        if norms.size > 1:
            found.setdefault(point, {})["calls"] = float(len(norms))
            calls[point.name] = norms
    floors = [arrived.floor for points in by_pass.values() for arrived in points.values()]
    return Signals(found, calls, max(floors, default=math.nan))


@dataclass
class _Arrived:
    """The deltas of one point and backward pass on the host, over all ranks."""

    squares: Floats  # (K,) by call
    fired: Floats  # (K,) how often a gradient came
    entries: float
    floor: float

    def __add__(self, other: _Arrived) -> _Arrived:
        """The same point on ranks that called it another number of times."""
        n = max(len(self.squares), len(other.squares))
        squares, fired = np.zeros(n), np.zeros(n)
        for one in (self, other):
            squares[: len(one.squares)] += one.squares
            fired[: len(one.fired)] += one.fired
        return _Arrived(squares, fired, self.entries + other.entries, self.floor)


def _delta_values(arrived: _Arrived, factor: float) -> dict[str, float]:
    square = float(arrived.squares.sum())
    if not math.isfinite(square):
        headroom = math.inf
    else:
        headroom = 0.5 * math.log2(square / arrived.entries) - arrived.floor if square > 0 else -math.inf
    return {"delta_norm": measured(math.sqrt(square) * factor), "delta_headroom": headroom}


def _norms_of_calls(arrived: _Arrived, factor: float) -> Floats:
    norms = np.sqrt(arrived.squares) * factor
    norms = np.where(np.isfinite(norms), norms, np.inf)
    return np.where(arrived.fired > 0, norms, np.nan)


def _norms_by_time(sums: Floats, counts: Floats) -> Floats:
    """(T,) norms as they would be if all sequences were as long as the longest; none where no gradient came."""
    reached = counts > 0
    norms = np.sqrt(sums[reached] / counts[reached] * counts.max())
    return np.where(np.isfinite(norms), norms, np.inf)


def _plus_at_end(one: Floats, other: Floats) -> Floats:
    """(2, T) series of unequal lengths that end together."""
    length = max(one.shape[1], other.shape[1])
    first, second = (np.pad(series, ((0, 0), (length - series.shape[1], 0))) for series in (one, other))
    return first + second


def _arrived(host: Mapping[Hashable, Floats], k: int, point: Point, length: int, parts: int) -> _Arrived | None:
    squares = host[_DELTA, k, point, length].reshape(parts, length)
    numbers = host[_DELTA_COUNT, k, point, length].reshape(parts, length + 4)
    if not numbers[:, 0].any():
        return None
    weights = _weights(squares.sum(axis=1), numbers[:, 3])
    ranks, entries, floor = weights @ numbers[:, :3]
    fired = weights @ numbers[:, 4:]
    used = int(np.flatnonzero(fired)[-1]) + 1
    return _Arrived((weights @ squares)[:used], fired[:used], float(entries), float(floor / ranks))


def _output_values(host: Mapping[Hashable, Floats], point: Point, parts: int) -> dict[str, float]:
    table = host[_OUTPUT, point].reshape(parts, 2)
    counts = host[_OUTPUT_COUNT, point].reshape(parts, 7)
    weights = _weights(table[:, 0], counts[:, 2])
    square, near_bound = weights @ table
    count, bounded, _, ran, in_graph, detached, untold = weights @ counts
    values = {}
    if count:
        values["output_rms"] = measured(math.sqrt(square / count))
    if bounded:
        values["saturated_fraction"] = float(near_bound / bounded)
    if point.is_layer and ran:
        values["input_detached"] = float(detached / ran)
        if ran > untold:
            values["in_graph"] = float(in_graph / (ran - untold))
    if (_SPREAD, point) in host:
        deviation, of = (weights @ host[_SPREAD, point].reshape(parts, 2)).tolist()
        if of:
            values["output_spread"] = measured(min(math.sqrt(deviation / of), 1.0))  # rounding can exceed 1
    return values


def _weights(squares: Floats, cut: Floats) -> Floats:
    """(parts,) What each part of a split model counts.

    Where it is not known that a tensor was cut up, equal sums of squares are one tensor, there several times.
    """
    weights = np.ones(len(squares))
    if len(squares) > 1 and not cut.any() and np.allclose(squares, squares[0], rtol=1e-9, atol=0, equal_nan=True):
        weights[1:] = 0
    return weights


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value
