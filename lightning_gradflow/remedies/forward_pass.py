"""What one forward pass of a rehearsal shows: which units fire, what goes into each layer and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.flat_side import flat
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.observer import ACTIVATIONS, ForwardObserver
from lightning_gradflow.probes.points import PointNames
from lightning_gradflow.probes.transfer import wide_dtype
from lightning_gradflow.probes.written_rectifiers import LIMITS

_KEPT = 64  # entries along the first axis, most often samples: enough to see that something changed
_BENT = frozenset({"gelu", "silu", "mish"})  # near zero on both sides of it: their flat side begins below -1
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # their units are on the last axis


@dataclass
class Units:
    """What the units of an activation did in one pass, over all of its calls.

    Args:
        point: the name of the activation, as in the history.
        module: the module to name to people.
        feeder: the layer that ran last before it.
        op: which activation.
    """

    point: str
    module: str
    feeder: str
    op: str
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, 0))
    has_flat_side: bool = True

    def add(self, before: Tensor, output: Tensor, axis: int, arguments: Mapping[str, Any]) -> None:
        """Takes a call: what went in, what came out, and the axis that its units are on."""
        is_flat = flat(self.op, output, arguments)
        if is_flat is None:
            self.has_flat_side = False
            return
        before = before.to(wide_dtype(before.device))
        if self.op in _BENT:
            is_flat = is_flat & (before < -1)
        active, before = ~_rows(is_flat, axis), _rows(before, axis)
        sums = torch.stack([active.to(before.dtype).sum(0), before.sum(0), before.square().sum(0)])
        self.sums = self.sums + sums if self.count else sums
        self.count += len(before)

    def statistics(self, averaged: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(U,) each: the share of entries off the flat side; mean and deviation of what goes into the activation."""
        active, mean, square = averaged(self.sums / max(self.count, 1))
        return active, mean, (square - mean.square()).clamp_min(0).sqrt()


@dataclass
class Pass:
    """What one forward pass showed.

    Args:
        units: by the name of the activation, in order of execution; only those behind a layer of their width.
        inputs: the first input of each call of a layer.
        outputs: the output of each call of a layer, in order of execution.
        numbers: every single number that was computed with a graph: the loss, and what it is made of.
    """

    units: dict[str, Units] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    numbers: list[Tensor] = field(default_factory=list)

    def change(self, other: Pass) -> dict[str, Tensor]:
        """How much each layer's output, and under "" the numbers, differ in `other`: max |difference| / rms."""
        changes = {name: difference(seen, other.outputs.get(name, [])) for name, seen in self.outputs.items()}
        return changes | {"": difference(self.numbers, other.numbers)}


@dataclass
class Push:
    """Puts numbers of a usual size into the outputs of units, to see where they go.

    Args:
        point: the activation.
        chosen: (U,) which of its units.
        seed: the same numbers come each time.
    """

    point: str
    chosen: Tensor
    seed: int

    def apply(self, output: Tensor, axis: int) -> None:
        """Changes the output of a call in place, whatever graph it has."""
        values = output.detach().movedim(axis, -1)
        size = values[..., ~self.chosen].float().square().mean().sqrt() if not self.chosen.all() else torch.ones(())
        size = torch.where(size > 0, size.cpu(), 1.0)
        shape = values[..., self.chosen].shape
        # positive throughout: neither a mean over positions nor another rectifier makes nothing of it
        numbers = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))
        values[..., self.chosen] = (size * numbers).to(values)


class _Watch(ForwardObserver):
    """Also keeps what goes into an activation, which one that works in place overwrites, and single numbers."""

    def __init__(self, layers: LayerMap, seen: Pass, push: Push | None) -> None:
        super().__init__(layers, self._layer, self._activation, on_input=self._take_input)
        self._map, self._seen, self._push = layers, seen, push
        self._names = PointNames(layers)
        self._before: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_open and (func in ACTIVATIONS or func in LIMITS):
            before = args[0] if args else (kwargs or {}).get("input")
            if func in LIMITS:  # either operand of a maximum may be the one that is cut off
                before = next((x for x in args if isinstance(x, Tensor) and x.requires_grad), before)
            self._before = before.detach().clone() if isinstance(before, Tensor) else None
        result = super().__torch_function__(func, types, args, kwargs)
        if self.is_open and isinstance(result, Tensor) and result.dim() == 0 and result.requires_grad:
            self._seen.numbers.append(result.detach().clone())
        return result

    def _take_input(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name = self._map.name_of(module)
        if name is not None and arguments and isinstance(arguments[0], Tensor):
            self._seen.inputs.setdefault(name, []).append(arguments[0][:_KEPT].detach().clone())

    def _layer(self, name: str, output: Tensor) -> None:
        self._names.layer(name)
        self._seen.outputs.setdefault(name, []).append(output[:_KEPT].detach().clone())

    def _activation(self, module: str, op: str, output: Tensor, arguments: Mapping[str, Any]) -> None:
        point, feeder, before = self._names.activation(module, op), self._names.last_layer, self._before
        axis = unit_axis(output, self._map.module(feeder)) if feeder else None
        if axis is None or before is None or before.shape != output.shape:
            return
        units = self._seen.units.setdefault(point.name, Units(point.name, point.module, feeder, op))
        units.add(before, output.detach(), axis, arguments)
        if self._push is not None and self._push.point == point.name:
            self._push.apply(output, axis)


def look(layers: LayerMap, run: Callable[[], None], push: Push | None = None) -> Pass:
    """Runs one forward pass and says what it showed.

    Args:
        layers: of what is run.
        run: runs it.
        push: changes the outputs of units in this pass.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> _ = nn.init.zeros_(net[0].weight), nn.init.constant_(net[0].bias, -1.0)
        >>> seen = look(LayerMap(net), lambda: net(torch.ones(4, 2)))
        >>> active, mean, deviation = seen.units["1"].statistics(lambda values: values)
        >>> active.tolist(), mean.tolist(), deviation.tolist()
        ([0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0])
    """
    seen = Pass()
    watch = _Watch(layers, seen, push)
    watch.open()
    try:
        run()
    finally:
        watch.close()
    return seen


def width(layer: nn.Module) -> int | None:
    """The number of units of a layer that has one weight a unit or one row of weights a unit; None for any other."""
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(units := getattr(layer, name, None), int):
            return units
    shape: tuple[int, ...] = getattr(layer, "normalized_shape", ())
    return shape[0] if len(shape) == 1 else None


def unit_axis(values: Tensor, layer: nn.Module) -> int | None:
    """The axis of a batch on which the units of a layer stand; None where no axis is as wide as the layer.

    Example:
        >>> unit_axis(torch.zeros(8, 3, 5, 5), nn.Conv2d(1, 3, 2)), unit_axis(torch.zeros(8, 5, 3), nn.Linear(2, 3))
        (1, 2)
    """
    axis = values.dim() - 1 if isinstance(layer, _LAST) else 1
    return axis if values.dim() > 1 and values.shape[axis] == width(layer) else None


def difference(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Largest |difference| / rms of the first; inf where shapes or calls differ, or a number is not finite.

    Example:
        >>> difference([torch.tensor([2.0, 2.0])], [torch.tensor([2.0, 3.0])])
        tensor(0.5000)
    """
    device = before[0].device if before else None
    if [b.shape for b in before] != [a.shape for a in after]:
        return torch.tensor(torch.inf, device=device)
    if not before:
        return torch.tensor(0.0)
    old, new = (torch.cat([part.flatten().float() for part in parts]) for parts in (before, after))
    if not old.numel():
        return torch.tensor(0.0, device=device)
    # a layer that gives nothing but zeros has no size: any change of it is one
    size = old.square().mean().sqrt().clamp_min(torch.finfo(old.dtype).tiny)
    return torch.nan_to_num((new - old).abs().amax() / size, nan=torch.inf)


def _rows(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, -1).flatten(0, -2)
