"""Which modules of a model are layers, and which parameters are theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

ROOT = "(root)"
"""Stands for the LightningModule itself where it owns parameters directly; its name in `named_modules()` is empty."""


class LayerMap:
    """The layers of a model: the modules that own parameters directly, a weight and its bias together.

    A tied weight belongs to the module that registered it first. Parameters behind a parametrization (weight norm,
    spectral norm, ...) belong to the module that is parametrized.

    Args:
        model: the module whose layers are wanted.

    Example:
        >>> layers = LayerMap(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        >>> layers.names
        ('0', '2')
    """

    def __init__(self, model: nn.Module) -> None:
        self._module_name: dict[int, str] = {}
        self._owner: dict[int, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._leaves: set[str] = set()
        for name, module in model.named_modules():
            self._module_name[id(module)] = name or ROOT
            if next(module.children(), None) is None:
                self._leaves.add(name or ROOT)
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in self._owner:
                    owner = _parametrized(name) or ROOT
                    self._owner[id(parameter)] = owner
                    self._modules.setdefault(owner, model if owner == ROOT else model.get_submodule(owner))

    @property
    def names(self) -> tuple[str, ...]:
        """The layers in order of registration."""
        return tuple(self._modules)

    def module(self, layer: str) -> nn.Module:
        """The module of a layer."""
        return self._modules[layer]

    def name_of(self, module: nn.Module) -> str | None:
        """The name of any module of the model, or None for a stranger."""
        return self._module_name.get(id(module))

    def is_layer(self, name: str) -> bool:
        """Whether the module of this name owns parameters."""
        return name in self._modules

    def is_activation(self, name: str) -> bool:
        """Whether the module of this name is a leaf without parameters: the only thing in it is what it computes."""
        return name in self._leaves and name not in self._modules

    def owner(self, parameter: nn.Parameter) -> str | None:
        """The layer that a parameter belongs to, or None for a stranger."""
        return self._owner.get(id(parameter))

    def covers(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether all of these are known: modules that are built late make a new map necessary."""
        return all(id(parameter) in self._owner for parameter in parameters)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is; the CPU for a model without any."""
        of_all = (parameter for module in self._modules.values() for parameter in module.parameters())
        return next((parameter.device for parameter in of_all), torch.device("cpu"))

    def in_order(self, executed: Sequence[str]) -> list[str]:
        """All layers: those that were executed in that order, each of the others behind the one registered before it.

        A layer that another module uses without calling it (the output projection of an attention module, say) so
        stands beside that module.
        """
        order = [name for name in executed if name in self._modules]
        known = set(order)
        before: str | None = None
        for name in self._modules:
            if name not in known:
                order.insert(order.index(before) + 1 if before is not None else 0, name)
            before = name
        return order


def _parametrized(name: str) -> str:
    """The name of the module that a parametrization belongs to; any other name as it is."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("parametrizations")]) if "parametrizations" in parts else name
