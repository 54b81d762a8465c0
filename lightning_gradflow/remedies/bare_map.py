"""Layers that stand for matrices in parameters, and are called in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradflow.remedies.bare_ops import ADDITIONS, Axes, Call
from lightning_gradflow.remedies.bare_uses import Key, Use, eager, is_linear, matrices, products_of, used_of


class BareMap(nn.Module):
    """Stands for a matrix in a parameter: a layer with a weight that is written into it before each call.

    Args:
        use: which, and how it is used.
        model: where the parameter is.
        may_change: whether it trains.

    Attributes:
        unit_dims: axes of the result that count its units.
        groups: maps in it that have inputs of their own.
    """

    def __init__(self, use: Use, model: nn.Module, *, may_change: bool = True) -> None:
        nn.Module.__init__(self)
        axes = use.axes
        self._values = use.values(model)
        self._order = (*axes.groups, *axes.outputs, *axes.inputs)
        ordered = self._values.permute(self._order)
        count = len(axes.groups) + len(axes.outputs)
        flat = ordered.reshape(-1, *ordered.shape[count:])  # a view or a copy
        if len(flat.shape) > 2 and not _is_convolution(axes):
            flat = flat.flatten(1)
        owner = model.get_submodule(use.owner)
        trains = may_change and use.is_own and owner.get_parameter(use.key).requires_grad
        self.unit_dims = axes.units
        self.groups = axes.blocks * ordered.shape[: len(axes.groups)].numel()
        self.weight = nn.Parameter(flat.clone(), requires_grad=trains)
        self._bias_values = owner.get_parameter(use.bias).data if use.bias else None
        bias = None
        if self._bias_values is not None:
            bias = nn.Parameter(self._bias_values.clone(), owner.get_parameter(use.bias).requires_grad)
        self.register_parameter("bias", bias)
        self._written = self._versions()
        self.call: Call | None = None
        """The call that it stands for at the moment."""
        self.adds = False
        """Whether the bias is added by a call of its own."""

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters(recurse=False))

    @torch.no_grad()
    def write(self) -> bool:
        """Writes the weight where it belongs, if it has changed; says whether it has."""
        if self._versions() == self._written:
            return False
        ordered = self._values.permute(self._order)
        ordered.copy_(self.weight.data.reshape(ordered.shape))
        if self._bias_values is not None and self.bias is not None:
            self._bias_values.copy_(self.get_parameter("bias").data)
        self._written = self._versions()
        return True

    def forward(self, input: Tensor) -> Any:
        """The product, with the bias."""
        self.write()
        assert self.call is not None
        output = self.call.on(input)
        return output + self._bias_values if self.adds and self._bias_values is not None else output


class BareLinear(BareMap, nn.Linear):  # type: ignore[misc]  # its weight is a parameter as well
    """One whose input and output have their units on the last axis."""

    def __init__(self, use: Use, model: nn.Module, *, may_change: bool = True) -> None:
        super().__init__(use, model, may_change=may_change)
        self.out_features, self.in_features = self.weight.shape


def _is_convolution(axes: Axes) -> bool:
    return len(axes.inputs) > 1 and axes.units == (-len(axes.inputs),)


class Layers(nn.Module):
    """A model, and the layers that stand for bare matrices in it, under the names of these."""

    def __init__(self, model: nn.Module, uses: Sequence[Use], with_loops: bool) -> None:
        super().__init__()
        self._model = [model]  # not as a module: its names stay
        self.uses = {use.name: use for use in uses}
        self.maps: dict[str, BareMap] = {}
        for use in uses:
            kind = BareLinear if is_linear(use) else BareMap
            self.maps[use.name] = kind(use, model, may_change=with_loops or not use.loops)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of the model, and then the others."""
        yield from self._model[0].named_modules(*args, **kwargs)
        yield from self.maps.items()

    def get_submodule(self, target: str) -> nn.Module:
        """One of them by its name."""
        return self.maps[target] if target in self.maps else self._model[0].get_submodule(target)

    def write(self) -> list[str]:
        """Writes all weights where they belong; the names of those that have changed."""
        return [name for name, layer in self.maps.items() if layer.write()]

    def routed(self, forward: Callable[[], None]) -> Callable[[], None]:
        """The same forward pass, in which the layers are called in the place of what they stand for."""
        if not self.maps:
            return forward

        def run() -> None:
            with eager(), _Routing(self._model[0], self):
                forward()
            self.write()

        return run


class _Routing(TorchFunctionMode):
    """Calls layers in the place of the products that they stand for."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        super().__init__()
        self._owned = matrices(model)
        self._maps: dict[Key, BareMap] = {}
        self._biases: dict[BareMap, nn.Parameter] = {}
        for name, use in layers.uses.items():
            owner = model.get_submodule(use.owner)
            key = (id(owner.get_parameter(use.key)), use.offset, use.size, use.stride, use.axes)
            self._maps[key] = layers.maps[name]
            if use.bias:
                self._biases[layers.maps[name]] = owner.get_parameter(use.bias)
        self._added: tuple[Any, nn.Parameter] | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ADDITIONS and self._added is not None and len(args) == 2:
            output, bias = self._added
            if any(one is output and other is bias for one, other in (args, args[::-1])):
                self._added = None
                return output
        for parameter, call in products_of(self._owned, func, args, kwargs):
            layer = self._maps.get(used_of(call, parameter))
            if layer is not None:
                return self._called(layer, call)
        return func(*args, **kwargs)

    def _called(self, layer: BareMap, call: Call) -> Any:
        bias = self._biases.get(layer)
        layer.call, layer.adds = call, bias is not None and call.bias is not bias
        output = layer(call.source)
        layer.call = None
        if layer.adds and bias is not None:
            self._added = output, bias
        return output
