"""Recurrences that are written by hand: which layers of a loop do what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_gradflow.history import History
from lightning_gradflow.remedies.through_time import Looped, TimeWatch

GATES = (3, 4)
"""How many gates and contents are computed together, in cells like GRU and LSTM."""


@dataclass(frozen=True)
class Loop:
    """A linear layer or convolution that gets its own output back at the next time step.

    Args:
        again: its name.
        op: the activation in between.
        ways_in: the layers whose output is added to its own, and that get none of it back.
        columns: (inputs,) which of its inputs, or channels, are the state; None for all.
    """

    again: str
    op: str
    ways_in: tuple[str, ...] = ()
    columns: Tensor | None = None


def loops_among(
    layers: Mapping[str, Looped],
    history: History,
    watch: TimeWatch | None,
    behind: Mapping[str, tuple[str, bool]] | None = None,
) -> dict[str, Loop]:
    """The loops that some layers make, by the name of the layer that gets the state.

    It is known from the graph of a forward pass: what goes into the second call of such a layer came out of its first.
    Without one, a square layer is taken for it if it is the only one, and the others of its size for the ways in.

    Left out is what makes a gate, whose size is no question of a signal that comes through; and layers whose output has
    another size than the state, but for those of which nobody knows what follows, where it is three or four times as
    large: several gates are computed together there.

    Args:
        layers: the candidates, by name: linear layers and convolutions that are called once at each time step.
        history: tells which activation stands behind a layer.
        watch: one forward pass; None where there is none.
        behind: for layers that the history does not know, the activation that follows, and whether it makes a gate.

    Example:
        >>> from torch import nn
        >>> layers = {"again": nn.Linear(4, 4), "enter": nn.Linear(2, 4)}
        >>> loops_among(layers, History(), None)
        {'again': Loop(again='again', op='', ways_in=('enter',), columns=None)}
    """
    if watch is None:
        square = [name for name, layer in layers.items() if layer.weight.shape[0] == layer.weight.shape[1]]
        if len(square) != 1:
            return {}
        (again,) = square
        states: dict[str, Tensor | None] = {again: None}
        size = len(layers[again].weight)
        feeding = {again: tuple(n for n, layer in layers.items() if n != again and len(layer.weight) == size)}
    else:
        columns = {name: watch.state_columns(name) for name in layers}
        sizes = {name: (1, *GATES) if behind and behind.get(name) == ("", False) else (1,) for name in layers}
        fitting = {
            name: c
            for name, c in columns.items()
            if c is not None and any(int(c.sum()) * count == len(layers[name].weight) for count in sizes[name])
        }
        states = {name: None if bool(c.all()) else c for name, c in fitting.items()}
        feeding = {
            name: tuple(one for one in layers if columns[one] is None and watch.feeds(one, name)) for name in fitting
        }
    found = {}
    for name, state in states.items():
        op, is_gate = behind[name] if behind and name in behind else _behind(history, name)
        if not is_gate:
            found[name] = Loop(name, op, feeding[name], state)
    return found


def _behind(history: History, layer: str) -> tuple[str, bool]:
    """The activation that follows a layer within its loop, in order of execution, and whether it is a gate."""
    looped = {name for row in history.rows for name in row.calls}
    points = [point for point in history.points if point.name in looped]
    at = next((i for i, point in enumerate(points) if point.is_layer and point.module == layer), None)
    if at is None:
        return "", False
    for point in points[at + 1 :] + points[:at]:
        if point.op:
            gates = history["gate_fraction"][:, history.points.index(point)]
            known = gates[np.isfinite(gates)]
            return point.op, bool(known.size and np.median(known) > 0.5)
    return "", False
