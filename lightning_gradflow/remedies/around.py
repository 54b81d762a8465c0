"""What stands around a layer, in order of execution."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_gradflow.detectors.known import newest_values
from lightning_gradflow.history import History, Point

_GATE = 0.5  # share of the samples in which an activation was a gate


def gates_of(history: History, *, with_others: bool = False) -> set[str]:
    """The layers whose output opens or shuts a gate: right before a bounded activation that multiplies a signal.

    Args:
        history: what was measured.
        with_others: whether those right before such a layer count too, which may be added to it.
    """
    is_gate = dict(zip(history.points, newest_values(history, "gate_fraction"), strict=True))
    gates: set[str] = set()
    before: list[str] = []
    for point in history.points:
        if point.is_layer:
            before.append(point.name)
            continue
        if is_gate[point] > _GATE:
            gates.update(before if with_others else before[-1:])
        before = []
    return gates


def layers_before(points: Sequence[Point], modules: Collection[str]) -> tuple[str, ...]:
    """The layers right before activations that these modules apply, in order of execution.

    Example:
        >>> points = [Point("a", "a"), Point("act", "act", "relu"), Point("b", "b"), Point("b/relu", "b", "relu")]
        >>> layers_before(points, ["act"]), layers_before(points, ["b"])
        (('a',), ('b',))
    """
    found, layer = [], ""
    for point in points:
        if point.is_layer:
            layer = point.name
        elif layer and point.module in modules:
            found.append(layer)
    return tuple(dict.fromkeys(found))


def layers_up_to(points: Sequence[Point], modules: Collection[str]) -> tuple[str, ...]:
    """All layers that are called before the last of the activations that these modules apply.

    Example:
        >>> points = [Point("a", "a"), Point("b", "b"), Point("act", "act", "relu"), Point("c", "c")]
        >>> layers_up_to(points, ["act"])
        ('a', 'b')
    """
    last = max((i for i, point in enumerate(points) if not point.is_layer and point.module in modules), default=0)
    return tuple(dict.fromkeys(point.name for point in points[:last] if point.is_layer))


def activations_around(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """For each layer the activations next to it in order of execution: (what its input comes from, what follows).

    Example:
        >>> activations_around([Point("a", "a"), Point("s", "s", "sigmoid"), Point("b", "b")])
        {'a': ('', 'sigmoid'), 'b': ('sigmoid', '')}
    """
    found: dict[str, tuple[str, str]] = {}
    before, layer = "", ""
    for point in points:
        if point.is_layer:
            found[point.name] = (before, "")
            before, layer = "", point.name
        else:
            before = point.op
            if layer and not found[layer][1]:
                found[layer] = (found[layer][0], point.op)
    return found
