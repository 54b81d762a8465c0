"""Which modules of a model are layers, and which parameters are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_gradflow.probes.shards import is_sharded

ROOT = "(root)"
"""Stands for the LightningModule itself where it owns parameters directly; its name in `named_modules()` is empty."""


_LISTS = (nn.ParameterList, nn.ParameterDict)  # torch's own, but the matrices in them are the user's
_WITHOUT = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Kinds of torch's that have no parameters of their own."""


def is_of_torch(module: nn.Module) -> bool:
    """Whether its parameters are those of a kind of torch's, which may be derived from.

    Example:
        >>> is_of_torch(nn.Linear(2, 2)), is_of_torch(nn.ParameterList())
        (True, False)
    """
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return not isinstance(module, _LISTS) and any(kind not in _WITHOUT for kind in kinds)


def module_named(model: nn.Module, layer: str) -> nn.Module:
    """The module of a layer, which may be the model itself.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> module_named(model, ROOT) is model, module_named(model, "0")
        (True, ReLU())
    """
    return model if layer == ROOT else model.get_submodule(layer)


class LayerMap:
    """The layers of a model: the modules that own parameters directly, a weight and its bias together.

    A list of parameters is a layer that is never called: where a module has nothing but such lists, what it gives
    stands for the first of them.

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
        self._known: set[tuple[int, str]] = set()
        self._modules: dict[str, nn.Module] = {}
        self._leaves: set[str] = set()
        self._owner: dict[int, str] = {}
        self._tree: list[tuple[str, nn.Module, list[nn.Module | None]]] = []
        for name, module, _ in self._look_at(model):
            self._module_name[id(module)] = name or ROOT
            if next(module.children(), None) is None:
                self._leaves.add(name or ROOT)
        self.find_owners(model)
        for owner in dict.fromkeys(self._owner.values()):
            self._modules[owner] = module_named(model, owner)
        self._first_list = self._find_lists(model)

    def _look_at(self, model: nn.Module) -> list[tuple[str, nn.Module, list[nn.Module | None]]]:
        """Name, module and children of all there is; the last time's, which is found faster, where nothing changed."""
        if not self._tree or any([*module._modules.values()] != children for _, module, children in self._tree):
            self._tree = [(name, module, [*module._modules.values()]) for name, module in model.named_modules()]
        return self._tree

    def find_owners(self, model: nn.Module) -> None:
        """Looks once more which layer each parameter belongs to: FSDP exchanges them around a forward pass."""
        self._owner = {}
        self._known = set()
        for name, module, _ in self._look_at(model):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._known.add((id(module), key))
                    self._owner.setdefault(id(parameter), _parametrized(name) or ROOT)

    def _find_lists(self, model: nn.Module) -> dict[str, str]:
        """Module -> its first list of parameters, of those that have nothing else to compute with."""
        found = {}
        for name, module, children in self._look_at(model):
            lists = [child for child in children if isinstance(child, _LISTS) and self.name_of(child) in self._modules]
            inside = {self.name_of(part) for part in module.modules()} & {*self._modules}
            if lists and inside == {self.name_of(one) for one in lists}:
                found[name or ROOT] = str(self.name_of(lists[0]))
        return found

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

    @property
    def names_by_identity(self) -> Mapping[int, str]:
        """The name of every module, by its `id`."""
        return self._module_name

    def is_layer(self, name: str) -> bool:
        """Whether the module of this name owns parameters."""
        return name in self._modules

    def that_runs(self, name: str) -> str | None:
        """The layer whose output a module gives; None for one that is none.

        Example:
            >>> import torch
            >>> model = nn.ModuleDict({"own": nn.ModuleDict({"w": nn.ParameterList([torch.ones(2)])})})
            >>> LayerMap(model).that_runs("own")
            'own.w'
        """
        return name if name in self._modules else self._first_list.get(name)

    def is_activation(self, name: str) -> bool:
        """Whether the module of this name is a leaf without parameters: the only thing in it is what it computes."""
        return name in self._leaves and name not in self._modules

    def owner(self, parameter: nn.Parameter) -> str | None:
        """The layer that a parameter belongs to, or None for a stranger."""
        return self._owner.get(id(parameter))

    def covers(self, model: nn.Module) -> bool:
        """Whether all modules and parameters are known: what is built late makes a new map necessary."""
        return all(
            id(module) in self._module_name
            and all((id(module), key) in self._known for key, value in module._parameters.items() if value is not None)
            for _, module, _ in self._look_at(model)
        )

    @property
    def spread(self) -> tuple[str, ...]:
        """The layers whose parameters are spread over ranks; their outputs are converted by hooks of their own."""
        return tuple(
            name
            for name, module in self._modules.items()
            if any(p is not None and is_sharded(p) for p in module._parameters.values())
        )

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
    parts = name.split(".") if "parametrizations" in name else ()
    return ".".join(parts[: parts.index("parametrizations")]) if "parametrizations" in parts else name
