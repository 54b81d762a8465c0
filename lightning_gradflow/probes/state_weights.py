"""The weights of a layer that map its state to the next one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import is_of_torch
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.transfer import wide_dtype

_MIN_TURNS = 8  # what is called fewer times is rather a shared layer than a recurrence
_CANDIDATE = {nn.LSTM: 2, nn.LSTMCell: 2, nn.GRU: 2, nn.GRUCell: 2}  # the block of W_hh that makes the new content
_GATES = {nn.LSTM: 3, nn.LSTMCell: 3, nn.GRU: 2, nn.GRUCell: 2}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def gates_of(recurrence: nn.Module) -> int:
    """How many gates a recurrence of torch's has.

    Example:
        >>> gates_of(nn.RNN(1, 1)), gates_of(nn.GRU(1, 1)), gates_of(nn.LSTMCell(1, 1))
        (0, 2, 3)
    """
    return next((number for kind, number in _GATES.items() if isinstance(recurrence, kind)), 0)


def state_weights(module: nn.Module, turns: int) -> Iterator[tuple[str, Tensor]]:
    """Square matrices that a state is multiplied with once a time step, by the name of their parameter.

    - Of torch's recurrences the hidden-to-hidden weights; of LSTM and GRU the block that makes the new content. Nothing
      where the state is projected.
    - Of a linear layer that is called eight times or more in a forward pass its weight, if it is square; of one that
      gets inputs and a state together the last columns; of one that makes three or four gates of both, each of them.
    - Of such a convolution, with as many channels out as in, the sum of its weights over the taps: what it does to a
      state that is the same everywhere.
    - Of a module of the user's own, which applies an activation that often for each of them, its square matrices; where
      there are none, those that stack three or four of them for the gates of a cell.

    Args:
        module: a layer.
        turns: how often it was called in the forward pass, or applied one and the same activation.

    Example:
        >>> [tuple(w.shape) for turns in (1, 20) for _, w in state_weights(nn.Conv2d(4, 4, 3), turns)]
        [(4, 4)]
    """
    there = {k: p for k, p in module.named_parameters(recurse=False) if not isinstance(p, nn.UninitializedParameter)}
    own = {k: p.detach() for k, p in there.items() if p.is_floating_point() and not p.is_meta and not is_sharded(p)}
    own = {k: p for k, p in own.items() if p.ndim >= 2 and p.numel() > 0}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        block = next((number for kind, number in _CANDIDATE.items() if isinstance(module, kind)), 0)
        size = module.hidden_size
        found = {key: p[block * size : (block + 1) * size] for key, p in own.items() if key.startswith("weight_hh")}
    elif turns < _MIN_TURNS:
        found = {}
    elif isinstance(module, nn.Linear):
        found = {_name(key, i): p for key, w in own.items() if w.ndim == 2 for i, p in enumerate(_state_blocks(w))}
    elif isinstance(module, _CONVOLUTIONS):
        found = {key: p.flatten(2).sum(dim=2) for key, p in own.items() if module.groups == 1}
    elif not is_of_torch(module):
        stacks = {key: stack for key, p in own.items() if p.ndim == 2 and (stack := squares(p))}
        if any(len(stack) == 1 for stack in stacks.values()):
            stacks = {key: stack for key, stack in stacks.items() if len(stack) == 1}
        found = {_name(key, i): p for key, stack in stacks.items() for i, p in enumerate(stack)}
        found = found if turns >= _MIN_TURNS * len(stacks) else {}
    else:
        found = {}
    for key, weight in found.items():
        if weight.shape[0] == weight.shape[1] > 1:
            yield key, weight


def _name(key: str, index: int) -> str:
    return f"{key}[{index}]" if index else key


def _state_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """What maps a state, in a layer that maps inputs as well, and may make several gates.

    Three gates whose size four divides as well are taken for four. What makes several and maps nothing but a state
    looks as a layer does through which a few inputs come in, and is left out.
    """
    outputs, inputs = weight.shape
    gates = 1 if inputs >= outputs else next((count for count in (4, 3) if outputs % count == 0), 0)
    size = outputs // gates if gates else 0
    is_joint = size < inputs or gates == 1
    return weight[:, -size:].split(size) if size > 0 and is_joint else ()


def squares(weight: Tensor) -> tuple[Tensor, ...]:
    """The square matrices that one consists of: itself, or three or four side by side, as for the gates of a cell.

    Example:
        >>> [len(squares(torch.ones(*shape))) for shape in ((2, 2), (2, 8), (6, 2), (2, 4))]
        [1, 4, 3, 0]
    """
    side, longer = sorted(weight.shape)
    is_stack = side > 0 and longer in (side, 3 * side, 4 * side)
    return weight.split(side, dim=int(weight.shape[1] > side)) if is_stack else ()


def stack_gain(module: nn.RNNBase) -> Tensor | None:
    """() gradient norm of the biases of a stack's first layer over that of its last; None where there is no such thing.

    A bias gets what comes to its layer, over all time. The gradient of a weight is as small as what went into it, too.

    Args:
        module: an RNN, LSTM or GRU, after the backward pass.

    Example:
        >>> rnn = nn.RNN(1, 1, num_layers=3)
        >>> for weight in rnn.parameters():
        ...     _ = nn.init.constant_(weight, 0.1) if weight.ndim > 1 else nn.init.zeros_(weight)
        >>> rnn(torch.zeros(1, 1, 1))[0].sum().backward()
        >>> round(float(stack_gain(rnn)), 6)
        0.01
    """
    both: list[list[Tensor]] = [[], []]
    for found, layer in zip(both, (0, module.num_layers - 1), strict=True):
        for key in (f"bias_ih_l{layer}", f"bias_ih_l{layer}_reverse"):
            bias = getattr(module, key, None)
            if isinstance(bias, nn.Parameter) and bias.grad is not None and not is_sharded(bias):
                found.append(bias.grad)
    if module.num_layers < 2 or not all(both):
        return None
    wide = wide_dtype(both[0][0].device)
    first, last = (torch.stack(torch._foreach_norm(found, 2, dtype=wide)).norm() for found in both)
    return torch.div(first, last)
