"""How much of the gradient comes through a recurrence, and which layers of a loop make the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_gradflow.detectors.time_profile import TimeProfile, time_profile
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.probes.observer import first_tensor
from lightning_gradflow.probes.recurrence import by_distance_to_the_end, joined
from lightning_gradflow.probes.transfer import wide_dtype

_MAX_COLUMNS = 4096  # of an input that is looked through column by column
_MAX_NODES = 100_000  # of the graph between two calls

Looped = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What may be called once a time step in a loop that is written by hand."""


def unit_axis(layer: Looped) -> int:
    """The axis of its inputs and outputs that counts the units.

    Example:
        >>> unit_axis(nn.Linear(1, 1)), unit_axis(nn.Conv2d(1, 1, 3))
        (-1, -3)
    """
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


@dataclass
class _Calls:
    """What went into a module and came out of it, call by call."""

    module: nn.Module
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class TimeWatch:
    """Watches one forward pass of a rehearsal: what the named recurrences do with a gradient, and who feeds whom.

    A random gradient is sent into the last state of each recurrence, and read off at its input (of torch's own) or at
    its output (of a layer in a loop) time step by time step. Against the gradient of the loss this leaves out
    ways around the recurrence, such as a loss at each step: it shows what the weights do, and nothing else.

    Args:
        model: the module that is rehearsed; its inputs are made to require a gradient while this watches.
        names: the layers to look at, as in `named_modules()`; what is not there or not a recurrence, linear layer or
            convolution is left out.
        run: one forward pass of it.
        seed: of the random gradient, which is drawn on the CPU; the same seed gives comparable numbers.

    Example:
        >>> rnn = nn.RNN(2, 4, bias=False)
        >>> rnn.weight_hh_l0.data = 0.1 * torch.eye(4)
        >>> watch = TimeWatch(nn.ModuleDict({"rnn": rnn}), ["rnn"], lambda: rnn(torch.zeros(20, 3, 2)))
        >>> round(watch.profile("rnn").span, 3)
        -19.0
    """

    def __init__(self, model: nn.Module, names: Iterable[str], run: Callable[[], None], seed: int = 0) -> None:
        modules = dict(model.named_modules())
        kinds = (nn.RNNBase, nn.RNNCellBase, Looped)
        self._calls = {name: _Calls(modules[name]) for name in names if isinstance(modules.get(name), kinds)}
        self._seed = seed
        with ExitStack() as hooks:
            for calls in self._calls.values():
                handles = (
                    calls.module.register_forward_pre_hook(lambda _, args, calls=calls: _before(calls, args)),
                    calls.module.register_forward_hook(lambda _, args, out, calls=calls: _after(calls, args, out)),
                )
                for handle in handles:
                    hooks.callback(handle.remove)
            with torch.enable_grad():
                run()

    def profile(self, name: str) -> TimeProfile | None:
        """The gradient along time; None where the layer ran less than eight steps, or no gradient comes through.

        Args:
            name: one of the layers.
        """
        norms = self._norms(name)
        if norms is None:
            return None
        history, point = History(), Point(name, name)
        history.add_points([point])
        history.append(Row(0, calls={name: norms.cpu().double().numpy()}))
        return time_profile(history, point)

    def calls(self, name: str) -> int:
        """How often a layer was called.

        Args:
            name: one of the layers.
        """
        return len(self._calls[name].outputs) if name in self._calls else 0

    def sequence(self, name: str) -> Tensor | PackedSequence | None:
        """What went into one of torch's recurrences at its first call, without a graph.

        Args:
            name: one of the layers.
        """
        calls = self._calls.get(name)
        if calls is None or not calls.inputs or not isinstance(calls.module, nn.RNNBase):
            return None
        first = calls.inputs[0]
        return first._replace(data=first.data.detach()) if isinstance(first, PackedSequence) else first.detach()

    def _norms(self, name: str) -> Tensor | None:
        calls = self._calls.get(name)
        if calls is None or not calls.outputs:
            return None
        is_fused = isinstance(calls.module, nn.RNNBase)
        sources = calls.outputs if isinstance(calls.module, Looped) else [_values(x) for x in calls.inputs]
        ends = [_state(calls.module, output) for output in calls.outputs]
        is_loop = not is_fused or all(_length(calls.module, x) == 1 for x in calls.inputs)
        generator = torch.Generator().manual_seed(self._seed)
        root = torch.zeros(())
        for end in ends[-1 if is_loop else 0 :]:
            root = root + (end * torch.randn(end.shape, generator=generator).to(end)).sum()
        if not root.requires_grad:
            return None
        found: Sequence[Tensor | None] = torch.autograd.grad(root, sources, retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(sources, found, strict=True)]
        if not is_fused:
            return torch.stack([g.norm(dtype=wide_dtype(g.device)) for g in gradients])
        series = [_by_step(calls.module, x, g) for x, g in zip(calls.inputs, gradients, strict=True)]
        sums, _ = joined(series)
        return sums.sqrt()

    def state_columns(self, name: str) -> Tensor | None:
        """(inputs,) which inputs of a layer in a loop get its own state back; None where it gets none.

        What goes into its second call is followed back: an input counts if it came out of the first; of a convolution
        an input is a channel.

        Args:
            name: one of the layers.
        """
        calls = self._calls.get(name)
        if calls is None or not isinstance(calls.module, Looped) or not self.returns(name):
            return None
        now, before = calls.inputs[1], calls.outputs[0]
        axis = unit_axis(calls.module)
        width = now.shape[axis]
        if width == len(calls.module.weight) or width > _MAX_COLUMNS:
            return torch.ones(width, dtype=torch.bool)
        sums = now.movedim(axis, -1).reshape(-1, width).sum(dim=0)
        found = [torch.autograd.grad(sums[i], before, retain_graph=True, allow_unused=True)[0] for i in range(width)]
        return torch.tensor([g is not None and bool(g.any()) for g in found])

    def returns(self, name: str) -> bool:
        """Whether what a layer gives at a time step comes back to it at the next; what only reads a state gets none.

        Args:
            name: one of the layers.
        """
        calls = self._calls.get(name)
        if calls is None or min(len(calls.inputs), len(calls.outputs)) < 2 or not isinstance(calls.module, Looped):
            return False
        return comes_from(calls.inputs[1], calls.outputs[0])

    def feeds(self, name: str, other: str) -> bool:
        """Whether what a layer gives at a time step goes into another one at the next, but not into itself.

        Args:
            name: of a layer that may be the way in.
            other: of a recurrent layer.
        """
        one, two = self._calls.get(name), self._calls.get(other)
        if one is None or two is None or min(len(one.outputs), len(two.outputs)) < 2:
            return False
        return not self.returns(name) and comes_from(two.inputs[1], one.outputs[0])


def comes_from(tensor: Tensor, source: Tensor) -> bool:
    """Whether a tensor was computed from another one, by the graph of autograd.

    Example:
        >>> x = torch.ones(2, requires_grad=True) * 2
        >>> comes_from((x + 1).exp(), x), comes_from(x, x.exp())
        (True, False)
    """
    wanted, waiting = source.grad_fn, [tensor.grad_fn]
    seen: set[Any] = set()
    while waiting and len(seen) < _MAX_NODES:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node is wanted:
            return True
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return False


def _before(calls: _Calls, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args:
        return None
    if isinstance(calls.module, Looped):
        calls.inputs.append(args[0])
        return None
    # raw data has no gradient; what has one may come from the state, and stays as it is
    x = args[0]
    values = _values(x)
    if not values.requires_grad:
        values = values.detach().requires_grad_()
        x = x._replace(data=values) if isinstance(x, PackedSequence) else values
    calls.inputs.append(x)
    return (x, *args[1:])


def _after(calls: _Calls, args: tuple[Any, ...], output: Any) -> None:
    if args:
        calls.outputs.append(output)


def _values(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _state(module: nn.Module, output: Any) -> Tensor:
    """The state at the end: of the last layer, both directions."""
    if isinstance(module, nn.RNNBase):
        state = first_tensor(output[1])
        output = None if state is None else state[-2 if module.bidirectional else -1 :]
    tensor = first_tensor(output)
    assert tensor is not None
    return tensor


def _length(module: nn.Module, x: Tensor | PackedSequence) -> int:
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes)
    is_batch_first = bool(getattr(module, "batch_first", False))
    return int(x.shape[1 if is_batch_first and x.ndim == 3 else 0])


def _by_step(module: nn.Module, x: Tensor | PackedSequence, gradient: Tensor) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide_dtype(gradient.device))
    if isinstance(x, PackedSequence):
        norms, _ = pad_packed_sequence(PackedSequence(norms, x.batch_sizes))
    elif norms.ndim == 1:
        norms = norms[:, None]
    elif module.batch_first:
        norms = norms.T
    return by_distance_to_the_end(norms.square(), bool(module.bidirectional))
