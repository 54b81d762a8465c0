"""How large weights are, beside what keeps the size of a signal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.transfer import wide_dtype

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight has its inputs first."""


def weight_size(layer: nn.Module, weight: Tensor) -> Tensor:
    """The root mean square of the entries, times the square root of the numbers that each output is a sum over.

    Independent entries of size 1 keep the size of a signal; He's initialisation has 1.4, torch's default 0.6.

    Args:
        layer: whose weight it is.
        weight: (units, inputs, ...); of a transposed convolution (inputs, units, ...).

    Returns:
        () in the widest float of its device.

    Example:
        >>> layer = nn.Linear(400, 400)
        >>> round(float(weight_size(layer, layer.weight)), 1)
        0.6
    """
    norm: Tensor = torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight.device))
    return norm * math.sqrt(_fan_in(layer, weight) / weight.numel())


def _fan_in(layer: nn.Module, weight: Tensor) -> float:
    """Numbers that each output is a sum over, on average."""
    if not isinstance(layer, TRANSPOSED):
        return weight[0].numel()
    return float(weight[:, 0].numel() / layer.groups / math.prod(layer.stride))
