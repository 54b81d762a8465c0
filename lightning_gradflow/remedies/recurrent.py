"""Recurrences drawn anew, so that the gradient comes through time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.activations import BOUNDED, RECTIFIERS, SIGMOIDS
from lightning_gradflow.remedies.loops import GATES
from lightning_gradflow.remedies.textbook import assign, gain_between, initialise, is_writable
from lightning_gradflow.remedies.through_time import Looped

GATED = (nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell)


@torch.no_grad()
def reinitialise_recurrence(
    module: nn.Module,
    generator: torch.Generator,
    steps: int | None = None,
    *,
    gain: float = 1.0,
    input_gain: float = 1.0,
) -> list[nn.Parameter]:
    r"""Draws one of torch's recurrences anew, so that its state and its gradient last for about `steps` time steps.

    - W_hh: orthogonal, each gate by itself, each layer and direction. For a ReLU a random permutation: an orthogonal
      matrix that maps what is not negative to what is not negative, as the identity does, so that no unit is cut off by
      the step itself. The identity (Le et al. 2015) sums the inputs up, in whatever order they come; a permutation
      tells one time step from another.
    - W_ih and the projection of an LSTM: Glorot, each gate by itself.
    - Biases: 0, but for the gates that keep the state. With u uniform in [e, max(e, T - 1)], one for each unit, the
      forget gate of an LSTM gets ln u and its input gate -ln u, the update gate of a GRU ln u: a state that lasts u
      steps, since sigmoid(ln u) = 1 - 1 / (u + 1). Units of all memories from 3 to T steps stand side by side. Where T
      is not known it is 1 for the gate that keeps, and 0 for the input gate. All of it stands in `bias_ih`; `bias_hh`,
      which is added to it, is 0.

    The gain of 1 is where a gradient neither dies nor grows as long as the units are in their linear part. A tanh takes
    something off it, but no more than a power of T.

    Args:
        module: an RNN (tanh or ReLU), LSTM, GRU, or one of their cells; anything else is left as it is.
        generator: on the CPU; the same seed gives the same weights on every rank and device.
        steps: time steps T of the sequences, in [1, inf), or None where that is not known. Below 4 it makes no
            difference.
        gain: of W_hh, in (0, inf), where units are plain and bounded (tanh); 1 anywhere else.
        input_gain: of W_ih, in (0, inf), at the same units.

    Returns:
        The parameters that were drawn anew; frozen, parametrized and unborn ones are left as they are.

    References:
        Saxe et al. 2014; Henaff et al. 2016, Recurrent orthogonal networks and long-memory tasks; Le et al. 2015, A
        simple way to initialize recurrent networks of rectified linear units; Jozefowicz et al. 2015 (the 1); Tallec
        and Ollivier 2018, Can recurrent neural networks warp time? (the logarithm).

    Example:
        >>> lstm = nn.LSTM(3, 4)
        >>> changed = reinitialise_recurrence(lstm, torch.Generator().manual_seed(0), steps=100)
        >>> len(changed), bool((lstm.bias_ih_l0[4:8] >= 1).all()), bool(lstm.bias_hh_l0.any())
        (4, True, False)
    """
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return []
    changed = []
    for key in [key for key, _ in module.named_parameters(recurse=False)]:
        parameter = getattr(module, key)
        if not is_writable(parameter):
            continue
        if key.startswith("bias_"):
            twin = getattr(module, key.replace("_hh", "_ih"))
            is_theirs = key.startswith("bias_ih") or not is_writable(twin)
            fresh = _gate_bias(module, generator, steps) if is_theirs else torch.zeros(parameter.shape)
        else:
            fresh = torch.empty(parameter.shape)
            for block in fresh.split(module.hidden_size):
                _fill_block(block, key, is_relu(module), generator)
            if isinstance(module, (nn.RNN, nn.RNNCell)) and not is_relu(module):
                fresh *= gain if key.startswith("weight_hh") else input_gain
        assign(parameter, fresh)
        changed.append(parameter)
    return changed


def is_relu(module: nn.Module) -> bool:
    """Whether it is a plain recurrence with ReLU units.

    Example:
        >>> is_relu(nn.RNNCell(1, 1, nonlinearity="relu")), is_relu(nn.LSTM(1, 1))
        (True, False)
    """
    return isinstance(module, (nn.RNN, nn.RNNCell)) and module.nonlinearity == "relu"


@torch.no_grad()
def reinitialise_loop(
    again: Looped,
    ways_in: Sequence[Looped],
    op: str,
    generator: torch.Generator,
    columns: Tensor | None = None,
    *,
    gain: float = 1.0,
    input_gain: float = 1.0,
) -> list[nn.Parameter]:
    r"""Draws a recurrence anew that is written by hand: a layer that gets its own output back, through `op`.

    The weights of the state are orthogonal, before a ReLU and its kin a permutation, before a sigmoid 4 times
    orthogonal with the bias `-W.sum(1) / 2`: `sigmoid(x) = (1 + tanh(x / 2)) / 2`, so that such a loop is one of tanh
    units that starts at -1. The weights of the input are Glorot, twice as large before a sigmoid. All other biases are
    0.

    Where several gates are computed together, the weights of each are orthogonal, and all biases stay: they say how far
    gates stand open.

    Of a convolution it is the tap in the middle that hands the state on so, and the others are 0: what is kept stays
    where it is, and the kernel learns to move it.

    Args:
        again: the linear layer or convolution that gets the state.
        ways_in: layers whose output is added to its own.
        op: the activation that follows: `tanh`, `relu`, `sigmoid`, ... or "" for none.
        generator: on the CPU.
        columns: (inputs,) which of its inputs, or channels, are the state, by default all; as many as it has outputs.
        gain: of the weights of the state, in (0, inf), before a bounded activation; 1 before any other.
        input_gain: of the weights of the input, in (0, inf), in the same place.

    Returns:
        The parameters that were drawn anew; nothing where the output is not of the size of the state, or three or four
        times as large, as with groups of channels, or where the weight is frozen or parametrized.

    References:
        Saxe et al. 2014; Le et al. 2015, A simple way to initialize recurrent networks of rectified linear units; Xiao
        et al. 2018, Dynamical isometry and a mean field theory of CNNs (the tap in the middle).

    Example:
        >>> again = nn.Linear(4, 4)
        >>> changed = reinitialise_loop(again, [nn.Linear(2, 4)], "tanh", torch.Generator().manual_seed(0))
        >>> torch.allclose(again.weight.T @ again.weight, torch.eye(4), atol=1e-5), len(changed)
        (True, 4)
    """
    size, inputs = again.weight.shape[:2]
    columns = torch.ones(inputs, dtype=torch.bool) if columns is None else columns
    states = int(columns.sum())
    is_stack = any(size == count * states for count in GATES)
    if not (size == states or is_stack) or getattr(again, "groups", 1) > 1 or not is_writable(again.weight):
        return []
    square = torch.empty(size, states)
    for block in square.split(states):
        _fill_block(block, "weight_hh", op in RECTIFIERS, generator)
    if op in BOUNDED:
        square *= gain * gain_between(op, op)
    fresh = torch.empty(again.weight.shape)
    inlet = input_gain * gain_between("", op) if op in BOUNDED else 1.0  # the state adds what a rectifier takes
    nn.init.xavier_normal_(fresh, gain=inlet, generator=generator)
    fresh[:, columns] = 0
    middle: tuple[Any, ...] = (slice(None), columns, *[(taps - 1) // 2 for taps in fresh.shape[2:]])
    fresh[middle] = square
    assign(again.weight, fresh)
    changed = [again.weight]
    for layer in ways_in:
        bias = layer.bias.detach().clone() if is_stack and layer.bias is not None else None
        changed += initialise(layer, "glorot", generator, gain=inlet)
        if bias is not None and is_writable(layer.bias):
            assign(layer.bias, bias)
    centre = -0.5 * square.sum(dim=1) if op in SIGMOIDS else torch.zeros(len(square))
    for layer in (again, *ways_in):
        if is_writable(layer.bias) and not is_stack:
            assign(layer.bias, centre)
            centre = torch.zeros(len(square))
            changed += [] if any(layer.bias is one for one in changed) else [layer.bias]
    return changed


def _fill_block(block: Tensor, key: str, relu: bool, generator: torch.Generator) -> None:
    """Draws the (units, inputs) weights of one gate."""
    if not key.startswith("weight_hh"):
        nn.init.xavier_normal_(block, generator=generator)
    elif relu:
        block.copy_(torch.eye(len(block))[torch.randperm(len(block), generator=generator)])
    else:
        nn.init.orthogonal_(block, generator=generator)


def _gate_bias(module: nn.RNNBase | nn.RNNCellBase, generator: torch.Generator, steps: int | None) -> Tensor:
    """The biases of all gates: 0, but for those that say how long the state is kept."""
    size = module.hidden_size
    is_lstm = isinstance(module, (nn.LSTM, nn.LSTMCell))
    if not isinstance(module, GATED):
        return torch.zeros(size)
    fresh = torch.zeros(4 if is_lstm else 3, size)
    if steps is None:
        fresh[1] = 1.0
    else:
        fresh[1] = torch.empty(size).uniform_(math.e, max(math.e, steps - 1.0), generator=generator).log()
        if is_lstm:
            fresh[0] = -fresh[1]
    return fresh.flatten()
