"""What a sample saw, on its way from the device, over the ranks, to the host: packed here, unpacked next door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradflow.history import Point
from lightning_gradflow.probes.flat_rows import RowsTransfer, one_behind_the_other
from lightning_gradflow.probes.recurrence import Series
from lightning_gradflow.probes.transfer import Transfer

# kinds of what is transferred: beside a row of what was measured stands one of what was counted
OUTPUT, OUTPUT_COUNTS, SATURATED, SPREAD = "output", "output counts", "saturated", "output spread"
DELTA, DELTA_COUNTS, SCALE = "delta", "delta counts", "delta scale"
UNITS, UNIT_COUNTS = "units", "unit counts"
GATE, TIME = "gate", "time"
# numbers of a row of them; one of deltas has one for each call behind these
N_OUTPUT_COUNTS, N_DELTA_COUNTS, N_UNIT_COUNTS = 7, 4, 3


Number = Tensor | float
"""A () tensor that stays on the device, or a number of Python's where that is the host."""


@dataclass(slots=True)
class Deltas:
    """Loss gradients at one point in one backward pass."""

    squares: dict[int, Number] = field(default_factory=dict)  # by call
    entries: int = 0
    floor: float = math.nan  # log2 of the smallest positive number that they can hold


@dataclass(slots=True)
class Seen:
    """What one point gave in the present sample; tensors stay on the device."""

    calls: int = 0  # in the present forward pass
    without_graph: list[int] = field(default_factory=list)  # those of them that checkpointing may still repeat
    output_square: Number | None = None
    output_count: int = 0
    deviation_square: Number | None = None  # of the outputs from their mean over the batch
    batched_square: Number | None = None  # of those outputs that have more than one sample
    ran: int = 0  # calls in all forward passes of the sample
    in_graph: int = 0  # those of them whose output was part of the autograd graph
    untold: int = 0  # those of them of which only a repetition would tell
    input_detached: int = 0  # those of them whose input came from the network, but without its graph
    saturated: Number | None = None
    bounded_count: int = 0
    is_gate: bool = False  # whether what comes out of a bounded activation is multiplied with another signal
    is_cut: bool = False  # whether each part of a split model has other entries; else that is told by the values
    active: Tensor | None = None  # (U,) units that left the flat side at least once
    inputs: int = 0  # for which they had the occasion
    units: int = 0  # as many as the newest call had
    deltas: dict[int, Deltas] = field(default_factory=dict)  # by backward pass
    # of a recurrence, by backward pass: (T,) sums of squared gradients at its input, and of how many sequences
    times: dict[int, Series] = field(default_factory=dict)


def pack(sample: Mapping[Point, Seen], scales: Mapping[int, Tensor], transfer: Transfer) -> None:
    """Hands all that was seen to the transfer, point by point, so that ranks that saw other points can agree.

    Args:
        sample: what each point gave.
        scales: backward pass -> the factor of the gradient scaler that it was made with, the same on all ranks.
        transfer: takes it.
    """
    for k, scale in scales.items():
        transfer.put((SCALE, k), scale.reshape(1))
    rows = RowsTransfer(transfer)
    _pack_outputs(sample, rows)
    _pack_deltas(sample, rows)
    _pack_times(sample, rows)
    _pack_activations(sample, rows)


def _pack_outputs(sample: Mapping[Point, Seen], rows: RowsTransfer) -> None:
    points = [point for point, seen in sample.items() if seen.output_square is not None]
    if not points:
        return
    seens = [sample[point] for point in points]
    counts: list[float] = []
    for seen in seens:
        counts += (seen.output_count, seen.bounded_count, float(seen.is_cut), seen.ran, seen.in_graph)
        counts += (seen.input_detached, seen.untold)
    squares = [seen.output_square for seen in seens]
    rows.share(OUTPUT, points, one_behind_the_other(squares), [1] * len(points))
    rows.share_numbers(OUTPUT_COUNTS, points, counts, [N_OUTPUT_COUNTS] * len(points))
    bounded = [point for point, seen in sample.items() if seen.saturated is not None]
    if bounded:
        saturated = [sample[point].saturated for point in bounded]
        rows.share(SATURATED, bounded, one_behind_the_other(saturated), [1] * len(bounded))
    batched = [point for point, seen in sample.items() if seen.batched_square is not None]
    if batched:
        spreads = [x for point in batched for x in (sample[point].deviation_square, sample[point].batched_square)]
        rows.share(SPREAD, batched, one_behind_the_other(spreads), [2] * len(batched))


def _pack_deltas(sample: Mapping[Point, Seen], rows: RowsTransfer) -> None:
    names: list[tuple[int, Point, int]] = []
    lengths: list[int] = []
    squares: list[Number | None] = []
    counts: list[float] = []
    for point, seen in sample.items():
        for k, deltas in seen.deltas.items():
            length = rows.padded(max(deltas.squares) + 1)
            names.append((k, point, length))
            lengths.append(length)
            squares += [deltas.squares.get(call) for call in range(length)]
            counts += (1.0, deltas.entries, deltas.floor, float(seen.is_cut))
            counts += [float(call in deltas.squares) for call in range(length)]
    if names:
        rows.share(DELTA, names, one_behind_the_other(squares), lengths)
        rows.share_numbers(DELTA_COUNTS, names, counts, [N_DELTA_COUNTS + length for length in lengths])


def _pack_times(sample: Mapping[Point, Seen], rows: RowsTransfer) -> None:
    names: list[tuple[int, Point, int]] = []
    series: list[Tensor] = []
    for point, seen in sample.items():
        for k, pair in seen.times.items():
            length = rows.padded(len(pair[0]))
            names.append((k, point, length))
            series += [torch.nn.functional.pad(row, (length - len(row), 0)) for row in pair]
    if names:
        rows.share(TIME, names, one_behind_the_other(series), [2 * length for _, _, length in names])


def _pack_activations(sample: Mapping[Point, Seen], rows: RowsTransfer) -> None:
    bounded = [point for point, seen in sample.items() if seen.bounded_count]
    gates = [x for point in bounded for x in (1.0, float(sample[point].is_gate))]
    rows.share_numbers(GATE, bounded, gates, [2] * len(bounded))
    names: list[tuple[Point, int]] = []
    lengths: list[int] = []
    active: list[Tensor] = []
    counts: list[float] = []
    for point, seen in sample.items():
        if seen.active is None:
            continue
        units = seen.active.numel()
        length = rows.padded(units)
        names.append((point, length))
        lengths.append(length)
        active.append(seen.active if length == units else torch.nn.functional.pad(seen.active, (0, length - units)))
        counts += (1.0, units, seen.inputs)
    if names:
        rows.share(UNITS, names, one_behind_the_other(active), lengths)
        rows.share_numbers(UNIT_COUNTS, names, counts, [N_UNIT_COUNTS] * len(names))
