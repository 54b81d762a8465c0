"""Names for the places of a forward pass where the signal is measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lightning_gradflow.history import Point
from lightning_gradflow.probes.layers import LayerMap


class PointNames:
    """Tells the points of a forward pass apart and gives each the same name at every step.

    A layer is one point, however often it is called. An activation belongs to the layer that it follows: one shared
    `nn.ReLU` is a point behind each layer, and a cell in a loop has the same few points at every time step. A module's
    activation is called by the module's name, a functional one `<layer>/<op>`, a second one of a kind `...:2`.

    Args:
        layers: the layers and module names of the model.

    Example:
        >>> from torch import nn
        >>> points = PointNames(LayerMap(nn.Sequential(nn.Linear(1, 1), nn.Tanh())))
        >>> points.layer("0").name, points.activation("1", "tanh").name, points.activation("(root)", "relu").name
        ('0', '1', '0/relu')
    """

    def __init__(self, layers: LayerMap) -> None:
        self._layers = layers
        self._points: dict[tuple[str, str, str, int], Point] = {}
        self._taken: set[str] = set()
        self.restart()

    def __len__(self) -> int:
        """How many points have a name."""
        return len(self._points)

    def restart(self) -> None:
        """A new forward pass starts."""
        self.last_layer = ""
        self._since_layer: dict[tuple[str, str], int] = {}

    def layer(self, name: str) -> Point:
        """The point at the output of a layer."""
        self.last_layer = name
        self._since_layer = {}
        return self._point((name, name, "", 0), name, name)

    def activation(self, module: str, op: str) -> Point:
        """The point behind an activation that was applied in the forward of `module`."""
        nth = self._since_layer.get((module, op), 0)
        self._since_layer[module, op] = nth + 1
        layer = self.last_layer or module
        if not self._layers.is_activation(module):
            return self._point((self.last_layer, module, op, nth), f"{layer}/{op}", layer)
        name = f"{layer}/{module}" if module in self._taken else module
        return self._point((self.last_layer, module, op, nth), name, module)

    def known_activation(self, module: str, op: str, among: Collection[Point]) -> Point | None:
        """The point of an activation that is repeated, in the middle of a pass of which the beginning is not seen.

        Args:
            module: in whose forward it was applied.
            op: which activation.
            among: the points that may be repeated.

        Returns:
            The point behind the layer that ran last; where none has run yet, the only one that it can be; else None.
        """
        nth = self._since_layer.get((module, op), 0)
        self._since_layer[module, op] = nth + 1
        if self.last_layer:
            return self._points.get((self.last_layer, module, op, nth))
        possible = [p for (_, its_module, its_op, _), p in self._points.items() if (its_module, its_op) == (module, op)]
        possible = [point for point in possible if point in among]
        return possible[0] if len(possible) == 1 else None

    def _point(self, key: tuple[str, str, str, int], name: str, module: str) -> Point:
        if key not in self._points:
            unique, number = name, 1
            while unique in self._taken:
                number += 1
                unique = f"{name}:{number}"
            self._taken.add(unique)
            self._points[key] = Point(unique, module, key[2])
        return self._points[key]

    def state_dict(self) -> list[list[Any]]:
        """The names that were given: last layer, module, activation, its number, name, module to name to people."""
        return [[*key, point.name, point.module] for key, point in self._points.items()]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Gives the same names from now on."""
        for last, module, op, nth, name, told in state:
            self._points[last, module, op, int(nth)] = Point(name, told, op)
            self._taken.add(name)
