"""The statistics of outputs and of their gradients: of large tensors one by one, of small ones many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_gradflow.probes.flat_side import always_flat, saturated
from lightning_gradflow.probes.packing import Deltas, Seen
from lightning_gradflow.probes.reading import CHUNK, square_sum
from lightning_gradflow.probes.spread import spread_between_samples

_SMALL = 1 << 12  # entries: to copy and to stack them is cheaper than a handful of calls for each tensor


@dataclass(slots=True)
class _Alike:
    """Tensors of one shape of which the same is wanted."""

    tensors: list[Tensor] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)  # of each tensor
    with_spread: bool = False
    op: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    axis: int | None = None


class Gathering:
    """Reads outputs and gradients into what their points have seen.

    Small tensors on a CPU are copied, since the run may write to them, and wait for others of their shape: at most
    262,144 entries in all. What they add is there after `flush`.

    Example:
        >>> gathering, seen = Gathering(), Seen()
        >>> _ = gathering.output(seen, torch.tensor([[1.0], [3.0]]), with_spread=True)
        >>> gathering.flush()
        >>> seen.output_count, seen.output_square, seen.deviation_square
        (2, 10.0, 2.0)
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forgets what waits."""
        self._alike: dict[tuple[Callable[[_Alike], None], Hashable, torch.Size, torch.dtype], _Alike] = {}
        self._entries = 0

    def output(self, seen: Seen, values: Tensor, *, with_spread: bool) -> Tensor:
        """Takes what came out of a layer or activation; returns the same numbers, for `activation`.

        Args:
            seen: of the point.
            values: a detached tensor with entries.
            with_spread: whether it is wanted how much the samples of the batch differ.
        """
        seen.output_count += values.numel()
        with_spread = with_spread and values.dim() > 0 and len(values) > 1
        if _waits(values):
            copied = values.clone()
            self._wait(_take_outputs, with_spread, copied, seen).with_spread = with_spread
            return copied
        seen.output_square = plus(seen.output_square, _number(square_sum(values)))
        if with_spread:
            deviation, square = map(_number, spread_between_samples(values))
            seen.deviation_square = plus(seen.deviation_square, deviation)
            seen.batched_square = plus(seen.batched_square, square)
        return values

    def activation(self, seen: Seen, op: str, values: Tensor, arguments: Mapping[str, Any], axis: int | None) -> None:
        """Takes what came out of an activation.

        Args:
            seen: of the point.
            op: which activation.
            values: what `output` returned.
            arguments: what it was called with.
            axis: the dimension of the units, or None where there are none.
        """
        if axis is not None:
            width = values.shape[axis]
            if seen.units not in (0, width):  # which number of units came last tells what is kept
                self.flush()
            seen.units = width
        if _waits(values):
            told = tuple(arguments.get(name) for name in ("min_val", "max_val", "alpha")) if arguments else ()
            alike = self._wait(_take_activations, (op, axis, told), values, seen)
            alike.op, alike.arguments, alike.axis = op, arguments, axis
        else:
            _take_activations(_Alike([values], [seen], op=op, arguments=arguments, axis=axis))

    def delta(self, deltas: Deltas, call: int, gradient: Tensor) -> None:
        """Takes the gradient that came to a call of a point."""
        deltas.entries += gradient.numel()
        if math.isnan(deltas.floor):
            deltas.floor = _floor(gradient.dtype)
        gradient = gradient.detach()
        if _waits(gradient):
            self._wait(_take_deltas, None, gradient.clone(), (deltas, call))
        else:
            deltas.squares[call] = plus(deltas.squares.get(call), _number(square_sum(gradient)))

    def _wait(self, read: Callable[[_Alike], None], kind: Hashable, values: Tensor, owner: Any) -> _Alike:
        if self._entries > CHUNK:
            self.flush()
        self._entries += values.numel()
        key = read, kind, values.shape, values.dtype
        alike = self._alike.get(key)
        if alike is None:
            alike = self._alike[key] = _Alike()
        alike.tensors.append(values)
        alike.owners.append(owner)
        return alike

    @torch.no_grad()
    def flush(self) -> None:
        """Reads what waits."""
        waiting = self._alike
        self.drop()
        for (read, *_), alike in waiting.items():
            read(alike)


def plus(before: Any, value: Any) -> Any:
    """Their sum; None before is nothing."""
    return value if before is None else before + value


def _waits(values: Tensor) -> bool:
    # others are read where they are: a stream of a GPU may write to them meanwhile, and a subclass is not stacked
    return type(values) is Tensor and values.is_cpu and values.numel() <= _SMALL


def _number(value: Tensor) -> float | Tensor:
    """A number that is on the host as one of Python's, which is faster to add and to pack."""
    return value.item() if value.is_cpu else value


@lru_cache(maxsize=16)
def _floor(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return math.log2(info.tiny) + math.log2(info.eps)


def _squares(stacked: Tensor) -> list[float]:
    """(K, ...) -> K sums of squares."""
    entries = stacked.flatten(1) if stacked.dim() > 1 else stacked[:, None]
    squares: list[float] = torch.linalg.vector_norm(entries, dim=1, dtype=torch.float64).square_().tolist()
    return squares


def _take_deltas(alike: _Alike) -> None:
    for (deltas, call), square in zip(alike.owners, _squares(torch.stack(alike.tensors)), strict=True):
        deltas.squares[call] = plus(deltas.squares.get(call), square)


def _take_outputs(alike: _Alike) -> None:
    stacked = torch.stack(alike.tensors)
    if not alike.with_spread:
        for seen, square in zip(alike.owners, _squares(stacked), strict=True):
            seen.output_square = plus(seen.output_square, square)
        return
    wide = stacked.double()
    squares = wide.square().flatten(1).sum(1).tolist()
    deviations = wide.sub_(wide.mean(1, keepdim=True)).square_().flatten(1).sum(1).tolist()
    for seen, square, deviation in zip(alike.owners, squares, deviations, strict=True):
        seen.output_square = plus(seen.output_square, square)
        seen.batched_square = plus(seen.batched_square, square)
        seen.deviation_square = plus(seen.deviation_square, deviation)


def _take_activations(alike: _Alike) -> None:
    """Of one large tensor, or of many small ones."""
    values, axis, number = alike.tensors[0], alike.axis, len(alike.tensors)
    several = torch.stack(alike.tensors) if number > 1 else values[None]
    bounded = saturated(alike.op, several, alike.arguments)
    if bounded is not None:
        counts = bounded.flatten(1).sum(1) if values.dim() else bounded
        for seen, near in zip(alike.owners, counts.tolist() if counts.is_cpu else counts, strict=True):
            seen.saturated = plus(seen.saturated, near)
            seen.bounded_count += values.numel()
    if axis is None:
        return
    # the units of all of them side by side
    side_by_side = several.movedim(0, axis).flatten(axis, axis + 1) if number > 1 else values
    is_silent = always_flat(alike.op, side_by_side, alike.arguments, axis)
    if is_silent is None:
        return
    inputs = values.numel() // values.shape[axis]
    for seen, active in zip(alike.owners, is_silent.logical_not().view(number, -1).unbind(), strict=True):
        grown = seen.active is not None and seen.active.shape == active.shape
        seen.active = seen.active | active if grown else active
        seen.inputs = inputs + (seen.inputs if grown else 0)
