"""One copy from the device to the host for all that a sample measured."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats


class Transfer:
    """Collects 1-D tensors by name and brings them to the host in one copy for each device.

    Example:
        >>> transfer = Transfer()
        >>> transfer.put("norms", torch.tensor([1.0, 2.0]))
        >>> transfer.put("zeros", torch.tensor([3]))
        >>> transfer.fetch()
        {'norms': array([1., 2.]), 'zeros': array([3.])}
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Takes a (N,) tensor of any real type; a name stands for one tensor until the next `fetch`."""
        self._pieces[name] = tensor.detach()

    def fetch(self) -> dict[str, Floats]:
        """Everything that was put, as float64 arrays on the host; empties the collection."""
        by_device: dict[torch.device, list[str]] = {}
        for name, tensor in self._pieces.items():
            by_device.setdefault(tensor.device, []).append(name)
        arrays: dict[str, Floats] = {}
        for device, names in by_device.items():
            packed = torch.cat([self._pieces[name].to(wide_dtype(device)) for name in names])
            flat = packed.cpu().double().numpy()
            ends = np.cumsum([self._pieces[name].numel() for name in names])
            arrays.update(zip(names, np.split(flat, ends[:-1]), strict=True))
        self._pieces = {}
        return arrays


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device: sums of squares of a dying gradient (1e-30) underflow in float32."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
