"""Which call of its point an output comes from, where activation checkpointing repeats the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_gradflow.history import Point
from lightning_gradflow.probes.custom_functions import in_custom_function
from lightning_gradflow.probes.packing import Seen


@dataclass(slots=True)
class RepeatedCall:
    """A call that is repeated; which one is known when its whole segment is."""

    number: int | None = None


class Segment:
    """What checkpointing has repeated since the last gradient came."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Another segment, or another forward pass, begins."""
        self._calls: dict[Point, list[RepeatedCall]] = {}

    def repeat(self, point: Point) -> RepeatedCall:
        """The next call of a point."""
        call = RepeatedCall()
        self._calls.setdefault(point, []).append(call)
        return call

    def end(self, sample: Mapping[Point, Seen]) -> None:
        """Tells the calls their numbers: the backward pass meets segments in reverse, and the calls of one in order."""
        for point, repeated in self._calls.items():
            waiting = sample[point].without_graph
            first = max(0, len(waiting) - len(repeated))
            for call, number in zip(repeated, waiting[first:], strict=False):
                call.number = number
            del waiting[first:]
        self.clear()


def may_be_repeated() -> bool:
    """Whether what runs now makes no graph and looks like the first pass of checkpointing."""
    return not torch.is_grad_enabled() and in_custom_function()
