"""The layers of a stacked recurrence, set so that each hands on as much as the one below it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradflow.probes.transfer import wide_dtype
from lightning_gradflow.remedies.recurrent import is_relu
from lightning_gradflow.remedies.textbook import is_writable

_ROUNDS = 6  # gates and bounds answer less than in proportion; without them one is enough
_SETTLED = 0.1  # of the size
_MAX_FACTOR = 8.0  # in one round
_CANDIDATE = 2  # the block of the weights of an LSTM or GRU that makes the new content


@torch.no_grad()
def level(
    module: nn.RNNBase, sequence: Tensor | PackedSequence, averaged: Callable[[Tensor], Tensor] = lambda x: x
) -> bool:
    r"""Scales the weights between the layers of a stack, so that the output of each is as large as that of the first.

    A layer of ReLU units adds up what comes at each of T time steps, and one whose gates keep it for long takes little
    of it up: over eight layers their outputs grow, or shrink, by as many decades as the gradient does that comes back.
    What the layer above makes of them is in proportion to the weights that take them in, where units are linear; of
    LSTM and GRU those of the new content, and not of the gates. Tanh units set their size themselves.

    Args:
        module: an RNN, LSTM or GRU; the first layer is left as it is, and so are frozen weights.
        sequence: what goes into it, on a batch of the run.
        averaged: the mean over the ranks of what is measured.

    Returns:
        Whether there was something to scale.

    References:
        Mishkin and Matas 2016, All you need is a good init.

    Example:
        >>> rnn, x = nn.RNN(3, 16, 4, nonlinearity="relu"), torch.ones(20, 8, 3)
        >>> for weight in rnn.parameters():
        ...     _ = nn.init.constant_(weight, 0.05) if weight.ndim > 1 else nn.init.zeros_(weight)
        >>> before = rnn(x)[0].detach().square().mean().sqrt()
        >>> scaled = level(rnn, x)
        >>> f"{before:.1f} {rnn(x)[0].detach().square().mean().sqrt():.1f}"
        '18.5 0.6'
    """
    is_tanh = isinstance(module, nn.RNN) and not is_relu(module)
    if is_tanh or module.num_layers < 2:
        return False
    sequence = sequence.to(module.get_parameter("weight_ih_l0").dtype)  # autocast made it another
    wanted = _size(module, 1, sequence, averaged)
    for layer in range(1, module.num_layers):
        keys = [f"weight_ih_l{layer}{end}" for end in ("", "_reverse") if hasattr(module, f"weight_ih_l{layer}{end}")]
        weights = [weight for key in keys if is_writable(weight := getattr(module, key))]
        for _ in range(_ROUNDS):
            size = _size(module, layer + 1, sequence, averaged)
            if not (math.isfinite(size) and math.isfinite(wanted) and size > 0 and wanted > 0):
                return False
            for weight in weights:
                rows = weight if isinstance(module, nn.RNN) else weight.split(module.hidden_size)[_CANDIDATE]
                rows.mul_(min(max(wanted / size, 1 / _MAX_FACTOR), _MAX_FACTOR))
            if abs(wanted / size - 1) < _SETTLED:
                break
    return True


def _size(
    module: nn.RNNBase, layers: int, sequence: Tensor | PackedSequence, averaged: Callable[[Tensor], Tensor]
) -> float:
    """Root mean square of the output of the lowest layers."""
    twin: nn.RNNBase = object.__new__(type(module))
    weights = module._flat_weights[: len(module._flat_weights) // module.num_layers * layers]
    twin.__dict__.update(module.__dict__, dropout=0.0, num_layers=layers, _flat_weights=weights)
    with torch.backends.cudnn.flags(enabled=False):  # which wants all weights in one piece
        output = twin.forward(sequence)[0]
    values = output.data if isinstance(output, PackedSequence) else output
    square = torch.linalg.vector_norm(values, dtype=wide_dtype(values.device)).square() / values.numel()
    return math.sqrt(float(averaged(square)))
