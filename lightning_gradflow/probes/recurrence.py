"""The gradient along the time axis of `nn.RNN`, `nn.LSTM` and `nn.GRU`, whose steps no hook can see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.transfer import wide_dtype

FORWARDS = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
"""What torch's own recurrences do when they are called: a class that is derived from one may have its own."""

Series = tuple[Tensor, Tensor]
"""(T,) sums of squared gradients by time step, and (T,) how many sequences each is a sum over; the end last."""


class RecurrentCall:
    """One call of a recurrence in a forward pass, and the gradient that arrives at its input in the backward pass.

    Where the input has a gradient, it is read off a hook on it. It then holds what comes along other ways too, if the
    input goes anywhere else: a skip connection past the recurrence carries the signal as well.

    Raw data has no gradient. To ask for one would change the graph of the run, and with it the order of its sums. So
    the recurrence is run a second time after the backward pass, with dropout between its layers off, and the gradients
    that came to its outputs are sent back through that. Nothing of the run is touched but for hooks on the outputs.

    Args:
        module: the recurrence.
        inputs: its positional arguments: the sequence, and possibly the first state.
        output: what it returned.

    Example:
        >>> rnn, x = nn.RNN(3, 4), torch.ones(5, 2, 3)
        >>> output = rnn(x)
        >>> call = RecurrentCall(rnn, (x,), output)
        >>> handles = call.watch(lambda: True)
        >>> output[0][-1].sum().backward()
        >>> [row.shape for row in call.profile()]
        [torch.Size([5]), torch.Size([5])]
    """

    def __init__(self, module: nn.RNNBase, inputs: tuple[Any, ...], output: Any) -> None:
        self._module = module
        self._sequence: Tensor | PackedSequence = inputs[0]
        self._rest = inputs[1:]
        values = _values(self._sequence)
        self._is_raw = not values.requires_grad
        self._outputs = list(_tensors(output)) if self._is_raw else [values]
        self._gradients: dict[int, Tensor] = {}
        device = values.device.type
        self._precision = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def watch(self, is_counted: Callable[[], bool]) -> list[RemovableHandle]:
        """Waits for the backward pass.

        Args:
            is_counted: asked when a gradient comes; that of a gradient penalty inside of the forward pass is not.
        """

        def on_gradient(i: int, gradient: Tensor | None) -> None:
            if gradient is not None and is_counted():
                before = self._gradients.get(i)
                self._gradients[i] = gradient.detach() if before is None else before + gradient.detach()

        watched = [(i, tensor) for i, tensor in enumerate(self._outputs) if tensor.requires_grad]
        self._outputs = []  # hooks alone need not keep them
        return [tensor.register_hook(lambda gradient, i=i: on_gradient(i, gradient)) for i, tensor in watched]

    def profile(self) -> Series | None:
        """Sums of squared gradients by time step, and how many sequences each is a sum over. Forgets the gradients.

        Time is counted from the end of each sequence, which is where its last gradient is: padding behind it and
        different lengths do not blur the decay. In a bidirectional recurrence both ends are ends: time is the distance
        to the nearer of them, and half as long.

        Returns:
            (T,) sums and (T,) numbers of sequences, the end last; None where no gradient came.
        """
        gradients, self._gradients = self._gradients, {}
        if not gradients:
            return None
        gradient = self._through_a_second_run(gradients) if self._is_raw else gradients[0]
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide_dtype(gradient.device))
        if isinstance(self._sequence, PackedSequence):
            norms, _ = pad_packed_sequence(PackedSequence(norms, self._sequence.batch_sizes))
        elif norms.ndim == 1:
            norms = norms[:, None]
        elif self._module.batch_first:
            norms = norms.T
        return by_distance_to_the_end(norms.square(), self._module.bidirectional)

    def _through_a_second_run(self, gradients: dict[int, Tensor]) -> Tensor:
        twin: nn.RNNBase = object.__new__(type(self._module))
        twin.__dict__.update(self._module.__dict__, dropout=0.0)
        values = _values(self._sequence).detach().requires_grad_()
        sequence = self._sequence._replace(data=values) if isinstance(self._sequence, PackedSequence) else values
        state = [_detached(item) for item in self._rest]
        device, dtype, enabled = self._precision
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            outputs = list(_tensors(twin.forward(sequence, *state)))
        pairs = [(outputs[i], gradient) for i, gradient in gradients.items()]
        (found,) = torch.autograd.grad([o for o, _ in pairs], [values], [g for _, g in pairs])
        return found


def is_watchable(module: nn.Module, inputs: Sequence[Any], output: Any) -> bool:
    """Whether a call is one of torch's own recurrences and takes part in the backward pass.

    A sequence that is passed by keyword is not seen. Sharded weights are left out: a second run would need all ranks.
    So are weights with a parametrization, which may have a state that a second run moves on.
    """
    if not isinstance(module, nn.RNNBase) or type(module).forward not in FORWARDS or not inputs:
        return False
    if is_parametrized(module) or module._forward_pre_hooks:  # the older weight_norm and spectral_norm are such hooks
        return False
    sequence = inputs[0]
    if isinstance(sequence, PackedSequence):
        steps = len(sequence.batch_sizes)
    elif isinstance(sequence, Tensor):
        steps = sequence.shape[1 if module.batch_first and sequence.ndim == 3 else 0]
    else:
        return False
    is_plain = not any(is_sharded(tensor) for tensor in (_values(sequence), *module.parameters(recurse=False)))
    is_in_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(output))
    return steps > 0 and is_plain and is_in_graph


def joined(calls: Sequence[Series]) -> Series:
    """Several calls as one: single steps one behind the other, as in a loop; sequences summed, ends together.

    Example:
        >>> one, two = torch.ones(1), torch.ones(2)
        >>> joined([(one, one), (one, one), (one, one)])[0], joined([(two, two), (one, one)])[0]
        (tensor([1., 1., 1.]), tensor([1., 2.]))
    """
    if all(len(sums) == 1 for sums, _ in calls):
        sums, counts = (torch.cat(rows) for rows in zip(*calls, strict=True))
        return sums, counts
    length = max(len(sums) for sums, _ in calls)
    padded = [[torch.nn.functional.pad(row, (length - len(row), 0)) for row in call] for call in calls]
    sums, counts = (torch.stack(rows).sum(dim=0) for rows in zip(*padded, strict=True))
    return sums, counts


def by_distance_to_the_end(squares: Tensor, both_ends: bool) -> Series:
    """Sums over sequences that end at different times, and the number of entries in each sum.

    Args:
        squares: (T, B) squared gradients; a sequence ends with its last one that is not zero.
        both_ends: whether it begins with its first one too, and time is the distance to the nearer end.

    Returns:
        (T,) sums and (T,) numbers of entries, the end last; for both ends half as many, rounded up.

    Example:
        >>> by_distance_to_the_end(torch.tensor([[1.0, 4.0], [2.0, 8.0], [4.0, 0.0]]), both_ends=False)
        (tensor([ 1.,  6., 12.]), tensor([1., 2., 2.]))
    """
    steps = len(squares)
    there = squares != 0
    time = torch.arange(steps, device=squares.device)[:, None]
    # argmax finds the first of equals, without a copy to the host
    last = steps - 1 - there.flip(0).to(torch.uint8).argmax(dim=0)
    distance = last - time
    if both_ends:
        distance = torch.minimum(distance, time - there.to(torch.uint8).argmax(dim=0))
    counted = (distance >= 0) & there.any(dim=0)
    where = torch.where(counted, distance, steps).flatten()
    sums = squares.new_zeros(steps + 1).index_add_(0, where, squares.flatten())
    counts = squares.new_zeros(steps + 1).index_add_(0, where, counted.to(squares.dtype).flatten())
    length = (steps + 1) // 2 if both_ends else steps
    return sums[:length].flip(0), counts[:length].flip(0)


def _values(sequence: Tensor | PackedSequence) -> Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of `(sequence, state)`, where the state of an LSTM is a pair."""
    sequence, state = output
    return [_values(sequence), *(state if isinstance(state, tuple) else (state,))]


def _detached(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(_detached(item) for item in state)
    return state.detach() if isinstance(state, Tensor) else state
