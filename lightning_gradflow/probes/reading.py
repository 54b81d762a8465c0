"""Reading the entries of tensors on a CPU: each once, large ones row by row and small ones many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.transfer import wide_dtype

CHUNK = 1 << 18
"""Entries that a copy is made of at a time."""
NARROW = (torch.float32, torch.bfloat16, torch.float16)
_LARGE = 1 << 15  # entries: of smaller tensors the calls cost more than the reading
_ROW = 4096  # entries that are summed in single precision: to about 1e-7, however many rows there are
_SAFE = 1e-16, 1e16  # root mean squares in which no square of single precision that counts is lost


def square_sum(tensor: Tensor) -> Tensor:
    """() the sum of squares of a detached tensor, in the widest float of the device.

    In double precision it takes four times as long on a CPU as reading the numbers does. There a large tensor is summed
    in single precision row by row, and again in double precision where squares may have been lost: those of 1e-30 are.

    Example:
        >>> f"{square_sum(torch.full((100_000,), 1e-30)):.5g}"
        '1e-55'
    """
    if tensor.numel() >= _LARGE and tensor.device.type == "cpu":
        return torch.from_numpy(square_sums([tensor]))[0]
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide_dtype(tensor.device))
    return norm.square_()


def square_sums(tensors: Iterable[Tensor]) -> Floats:
    """(N,) the sums of squares of large tensors on a CPU, of which each is read as soon as it is there."""
    squares = Squares()
    for tensor in tensors:
        squares.take(tensor)
    return squares.sums()


class Squares:
    """Sums of squares of large tensors on a CPU: a call or two for each, and the rest for all of them together.

    Example:
        >>> squares = Squares()
        >>> _ = squares.take(torch.full((40_000,), 2.0))
        >>> squares.sums()
        array([160000.])
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._first: list[int] = []  # of the norms of each tensor
        self._number = 0

    def take(self, tensor: Tensor) -> Tensor:
        """Reads a tensor, and returns its entries: in one row where that needs no copy. They must stay as they are."""
        flat = in_memory(tensor)
        entries = tensor if flat is None else flat
        self._taken.append(entries)
        self._first.append(self._number)
        if flat is None or flat.dtype not in NARROW:
            self._add(torch.linalg.vector_norm(entries, dtype=torch.float64).view(1))
            return entries
        over = flat.numel() % _ROW
        rows = (flat[:-over] if over else flat).view(-1, _ROW)
        self._add(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
        if over:
            self._add(torch.linalg.vector_norm(flat[-over:], dtype=torch.float64).view(1))
        return entries

    def _add(self, norms: Tensor) -> None:
        self._norms.append(norms)
        self._number += norms.numel()

    @np.errstate(all="ignore")  # what is not finite is told by the numbers
    def sums(self) -> Floats:
        """(N,) the sums of squares of the tensors, in the order in which they were taken."""
        if not self._norms:
            return np.empty(0)
        found: Floats = np.add.reduceat(np.square(torch.cat(self._norms).double().numpy()), self._first)
        sizes = np.sqrt(found / [entries.numel() for entries in self._taken])
        for i in np.flatnonzero(~((sizes > _SAFE[0]) & (sizes < _SAFE[1]))):
            entries = self._taken[i]
            if entries.dtype in NARROW and (found[i] or bool(entries.any())):
                parts = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in entries.split(CHUNK)]
                found[i] = float(torch.stack(parts).square_().sum())
        return found


@dataclass(frozen=True)
class Batch:
    """Small tensors that are read together: a call for each of them would take longer than the reading.

    Args:
        at: (n,) which tensors these are.
        first: (n,) where the entries of each begin in those of all.
    """

    at: list[int]
    first: npt.NDArray[np.int64]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The entries of all of them, one tensor behind the other; `tensors` are those that `batches` was given."""
        return torch.cat([t if (t := tensors[i]).dim() == 1 else t.reshape(-1) for i in self.at])

    def values(self, tensors: Sequence[Tensor]) -> Floats:
        """The same as an array."""
        values: Floats = self.joined(tensors).double().numpy()
        return values

    def sums(self, values: npt.NDArray[Any]) -> Floats:
        """(n,) the sum over each tensor of what stands for its entries in `values`."""
        return np.add.reduceat(values, self.first, dtype=np.float64)


def batches(tensors: Sequence[Tensor]) -> tuple[list[int], list[Batch]]:
    """Which tensors are large, and the small ones in batches; those without entries are in neither."""
    return _batches(tuple([tensor.numel() for tensor in tensors]), CHUNK)


@lru_cache(maxsize=16)  # the same few lists of tensors come again and again
def _batches(lengths: tuple[int, ...], chunk: int) -> tuple[list[int], list[Batch]]:
    large = [i for i, length in enumerate(lengths) if length >= _LARGE]
    small = [i for i, length in enumerate(lengths) if 0 < length < _LARGE]
    ends = np.cumsum([lengths[i] for i in small])
    found = []
    for at in np.split(np.array(small, dtype=np.int64), np.flatnonzero(np.diff(ends // chunk)) + 1):
        if len(at):
            first = np.cumsum([0, *(lengths[i] for i in at[:-1])])
            found.append(Batch(at.tolist(), first))
    return large, found


def in_memory(tensor: Tensor) -> Tensor | None:
    """The entries in the order in which they lie in memory, without a copy; None where they do not lie side by side."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.view(-1) if tensor.is_contiguous() else None
