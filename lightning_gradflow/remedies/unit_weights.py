"""The weights on either side of a layer's units, and changes of them that can be taken back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_gradflow.probes.weight_size import TRANSPOSED
from lightning_gradflow.remedies.optimizer_state import forget_units
from lightning_gradflow.remedies.training import Training

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Norms in which a unit stays by itself."""
NORMS = (*PER_CHANNEL, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Side:
    """Where the weights of units are: incoming ones, or outgoing ones.

    Args:
        weight: name of the parameter.
        axis: of it, on which the units are.
        bias: name of the layer's bias, or "".
        on: axis of the layer's input or output on which the units are.
    """

    weight: str
    axis: int
    bias: str
    on: int


class Sides:
    """Finds the weights that may be changed: own, trained, and no other module's.

    Args:
        training: the run.
    """

    def __init__(self, training: Training) -> None:
        self._model = training.model
        owners = Counter(p for m in self._model.modules() for p in m._parameters.values() if p is not None)
        trained = {p for optimizer in training.optimizers for group in optimizer.param_groups for p in group["params"]}
        self._own = {p for p, count in owners.items() if count == 1 and p in trained and p.requires_grad}

    def incoming(self, layer: str) -> Side | None:
        """Of the units that come out of a layer; None where they may not be changed."""
        module = self._module(layer)
        if isinstance(module, TRANSPOSED):
            return self._side(layer, 1, 1) if module.groups == 1 else None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *NORMS)):
            return self._side(layer, 0, -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) else 1)
        return None

    def outgoing(self, layer: str) -> Side | None:
        """Of the units that go into a layer; None where they may not be changed, or are not told apart by it."""
        module = self._module(layer)
        if isinstance(module, nn.Linear):
            return self._side(layer, 1, -1)
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups == 1:
            return self._side(layer, 0 if isinstance(module, TRANSPOSED) else 1, 1)
        return None

    def _module(self, layer: str) -> nn.Module | None:
        """The layer, if all of its parameters may be changed."""
        module = dict(self._model.named_modules()).get(layer)
        # a weight that is computed from others (weight norm) is no parameter: to write into it has no effect
        if module is None or module._parameters.get("weight") is None:
            return None
        return module if all(p in self._own for p in module._parameters.values() if p is not None) else None

    def _side(self, layer: str, axis: int, on: int) -> Side:
        bias = self._model.get_submodule(layer)._parameters.get("bias")
        return Side(f"{layer}.weight", axis, "" if bias is None else f"{layer}.bias", on)


class Edit:
    """Changes of a module's parameters in place, which can be taken back, or carried over to the model.

    Args:
        module: the module, or the copy of it that is rehearsed.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> before, edit = layer.weight.tolist(), Edit(layer)
        >>> _ = edit.units("weight", 0, torch.tensor([True, False])).zero_()
        >>> edit.undo()
        >>> layer.weight.tolist() == before
        True
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: dict[str, Tensor] = {}
        self._parts: dict[tuple[str, int], Tensor] = {}

    def units(self, name: str, axis: int, chosen: Tensor) -> Tensor:
        """A parameter with `axis` first, of which the units in the mask `chosen` are to be changed."""
        known = self._parts.get((name, axis))
        self._parts[name, axis] = chosen if known is None else known | chosen
        return self.whole(name).movedim(axis, 0)

    def whole(self, name: str) -> Tensor:
        """A parameter that is to be changed, of which the optimizers need not forget anything."""
        parameter = self._module.get_parameter(name).detach()
        if name not in self._before:
            self._before[name] = parameter.clone()
        return parameter

    def undo(self) -> None:
        """Puts everything back."""
        for name, value in self._before.items():
            self._module.get_parameter(name).detach().copy_(value)
        self._before, self._parts = {}, {}

    def carry_over(self, training: Training) -> None:
        """Gives the model the new weights, drops their pending gradient, and makes the units new to the optimizers."""
        for name in self._before:
            parameter = training.model.get_parameter(name)
            parameter.detach().copy_(self._module.get_parameter(name).detach())
            parameter.grad = None
        for (name, axis), chosen in self._parts.items():
            rows, columns = (chosen, None) if axis == 0 else (None, chosen)
            forget_units(training.optimizers, training.model.get_parameter(name), rows=rows, columns=columns)
