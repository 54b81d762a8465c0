"""Which matrices modules of the user's own multiply with, and how: seen in a forward pass."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradflow.probes.layers import is_of_torch
from lightning_gradflow.probes.observer import ACTIVATIONS
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.bare_ops import ADDITIONS, LOOKUPS, Axes, Call, products
from lightning_gradflow.remedies.through_time import comes_from

Key = tuple[int, int, tuple[int, ...], tuple[int, ...], Axes]
"""The parameter's `id`, and what of it is used how."""
Owned = Mapping[int, tuple[str, str, nn.Parameter]]
"""By `id` of a parameter: the module that it belongs to, its name there, and itself."""


@dataclass(frozen=True)
class Use:
    """A matrix in a parameter, and how it is used.

    Args:
        name: of the parameter, with a number for the second matrix in it, and so on.
        owner: the module that the parameter belongs to; "" for the model.
        key: its name there.
        offset: of the matrix in it.
        size: of the matrix, without axes along which it is repeated.
        stride: of the same.
        axes: what they are.
        bias: the name, in the same module, of what is added to the product, or "".
        is_own: whether nothing else is done with the same numbers, so that they may be drawn anew.
        loops: whether it gets back what came of its own output.
        calls: how often it was used in the pass.
        op: the activation that is called next on something of the size of its output, or "".
    """

    name: str
    owner: str
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    axes: Axes
    bias: str = ""
    is_own: bool = True
    loops: bool = False
    calls: int = 1
    op: str = ""

    def values(self, model: nn.Module) -> Tensor:
        """The matrix, in a model: to write into it is to write into the parameter, unseen by autograd."""
        parameter = model.get_submodule(self.owner).get_parameter(self.key).data
        return parameter.as_strided(self.size, self.stride, parameter.storage_offset() + self.offset)


def is_linear(use: Use) -> bool:
    """Whether it does what a linear layer does: both its input and its output have their units on the last axis."""
    return not use.axes.groups and use.axes.units == (-1,) and len(use.axes.inputs) == 1


def matrices(model: nn.Module) -> dict[int, tuple[str, str, nn.Parameter]]:
    """By id: parameters of two dimensions or more, of modules that are not torch's, and no other module's."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, module in model.named_modules():
        if is_of_torch(module):
            continue
        for key, p in module._parameters.items():
            if p is None or isinstance(p, nn.UninitializedParameter) or is_sharded(p):
                continue
            if p.dim() > 1 and p.is_floating_point() and owners[id(p)] == 1:
                found[id(p)] = (name, key, p)
    return found


@contextmanager
def eager() -> Iterator[None]:
    """A compiled model runs eagerly, so that what it calls can be seen."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
            stack.enter_context(stance)
        yield


def _whole(tensor: Any, owned: Mapping[int, Any]) -> nn.Parameter | None:
    """The parameter that a tensor is, or is a view of."""
    if not isinstance(tensor, Tensor):
        return None
    for one in (tensor, tensor._base):
        if one is not None and id(one) in owned:
            parameter: nn.Parameter = owned[id(one)][2]
            return parameter
    return None


def used_of(call: Call, parameter: nn.Parameter) -> Key:
    """What is used of a parameter, without axes along which it is repeated (`expand`)."""
    weight, axes = call.weight, call.axes
    kept = [i for i in range(weight.dim()) if not _is_repeated(weight, i)]
    new = {old: at for at, old in enumerate(kept)}
    groups = tuple(i for i in axes.groups if i in new)
    units = dict(zip((*axes.groups, *axes.outputs), axes.units, strict=True))
    outputs = tuple(i for i in axes.outputs if i in new)
    axes = Axes(
        tuple(new[i] for i in groups),
        tuple(new[i] for i in outputs),
        tuple(new[i] for i in axes.inputs),
        tuple(units[i] for i in (*groups, *outputs)),
        axes.blocks,
    )
    size, stride = tuple(weight.shape[i] for i in kept), tuple(weight.stride(i) for i in kept)
    offset = int(weight.storage_offset()) - int(parameter.storage_offset())
    return id(parameter), offset, size, stride, axes


def _is_repeated(weight: Tensor, axis: int) -> bool:
    return weight.stride(axis) == 0 and weight.shape[axis] > 1


def products_of(
    owned: Mapping[int, Any], function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[nn.Parameter, Call]]:
    """Those of a matrix with what is none."""
    for call in products(function, args, kwargs):
        parameter, source = _whole(call.weight, owned), call.source
        if parameter is None or _whole(source, owned) is not None:
            continue
        is_plain = source.is_floating_point() and source.layout is torch.strided
        if is_plain and not any(_is_repeated(call.weight, axis) for axis in (*call.axes.outputs, *call.axes.inputs)):
            yield parameter, call


@dataclass
class _Seen:
    use: Use
    output: Tensor
    calls: int = 1


class UseFinder(TorchFunctionMode):
    """Sees which matrices are multiplied with, and what is done with the product."""

    def __init__(self, model: nn.Module, owned: Mapping[int, tuple[str, str, nn.Parameter]]) -> None:
        super().__init__()
        self._owned = owned
        self._model = model
        self._seen: dict[Key, _Seen] = {}
        self._waiting: list[Key] = []  # for an activation
        self._newest: tuple[Key, Any] | None = None
        self._looked_up: set[int] = set()
        self._biases: list[tuple[Key, nn.Parameter]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._look(func, args, kwargs, result)
        return result

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if func in LOOKUPS:
            table = next((p for p in (_whole(x, self._owned) for x in args[:2]) if p is not None), None)
            if table is not None and not (isinstance(result, Tensor) and result._base is table):
                self._looked_up.add(id(table))
        if func in ACTIVATIONS and args and isinstance(args[0], Tensor):
            self._activation(ACTIVATIONS[func], args[0])
        if func in ADDITIONS and self._newest is not None and len(args) == 2 and not kwargs:
            key, output = self._newest
            for one, other in (args, args[::-1]):
                if one is output:
                    self._note_bias(key, other)
        if not isinstance(result, Tensor):
            return
        for parameter, call in products_of(self._owned, func, args, kwargs):
            key = used_of(call, parameter)
            seen = self._seen.get(key)
            if seen is None:
                owner, name, _ = self._owned[id(parameter)]
                use = Use(".".join(filter(None, (owner, name))), owner, name, *key[1:])
                self._seen[key] = _Seen(use, result)
            else:
                seen.calls += 1
                if seen.calls == 2 and call.source.requires_grad and comes_from(call.source, seen.output):
                    seen.use = replace(seen.use, loops=True)
            self._newest = key, result
            self._waiting.append(key)
            self._note_bias(key, call.bias)

    def _activation(self, op: str, source: Tensor) -> None:
        for key in self._waiting:
            seen = self._seen[key]
            if source.shape == seen.output.shape and not seen.use.op:
                seen.use = replace(seen.use, op=op)
        self._waiting.clear()

    def _note_bias(self, key: Key, bias: Any) -> None:
        if isinstance(bias, nn.Parameter) and bias.shape == self._seen[key].output.shape[-1:]:
            self._biases.append((key, bias))

    def uses(self) -> tuple[Use, ...]:
        """Those that were seen, in order of execution."""
        times = Counter(id(bias) for _, bias in {(key, bias) for key, bias in self._biases})
        biases = {key: bias for key, bias in self._biases if times[id(bias)] == 1}
        numbers: Counter[int] = Counter()
        shared = self._looked_up | self._overlapping()
        found = []
        for key, seen in self._seen.items():
            use, parameter = seen.use, key[0]
            number = numbers[parameter]
            numbers[parameter] += 1
            own = dict(self._model.get_submodule(use.owner).named_parameters(recurse=False))
            bias = next((name for name, p in own.items() if p is biases.get(key)), "")
            name = f"{use.name}[{number}]" if number else use.name
            bias = bias if is_linear(use) else ""
            found.append(replace(use, name=name, bias=bias, is_own=parameter not in shared, calls=seen.calls))
        return tuple(found)

    def _overlapping(self) -> set[int]:
        """Parameters of which the same numbers are used in several ways."""
        counts = Counter(key[0] for key in self._seen)
        found = set()
        for parameter in (one for one, count in counts.items() if count > 1):
            whole = self._owned[parameter][2]
            taken = torch.zeros_like(whole, dtype=torch.uint8)
            for _, offset, size, stride, _ in (key for key in self._seen if key[0] == parameter):
                taken.as_strided(size, stride, offset).add_(1)
            if int(taken.max()) > 1:
                found.add(parameter)
        return found
