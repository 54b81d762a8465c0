"""Sees every layer output and every activation of a forward pass, called as a module or as a function."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.probes.layers import LayerMap

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "sigmoid": (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, torch.special.expit),
    "tanh": (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh),
    "hardsigmoid": (F.hardsigmoid,),
    "hardtanh": (F.hardtanh, F.hardtanh_),
    "softsign": (F.softsign,),
    "relu": (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_),
    "relu6": (F.relu6,),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "prelu": (torch.prelu, F.prelu),
    "rrelu": (torch.rrelu, torch.rrelu_, F.rrelu, F.rrelu_),
    "elu": (F.elu, F.elu_),
    "selu": (torch.selu, torch.selu_, F.selu, F.selu_),
    "celu": (torch.celu, torch.celu_, F.celu, F.celu_),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "mish": (F.mish,),
    "hardswish": (F.hardswish,),
    "softplus": (F.softplus,),
    "logsigmoid": (F.logsigmoid,),
    "glu": (F.glu,),
}
ACTIVATIONS: dict[Any, str] = {function: op for op, functions in _FUNCTIONS.items() for function in functions}
"""Every callable that counts as an activation -> its name. Softmax is left out: it saturates by design."""

_ARGUMENTS = {"hardtanh": ("min_val", "max_val"), "elu": ("alpha",), "celu": ("alpha",)}

LayerSeen = Callable[[str, Tensor], None]
ActivationSeen = Callable[[str, str, Tensor, Mapping[str, Any]], None]


class ForwardObserver(TorchFunctionMode):
    """Reports layer outputs and activations in order of execution, between `open` and `close`.

    It uses two process-wide module hooks for the names and a function mode for the activations; no module gets a hook
    of its own, and after `close` nothing is left. A compiled model runs eagerly while it is open, without being
    compiled again.

    Args:
        layers: the layers and module names of the model.
        on_layer: called with the layer's name and its (first) output tensor.
        on_activation: called with the name of the module that applied it, its op, its output, and its arguments.
    """

    def __init__(self, layers: LayerMap, on_layer: LayerSeen, on_activation: ActivationSeen) -> None:
        super().__init__()
        self._layers = layers
        self._on_layer = on_layer
        self._on_activation = on_activation
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._cleanup = contextlib.ExitStack()
        self._entered = False
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether it reports at present."""
        return self._is_open

    def open(self) -> None:
        """Starts to report; does nothing when it is open."""
        if self._is_open:
            return
        self._stack = []
        self._handles = [
            register_module_forward_pre_hook(self._before_module),
            register_module_forward_hook(self._after_module, always_call=True),
        ]
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, and the import alone takes seconds
            self._cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        if not self._entered:
            self.__enter__()
            self._entered = True
        self._is_open = True

    def close(self) -> None:
        """Stops to report and leaves nothing behind; may be called at any time and any number of times."""
        self._is_open = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._cleanup.close()
        # a mode of the user's that was entered after ours has to leave first: until then ours passes everything on
        if self._entered and _get_current_function_mode_stack()[-1:] == [self]:
            self.__exit__(None, None, None)
            self._entered = False

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`, and reports it if it is an activation."""
        result = func(*args, **(kwargs or {}))
        op = ACTIVATIONS.get(func) if self._is_open else None
        if op is not None and isinstance(result, Tensor) and result.is_floating_point():
            arguments = dict(zip(_ARGUMENTS.get(op, ()), args[1:])) | (kwargs or {})
            if op == "hardtanh" and arguments.get("min_val") == 0:
                op = "relu6"  # torch's own ReLU6 module is a hardtanh from 0 to 6
            self._on_activation(self._stack[-1] if self._stack else "", op, result, arguments)
        return result

    def _before_module(self, module: nn.Module, args: Any) -> None:
        name = self._layers.name_of(module)
        if name is not None:
            self._stack.append(name)

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._layers.name_of(module)
        if name is None:
            return
        if self._stack and self._stack[-1] == name:
            self._stack.pop()
        tensor = first_tensor(output)
        if tensor is not None and self._layers.is_layer(name):
            self._on_layer(name, tensor)


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output: the sequence of a recurrence, the hidden state of a block.

    Example:
        >>> first_tensor({"index": torch.tensor(1), "hidden": (torch.ones(2), None)})
        tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    for item in output:
        found = first_tensor(item)
        if found is not None:
            return found
    return None
