"""Recurrences that are written by hand: which layers of a loop do what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_gradflow.activations import SIGMOIDS
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
        gates: how many gates and contents it computes together; 1 where it is the content alone.
    """

    again: str
    op: str
    ways_in: tuple[str, ...] = ()
    columns: Tensor | None = None
    gates: int = 1


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
    another size than the state. Where that is three or four times as large, and makes gates or nobody knows what
    follows, several gates are computed together.

    Args:
        layers: the candidates, by name: linear layers and convolutions that are called once at each time step.
        history: tells which activation stands behind a layer.
        watch: one forward pass; None where there is none.
        behind: for layers that the history does not know, the activation that follows, and whether it makes a gate.

    Example:
        >>> from torch import nn
        >>> layers = {"again": nn.Linear(4, 4), "enter": nn.Linear(2, 4)}
        >>> loops_among(layers, History(), None)
        {'again': Loop(again='again', op='', ways_in=('enter',), columns=None, gates=1)}
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
        fitting = {name: c for name, c in columns.items() if c is not None and _gates(layers[name], c)}
        states = {name: None if bool(c.all()) else c for name, c in fitting.items()}
        feeding = {
            name: tuple(one for one in layers if columns[one] is None and watch.feeds(one, name)) for name in fitting
        }
    found = {}
    for name, state in states.items():
        gates = _gates(layers[name], state)
        op, is_gate = _following(history, name, behind)
        if gates > 1 and (is_gate or (behind is not None and name in behind and not op)):
            found[name] = Loop(name, "", feeding[name], state, gates)
        elif gates == 1 and not (is_gate and op in SIGMOIDS):  # contents are multiplied by gates too
            found[name] = Loop(name, op, feeding[name], state)
    return found


def parts_of(loops: Mapping[str, Loop]) -> set[str]:
    """The layers that make the content of loops, or all of it, and those that bring the input in.

    Example:
        >>> sorted(parts_of({"again": Loop("again", "tanh", ("enter",))}))
        ['again', 'enter']
    """
    return {name for loop in loops.values() for name in (loop.again, *loop.ways_in)}


def _gates(layer: Looped, state: Tensor | None) -> int:
    """How many times the state its output is, if it may be as many gates; else 0."""
    size = int(state.sum()) if state is not None else layer.weight.shape[1]
    return next((count for count in (1, *GATES) if count * size == len(layer.weight)), 0)


def _following(history: History, name: str, behind: Mapping[str, tuple[str, bool]] | None) -> tuple[str, bool]:
    return behind[name] if behind and name in behind else _behind(history, name)


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
