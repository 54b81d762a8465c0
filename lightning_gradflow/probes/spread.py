"""How much the samples of a batch differ, out of a fixed selection of entries."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_gradflow.probes.transfer import wide_dtype

_SELECTED, _SAMPLES = 1 << 14, 128
_BLOCK = 16  # neighbours, of 64 bytes in single precision


def spread_between_samples(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """() and () sums of squares of what differs from the mean over the first dimension, and of all.

    Of a large tensor they are taken over an even selection of 128 samples and of the positions in them, 16,384 entries
    in all, which knows their ratio to a few percent; to subtract a mean takes as much time as five norms.

    Example:
        >>> import torch
        >>> spread_between_samples(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        (tensor(2., dtype=torch.float64), tensor(60., dtype=torch.float64))
    """
    if tensor.dim() > 2:
        order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(0, *order)
    by_sample = tensor.reshape(len(tensor), -1)
    if by_sample.numel() > _SELECTED:
        by_sample = by_sample[:: -(-len(by_sample) // _SAMPLES)]
        most = _SELECTED // len(by_sample) // _BLOCK
        if by_sample.shape[1] // _BLOCK > most:  # memory is read in blocks, of which all is taken
            blocks = by_sample[:, : by_sample.shape[1] // _BLOCK * _BLOCK].unflatten(1, (-1, _BLOCK))
            by_sample = blocks[:, :: coprime_stride(blocks.shape[1], most)]
    wide = by_sample.to(wide_dtype(tensor.device), copy=True)
    square = wide.square().sum()
    return wide.sub_(wide.mean(dim=0)).square_().sum(), square


def coprime_stride(number: int, most: int) -> int:
    """The least stride for so many of a number of entries that shares no factor with it: else it reads few columns.

    Example:
        >>> coprime_stride(12, 12), coprime_stride(12, 4)
        (1, 5)
    """
    stride = max(1, -(-number // most))
    while math.gcd(stride, number) > 1:
        stride += 1
    return stride
