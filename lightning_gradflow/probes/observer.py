"""Sees every layer output and every activation of a forward pass, called as a module or as a function."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.probes.comparisons import COMPARING, SCORING
from lightning_gradflow.probes.detached import Detached
from lightning_gradflow.probes.dropout import DROPOUTS, drops, drops_inside
from lightning_gradflow.probes.gates import PRODUCTS
from lightning_gradflow.probes.layers import ROOT, LayerMap
from lightning_gradflow.probes.shards import is_cut, is_transformed, local
from lightning_gradflow.probes.softmax_scores import CHOOSING
from lightning_gradflow.probes.written_rectifiers import LIMITS, rectifier

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

_ABOUT_HOOKS = r"Using `torch\.compile\(module\)` when there are global hooks"

LayerSeen = Callable[[str, Tensor], None]
ActivationSeen = Callable[[str, str, Tensor, Mapping[str, Any]], None]
RecurrenceSeen = Callable[[str, nn.RNNBase, tuple[Any, ...], Any], None]
InputSeen = Callable[[nn.Module, tuple[Any, ...]], None]
SequenceSeen = Callable[[str, nn.RNNBase | nn.MultiheadAttention, Any], None]
ProductSeen = Callable[[tuple[Any, ...]], None]
SoftmaxSeen = Callable[[str | None, Any, tuple[Any, ...], dict[str, Any]], None]
ComparisonSeen = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]


class ForwardObserver(TorchFunctionMode):
    """Reports layer outputs and activations in order of execution, between `open` and `close`.

    It uses two process-wide module hooks for the names and a function mode for the activations. No module gets a hook
    of its own, but for layers that are spread over ranks, and after `close` nothing is left. A compiled model runs
    eagerly while it is open, without being compiled again. What goes on inside a network that is no part of the model
    (a teacher, a perceptual loss) is not reported.

    Args:
        layers: the layers and module names of the model.
        on_layer: called with the layer's name and its (first) output tensor.
        on_activation: called with the name of the module that applied it, its op, its output, and its arguments.
        on_error: called with what went wrong inside the user's forward pass, which it is kept out of; by default it is
            raised.
        on_recurrence: called with the name of an RNN, LSTM or GRU, the module, its positional arguments and its output.
        on_input: called with a layer and the positional arguments of its call, before `on_layer`.
        on_sequence: called with the name of a recurrence or attention of torch's, the module, and its sequence.
        on_product: called with the factors of a product.
        on_comparison: called with function, result and arguments of what outputs may be compared with targets by.
        on_softmax: called with the name of the module that applied one, the function, and its arguments.
    """

    def __init__(
        self,
        layers: LayerMap,
        on_layer: LayerSeen,
        on_activation: ActivationSeen,
        on_error: Callable[[Exception], None] | None = None,
        on_recurrence: RecurrenceSeen | None = None,
        on_input: InputSeen | None = None,
        on_sequence: SequenceSeen | None = None,
        on_product: ProductSeen | None = None,
        on_comparison: ComparisonSeen | None = None,
        on_softmax: SoftmaxSeen | None = None,
    ) -> None:
        super().__init__()
        self._layers = layers
        self._on_layer = on_layer
        self._on_activation = on_activation
        self._on_error = on_error
        self._on_recurrence = on_recurrence
        self._on_input = on_input
        self._on_sequence = on_sequence
        self._on_product = on_product
        self._on_comparison = on_comparison
        self._on_softmax = on_softmax
        # what is running: its name, None for a network of others, and whether its input is detached
        self._stack: list[tuple[nn.Module, str | None, bool]] = []
        self._detached = Detached()
        self.input_is_detached = False  # of the layer that is reported
        self.has_dropped = False  # whether anything was dropped at random since it was opened
        self._handles: list[RemovableHandle] = []
        self._name_by_id: Mapping[int, str] = {}
        self._spread: set[str] = set()
        self.cut_shapes: dict[str, torch.Size | None] = {}
        self._cleanup = contextlib.ExitStack()
        self._entered = False
        self._is_open = False
        self._repeats = False

    def _apart(self, method: Callable[..., None], *args: Any) -> None:
        """What we do ourselves is no part of the forward pass: no mode is asked about it, ours or the user's."""
        try:
            with torch._C.DisableTorchFunction():
                method(*args)
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(error)

    @property
    def is_open(self) -> bool:
        """Whether it reports at present."""
        return self._is_open

    def open(self) -> None:
        """Starts to report; does nothing when it is open."""
        if self._is_open:
            return
        self._stack = []
        self._handles.append(register_module_forward_pre_hook(self._before_module))
        self._handles.append(register_module_forward_hook(self._after_module, always_call=True))
        self._name_by_id = self._layers.names_by_identity
        self._spread = set(self._layers.spread)
        for name in self._spread:  # last of the module's own hooks, behind the one that makes its output whole
            self._handles.append(self._layers.module(name).register_forward_hook(self._after_spread_layer))
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, and the import alone takes seconds
            self._cleanup.enter_context(torch.compiler.set_stance("force_eager"))
            _silence_the_compiler()
        if not self._entered:
            self.__enter__()  # type: ignore[no-untyped-call]
            self._entered = True
        self._is_open = True
        self._repeats = self.has_dropped = False

    def follow_backward(self) -> None:
        """A backward pass starts: what it repeats of the forward pass is reported as well."""
        self._repeats = True

    def close(self) -> None:
        """Stops to report and leaves nothing behind; may be called at any time and any number of times."""
        self._is_open = False
        self._detached.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._cleanup.close()
        # a mode of the user's that was entered after ours has to leave first: until then ours passes everything on
        if self._entered and _get_current_function_mode_stack()[-1:] == [self]:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._entered = False

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func`, and reports it if it is an activation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_open:
            # it is asked about every operation: most make a tensor with a graph, and are no activation
            if not self._repeats and not (type(result) is Tensor and result.requires_grad):
                self._apart(self._detached.note, result, (*args, *kwargs.values()))
            if not self._repeats and self._on_product is not None and func in PRODUCTS:
                self._apart(self._on_product, args)
            if not self._repeats and self._on_comparison is not None and (func in COMPARING or func in SCORING):
                self._apart(self._on_comparison, func, result, args, kwargs)
            if not self._repeats and self._on_softmax is not None and func in CHOOSING:
                self._apart(self._after_softmax, func, args, kwargs)
            op = ACTIVATIONS.get(func)
            if op is not None:
                self._apart(self._after_activation, op, result, args, kwargs)
            elif func in LIMITS:
                self._apart(self._after_limit, func, result, args, kwargs)
            elif func in DROPOUTS:
                self._apart(self._after_dropout, func, args, kwargs)
                if func is F.multi_head_attention_forward:
                    self._apart(self._after_attention, args)
        return result

    def _after_limit(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        op = rectifier(func, result, args, kwargs)
        if op is not None:
            self._after_activation(op, result, (), {})

    def _after_dropout(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.has_dropped |= drops(func, args, kwargs)

    def _after_attention(self, args: tuple[Any, ...]) -> None:
        module, name = self._stack[-1][:2] if self._stack else (None, None)
        if isinstance(module, nn.MultiheadAttention):  # it hands them on in one order, however it was called
            self._report_sequence(name, module, args)

    def _after_softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._stack[-1][1] if self._stack else ROOT
        source = first_tensor((*args, *kwargs.values()))
        if name is not None and source is not None and self._on_softmax is not None:
            self._on_softmax(name if self._layers.is_layer(name) else None, func, args, kwargs)

    def _after_activation(self, op: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._stack[-1][1] if self._stack else ROOT
        if name is not None and isinstance(result, Tensor) and is_measurable(result):
            arguments = dict(zip(_ARGUMENTS.get(op, ()), args[1:], strict=False)) | kwargs
            if op == "hardtanh" and (arguments.get("min_val"), arguments.get("max_val")) == (0, 6):
                op = "relu6"  # torch's own ReLU6 module is a hardtanh from 0 to 6
            self._on_activation(name, op, result, arguments)

    def _before_module(self, module: nn.Module, args: Any) -> None:
        name = self._name_by_id.get(id(module))
        if name is None or self._repeats or self._detached:
            self._apart(self._enter_module, module, name, args)
        else:  # thousands of times, and nothing to look at
            self._stack.append((module, name, False))

    def _enter_module(self, module: nn.Module, name: str | None, args: Any) -> None:
        # a mode is off inside of a call that it was asked about, and `backward` is such a call; what is entered
        # in a node of the backward pass is left with the node
        if self._repeats and self._entered and self not in _get_current_function_mode_stack():
            self.__enter__()  # type: ignore[no-untyped-call]
        if name is not None or self._is_foreign(module):
            self._stack.append((module, name, self._detached.holds(args)))

    def _is_foreign(self, module: nn.Module) -> bool:
        """Whether it has weights, and not ours: so not a wrapper of the model, nor an `nn.ReLU()` made on the spot."""
        parameter = next(module.parameters(), None)
        return parameter is not None and self._layers.owner(parameter) is None

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self.input_is_detached = False
        if self._stack and self._stack[-1][0] is module:
            *_, self.input_is_detached = self._stack.pop()
        name = self._name_by_id.get(id(module))
        if name is not None:
            self._apart(self._leave_module, name, module, args, output)

    def _leave_module(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        layer = self._layers.that_runs(name)
        if layer is None:
            return
        self.has_dropped |= drops_inside(module)
        if self._on_input is not None and layer == name:
            self._on_input(module, args)
        if isinstance(module, nn.RNNBase):
            self._report_sequence(name, module, args)
        if name not in self._spread:
            self._report_layer(layer, output)
            # its steps are no calls of anything: they are looked for at what goes in
            if self._on_recurrence is not None and isinstance(module, nn.RNNBase):
                self._on_recurrence(name, module, args, output)
        else:
            whole = first_tensor(output)
            part = local(whole) if whole is not None and is_cut(whole) else None
            self.cut_shapes[name] = part.shape if part is not None else None

    def _after_spread_layer(self, module: nn.Module, _args: Any, output: Any) -> None:
        self._apart(self._report_layer, self._layers.name_of(module), output)

    def _report_sequence(self, name: str | None, module: nn.RNNBase | nn.MultiheadAttention, args: Any) -> None:
        if self._on_sequence is not None and args and name is not None and self._layers.is_layer(name):
            self._on_sequence(name, module, args[0])

    def _report_layer(self, name: str | None, output: Any) -> None:
        tensor = first_tensor(output) if name is not None and self._layers.is_layer(name) else None
        if name is not None and tensor is not None:
            self._on_layer(name, tensor)


def is_measurable(tensor: Tensor) -> bool:
    """Whether it is a dense tensor of real numbers; those inside of `torch.func.vmap` can't be taken outside."""
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    return is_dense and tensor.is_floating_point() and not is_transformed(tensor)


def _silence_the_compiler() -> None:
    """Ignores the warning of a compiled module about global hooks: it is called eagerly, and they mean no harm.

    The filter is set once and stays: each change of the filters would show the user's own warnings once more.
    """
    known = (getattr(entry[1], "pattern", None) for entry in warnings.filters)
    if _ABOUT_HOOKS not in known:
        warnings.filterwarnings("ignore", message=_ABOUT_HOOKS, category=UserWarning)


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output: the sequence of a recurrence, the hidden state of a block.

    Example:
        >>> first_tensor({"index": torch.tensor(1), "hidden": (torch.ones(2), None)})
        tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output if is_measurable(output) else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    for item in output:
        found = first_tensor(item)
        if found is not None:
            return found
    return None
