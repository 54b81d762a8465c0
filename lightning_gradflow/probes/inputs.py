"""The scale of each feature of what goes into the network."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.observer import first_tensor
from lightning_gradflow.probes.shards import is_cut, local
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

MAX_FEATURES = 1024
"""An input of more features is not measured: such columns are pixels or samples of a sound, all of one unit."""

_SQUARES, _COUNTS = "input", "input count"  # names of what is transferred begin with one of these
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # (B, channels, ...)


class InputScale:
    """Root mean square of each feature of what goes into the first layer of a sampled step.

    Taken from the layer's first positional floating-point tensor. The features are its last dimension; of what goes
    into a convolution, or into a normalisation of channels, the channels. Whole numbers (tokens), keyword arguments,
    single vectors, more than `MAX_FEATURES` features and an input that is cut up over ranks are not measured.

    Example:
        >>> scale, transfer = InputScale(), Transfer()
        >>> scale.take(nn.Linear(2, 1), (torch.tensor([[3.0, 1000.0], [4.0, 1000.0]]),))
        >>> scale.pack(transfer)
        >>> (InputScale.unpack(transfer.fetch()) ** 2).round(6).tolist()
        [12.5, 1000000.0]
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None  # (F,) sums over the batches so far
        self._counts: Floats = np.zeros(0)  # (F,)

    def take(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Adds the input of one batch.

        Args:
            module: the layer that it went into.
            arguments: the positional arguments of the call.
        """
        tensor = first_tensor(arguments)
        values = local(tensor.detach()) if tensor is not None and not is_cut(tensor) else None
        if values is None or values.dim() < 2 or not values.numel():
            return
        at = _feature_dim(module, values)
        features = values.shape[at]
        if features > MAX_FEATURES:
            return
        others = [dim for dim in range(values.dim()) if dim != at]
        # six times as fast on a CPU as the norm over these dimensions
        squares = values.to(wide_dtype(values.device), copy=True).square_().sum(others)
        counts = np.full(features, values.numel() / features)
        if self._squares is not None:
            longest = max(features, len(self._squares))
            squares = _padded(squares, longest) + _padded(self._squares, longest)
            counts = np.pad(counts, (0, longest - features)) + np.pad(self._counts, (0, longest - len(self._counts)))
        self._squares, self._counts = squares, counts

    def pack(self, transfer: Transfer) -> None:
        """Hands what was seen to the transfer."""
        if self._squares is None:
            return
        features = len(self._squares)
        # ranks agree on lengths: few lengths are few agreements
        length = features if transfer.is_alone else 1 << (features - 1).bit_length()
        transfer.share((_SQUARES, length), _padded(self._squares, length))
        transfer.share_numbers((_COUNTS, length), [*self._counts.tolist(), *[0.0] * (length - features)])

    @staticmethod
    def unpack(host: Mapping[Hashable, Floats]) -> Floats:
        """(F,) root mean square of each feature out of what was fetched; empty where nothing was measured."""
        lengths = [name[1] for name in host if isinstance(name, tuple) and name[0] == _SQUARES]
        squares, counts = np.zeros(max(lengths, default=0)), np.zeros(max(lengths, default=0))
        for length in lengths:
            squares[:length] += host[_SQUARES, length]
            counts[:length] += host[_COUNTS, length]
        features = int(np.count_nonzero(counts))  # the columns that ranks were padded with have no count
        rms = np.sqrt(squares[:features] / counts[:features])
        return np.where(np.isfinite(rms), rms, math.inf)


def _feature_dim(module: nn.Module, values: Tensor) -> int:
    if isinstance(module, _CONVOLUTIONS):
        return values.dim() - len(module.kernel_size) - 1
    return 1 if isinstance(module, _BY_CHANNEL) else values.dim() - 1


def _padded(vector: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, length - len(vector)))
