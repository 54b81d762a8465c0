"""The scale of each feature of what goes into the network, and what it does to a recurrence."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.observer import first_tensor
from lightning_gradflow.probes.raw_columns import raw_columns
from lightning_gradflow.probes.shards import is_cut, is_sharded, local
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

MAX_FEATURES = 1024
"""An input of more features is not measured: such columns are pixels or samples of a sound, all of one unit."""

_SUMS, _COUNTS = "input", "input count"  # names of what is transferred begin with one of these
_ROWS = 1024  # of them all tell what a share is, to 1 %
_SIGMOID, _TANH = math.log(99.0), math.atanh(0.99)  # beyond, they are within 1 % of a bound
_LIMITS = {
    "RNN": [_TANH],
    "LSTM": [_SIGMOID, _SIGMOID, _TANH, _SIGMOID],
    "GRU": [_SIGMOID, _SIGMOID, _TANH],
}  # of the rows of `W_ih`, in the order in which torch stacks them
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # (B, channels, ...)


class InputScale:
    """Root mean square and standard deviation of each feature of what goes into a layer that takes inputs.

    Taken from the layer's first positional floating-point tensor; behind a frozen embedding, whose rows are data, from
    that of the layer behind it. The features are its last dimension; of what goes
    into a convolution, or into a normalisation of channels, the channels. Columns that other layers have made, such as
    embeddings beside raw numbers, are not measured. Neither are whole numbers (tokens), keyword arguments, single
    vectors, more than `MAX_FEATURES` features and an input that is cut up over ranks.

    Example:
        >>> scale, transfer = InputScale(), Transfer()
        >>> _ = scale.take(nn.Linear(2, 1), (torch.tensor([[3.0, 1000.0], [4.0, 1000.0]]),))
        >>> scale.pack(transfer)
        >>> rms, deviation = InputScale.unpack(transfer.fetch())
        >>> (rms**2).round(6).tolist(), deviation.round(6).tolist()
        ([12.5, 1000000.0], [0.5, 0.0])
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2, F) squares and values, summed over the batches so far
        self._counts: Floats = np.zeros(0)  # (F,)

    def take(self, module: nn.Module, arguments: tuple[Any, ...], *, is_first: bool = True) -> bool:
        """Adds the input of one batch, if it is one.

        Args:
            module: the layer that it went into.
            arguments: the positional arguments of the call.
            is_first: whether no layer has run before, so that whatever comes is an input.

        Returns:
            Whether it was.
        """
        tensor = first_tensor(arguments)
        values = local(tensor.detach()) if tensor is not None and not is_cut(tensor) else None
        if tensor is None or values is None or values.dim() < 2 or not values.numel():
            return False
        at = _feature_dim(module, values)
        features = values.shape[at]
        if features > MAX_FEATURES:
            return False
        is_raw = raw_columns(tensor, at)
        if is_raw is None or not is_raw.any():
            if not is_first:
                return False
            is_raw = np.ones(features, dtype=bool)
        others = [dim for dim in range(values.dim()) if dim != at]
        # six times as fast on a CPU as the norm over these dimensions
        wide = values.to(wide_dtype(values.device), copy=True)
        total = wide.sum(others)
        sums = torch.stack([wide.square_().sum(others), total])
        counts = np.where(is_raw, values.numel() / features, 0.0)
        if not is_raw.all():
            sums.masked_fill_(torch.from_numpy(~is_raw).to(sums.device, non_blocking=True), 0.0)
        if self._sums is not None:
            longest = max(features, len(self._counts))
            sums = _padded(sums, longest) + _padded(self._sums, longest)
            counts = np.pad(counts, (0, longest - features)) + np.pad(self._counts, (0, longest - len(self._counts)))
        self._sums, self._counts = sums, counts
        return True

    def pack(self, transfer: Transfer, name: str = "") -> None:
        """Hands what was seen to the transfer, under a name: that of the layer, where several take inputs."""
        if self._sums is None:
            return
        features = len(self._counts)
        # ranks agree on lengths: few lengths are few agreements
        length = features if transfer.is_alone else 1 << (features - 1).bit_length()
        transfer.share((_SUMS, name, length), _padded(self._sums, length).flatten())
        transfer.share_numbers((_COUNTS, name, length), [*self._counts.tolist(), *[0.0] * (length - features)])

    @staticmethod
    def names(host: Mapping[Hashable, Floats]) -> list[str]:
        """Under which names something was fetched."""
        return sorted({key[1] for key in host if isinstance(key, tuple) and key[0] == _SUMS})

    @staticmethod
    def unpack(host: Mapping[Hashable, Floats], name: str = "") -> tuple[Floats, Floats]:
        """(F,) root mean square and (F,) standard deviation out of what was fetched; empty where nothing was measured.

        Columns at the end that were not measured are left out, others are NaN.

        A deviation below 1e-8 of the mean is lost in the rounding of sums and comes out as about 0.
        """
        lengths = [key[2] for key in host if isinstance(key, tuple) and key[:2] == (_SUMS, name)]
        sums, counts = np.zeros((2, max(lengths, default=0))), np.zeros(max(lengths, default=0))
        for length in lengths:
            sums[:, :length] += host[_SUMS, name, length].reshape(2, length)
            counts[:length] += host[_COUNTS, name, length]
        features = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0  # those of the padding have no count
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # infinity minus infinity
            square, mean = sums[:, :features] / counts[:features]
            rms, deviation = np.sqrt(square), np.sqrt(np.maximum(square - mean**2, 0.0))
        is_told = np.isfinite([rms, deviation]) | (counts[:features] == 0)
        return np.where(is_told[0], rms, math.inf), np.where(is_told[1], deviation, math.inf)


def _feature_dim(module: nn.Module, values: Tensor) -> int:
    if isinstance(module, _CONVOLUTIONS):
        return values.dim() - len(module.kernel_size) - 1
    return 1 if isinstance(module, _BY_CHANNEL) else values.dim() - 1


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[-1]))


def shut_gates(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, int] | None:
    """How many gates of a recurrence its input alone drives to their bounds, and out of how many.

    A recurrence hides its activations. What the input and the biases add to them, `W_ih x + b_ih + b_hh`, is computed
    once more, of 1024 time steps of samples at most. Near a bound is what is within 1 % of it.

    Args:
        module: an RNN, LSTM or GRU, or a cell of one.
        arguments: the positional arguments of the call.

    Returns:
        None for all other modules, for a ReLU recurrence, which has no bounds, and for what is spread over ranks.

    Example:
        >>> cell = nn.GRUCell(1, 2)
        >>> _ = nn.init.ones_(cell.weight_ih), nn.init.zeros_(cell.bias_ih), nn.init.zeros_(cell.bias_hh)
        >>> [int(shut_gates(cell, (torch.full((3, 1), x),))[0]) for x in (1.0, 4.0, 1000.0)]  # the tanh is shut first
        [0, 6, 18]
    """
    kind = getattr(module, "mode", type(module).__name__.removesuffix("Cell"))
    is_relu = kind == "RNN_RELU" or getattr(module, "nonlinearity", "") == "relu"
    x = first_tensor(arguments)
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or is_relu or x is None or not x.numel():
        return None
    end = "_l0" if isinstance(module, nn.RNNBase) else ""
    weight, bias = getattr(module, f"weight_ih{end}"), getattr(module, f"bias_ih{end}", None)
    if is_sharded(x) or is_sharded(weight) or x.shape[-1] != weight.shape[-1]:
        return None
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[:: -(-len(rows) // _ROWS)].to(weight.dtype)
    driven = torch.nn.functional.linear(rows, weight.detach(), None if bias is None else bias.detach())
    other = getattr(module, f"bias_hh{end}", None)
    if other is not None:
        always = len(other) * 2 // 3 if kind == "GRU" else len(other)  # of a GRU's new content a gate decides
        driven[:, :always] += other.detach()[:always]
    limits = driven.new_tensor(_LIMITS["RNN" if kind.startswith("RNN") else kind])
    return (driven.abs().unflatten(-1, (len(limits), -1)) > limits[:, None]).sum(), driven.numel()
