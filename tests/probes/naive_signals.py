"""Samples drawn at random, and a second way to their statistics: point by point, with Python's own numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gradflow.history import Point
from lightning_gradflow.probes.packing import Deltas, Seen

POINTS = [Point(f"point{i}", f"module{i}", op) for i, op in enumerate(["", "relu", "", "sigmoid", "", "", "tanh", ""])]


def drawn(draw: random.Random, same: random.Random | None = None) -> dict[Point, Seen]:
    """What a sample may have seen: points that are missing, several calls and passes, units, gates, times.

    Args:
        draw: what one rank sees.
        same: what is the same on all ranks: the number of units.
    """
    sample = {}
    for point in POINTS:
        units = (same or draw).choice([1, 3, 9])
        if draw.random() < 0.2:
            continue
        seen = sample[point] = Seen()
        if draw.random() < 0.9:
            _draw_output(draw, seen, units)
        for k in range(draw.choice([0, 1, 1, 1, 2, 3])):
            calls = [call for call in range(draw.choice([1, 1, 1, 2, 5, 40])) if draw.random() < 0.8]
            if calls:
                squares = {call: _tensor(_number(draw)) for call in calls}
                seen.deltas[k] = Deltas(squares, draw.randint(1, 50), -149.0 if point.is_layer else -133.0)
        for k in range(draw.choice([0, 0, 0, 1, 2])):
            turns = range(draw.randint(1, 6))
            numbers, counts = [_number(draw) for _ in turns], [float(draw.randint(0, 3)) for _ in turns]
            seen.times[k] = _tensor(numbers), _tensor(counts)
    return sample


def _draw_output(draw: random.Random, seen: Seen, units: int) -> None:
    seen.output_square, seen.output_count = _tensor(_number(draw)), draw.randint(1, 999)
    seen.ran = draw.randint(0, 5)
    seen.in_graph, seen.untold, seen.input_detached = (draw.randint(0, seen.ran) for _ in range(3))
    if draw.random() < 0.4:
        seen.deviation_square, seen.batched_square = _tensor(_number(draw)), _tensor(_number(draw))
    if draw.random() < 0.4:
        seen.saturated, seen.bounded_count = torch.tensor(draw.randint(0, 9)), draw.randint(9, 20)
        seen.is_gate = draw.random() < 0.5
    if draw.random() < 0.5:
        seen.active, seen.inputs = torch.tensor([draw.random() < 0.4 for _ in range(units)]), draw.randint(1, 40)


def _number(draw: random.Random) -> float:
    odd = draw.choice([0.0, 1.0, 1e-300, 1e300, math.inf, math.nan])
    return odd if draw.random() < 0.2 else draw.random() * 10.0 ** draw.randint(-30, 30)


def _tensor(numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def expected(
    samples: Sequence[Mapping[Point, Seen]],
    silent: dict[str, list[list[bool]]],
    window: int,
    factors: Mapping[int, float],
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Point -> metric -> value, and point -> norm of each call, of what ranks saw that work beside each other.

    Args:
        samples: what each rank saw.
        silent: takes the units of each activation, sample by sample.
        window: samples in a row in which a dead unit is silent.
        factors: backward pass -> what its norms are multiplied by.
    """
    found: dict[str, dict[str, float]] = {}
    calls: dict[str, list[float]] = {}
    for point in POINTS:
        values = _output([s[point] for s in samples if point in s and s[point].output_square is not None], point)
        if values:
            found[point.name] = values
            units = [s[point] for s in samples if point in s and s[point].active is not None]
            if units:
                values |= _units(units, silent.setdefault(point.name, []), window)
    by_pass = {k: [p for p in POINTS if any(p in s and k in s[p].deltas for s in samples)] for k in factors}
    passes = sorted(factors, key=lambda k: (-len(by_pass[k]), k))
    for k in passes:
        for point in by_pass[k]:
            values = found.setdefault(point.name, {})
            if "delta_norm" not in values:
                mine = [s[point].deltas[k] for s in samples if point in s and k in s[point].deltas]
                norms = _deltas(values, mine, factors[k])
                values["backward_pass"] = float(k)
                if len(norms) > 1:
                    values["calls"], calls[point.name] = float(len(norms)), norms
    for point in POINTS:
        for k in passes:
            pairs = [s[point].times[k] for s in samples if point in s and k in s[point].times]
            if pairs:
                norms = _times([(a.tolist()[::-1], b.tolist()[::-1]) for a, b in pairs], factors[k])
                if len(norms) > 1:
                    found.setdefault(point.name, {})["calls"], calls[point.name] = float(len(norms)), norms
                break
    return found, calls


def _told(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _output(seen: Sequence[Seen], point: Point) -> dict[str, float]:
    values = {}
    count, bounded, ran = (sum(getattr(s, name) for s in seen) for name in ("output_count", "bounded_count", "ran"))
    if count:
        values["output_rms"] = _told(math.sqrt(sum(float(s.output_square) for s in seen) / count))
    if bounded:
        values["saturated_fraction"] = sum(float(s.saturated) for s in seen if s.saturated is not None) / bounded
        with_bounds = [s for s in seen if s.bounded_count]
        values["gate_fraction"] = sum(s.is_gate for s in with_bounds) / len(with_bounds)
    if point.is_layer and ran:
        values["input_detached"] = sum(s.input_detached for s in seen) / ran
        if ran > sum(s.untold for s in seen):
            values["in_graph"] = sum(s.in_graph for s in seen) / (ran - sum(s.untold for s in seen))
    spread = [s for s in seen if s.batched_square is not None]
    of = sum(float(s.batched_square) for s in spread)
    if of:
        values["output_spread"] = _told(min(math.sqrt(sum(float(s.deviation_square) for s in spread) / of), 1.0))
    return values


def _units(seen: Sequence[Seen], silent: list[list[bool]], window: int) -> dict[str, float]:
    rows = [s.active.tolist() for s in seen]
    now = [not any(unit) for unit in zip(*rows, strict=True)]
    if silent and len(silent[-1]) != len(now):
        silent.clear()
    silent.append(now)
    dead = [all(unit) for unit in zip(*silent[-window:], strict=True)]
    values = {"dead_fraction": sum(dead) / len(dead) if len(silent) >= window else math.nan}
    if sum(s.inputs for s in seen) >= 16:
        values["silent_fraction"] = sum(now) / len(now)
    return values


def _deltas(values: dict[str, float], deltas: Sequence[Deltas], factor: float) -> list[float]:
    made = {call for one in deltas for call in one.squares}
    squares = {call: sum(float(one.squares.get(call, 0)) for one in deltas) for call in made}
    total, entries = sum(squares.values()), sum(one.entries for one in deltas)
    values["delta_norm"] = _told(math.sqrt(total) * factor)
    if not math.isfinite(total):
        values["delta_headroom"] = math.inf
    else:
        values["delta_headroom"] = 0.5 * math.log2(total / entries) - deltas[0].floor if total > 0 else -math.inf
    norms = {call: _told(math.sqrt(square) * factor) for call, square in squares.items()}
    return [norms.get(call, math.nan) for call in range(max(made) + 1)]


def _times(pairs: Sequence[tuple[list[float], list[float]]], factor: float) -> list[float]:
    """By distance to the end."""
    turns = range(max(len(counts) for _, counts in pairs))
    sums = [sum(squares[i] for squares, _ in pairs if i < len(squares)) for i in turns]
    counts = [sum(counts[i] for _, counts in pairs if i < len(counts)) for i in turns]
    norms = [_told(math.sqrt(s / c * max(counts))) * factor for s, c in zip(sums, counts, strict=True) if c]
    return norms[::-1]
