"""Norms, largest entries and counts of many tensors: the fewest readings that are exact at any scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.transfer import wide_dtype

_LARGE = 1 << 15  # entries: of smaller tensors the calls cost more than the reading
_ROW = 4096  # entries that are summed in single precision: to about 1e-7, however many rows there are
_CHUNK = 1 << 18  # entries that a copy is made of at a time
_SELECTED, _SAMPLES = 1 << 14, 128
_BLOCK = 16  # neighbours, of 64 bytes in single precision
_SAFE = 1e-16, 1e16  # root mean squares in which no square of single precision that counts is lost
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def square_sum(tensor: Tensor) -> Tensor:
    """() the sum of squares of a detached tensor, in the widest float of the device.

    In double precision it takes four times as long on a CPU as reading the numbers does. There a large tensor is summed
    in single precision row by row, and again in double precision where squares may have been lost: those of 1e-30 are.

    Example:
        >>> f"{square_sum(torch.full((100_000,), 1e-30)):.5g}"
        '1e-55'
    """
    is_worth_it = tensor.numel() >= _LARGE and tensor.dtype in _NARROW and tensor.device.type == "cpu"
    flat = _in_memory(tensor) if is_worth_it else None
    if flat is not None:
        end = flat.numel() - flat.numel() % _ROW
        rows = torch.linalg.vector_norm(flat[:end].view(-1, _ROW), dim=1, dtype=torch.float32)
        total: Tensor = rows.double().square_().sum()
        if end < flat.numel():
            total += torch.linalg.vector_norm(flat[end:], dtype=torch.float64).square_()
        if _SAFE[0] < math.sqrt(float(total) / flat.numel()) < _SAFE[1] or not (float(total) or bool(flat.any())):
            return total
        parts = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in flat.split(_CHUNK)]
        return torch.stack(parts).square_().sum()
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide_dtype(tensor.device))
    return norm.square_()


def spread_between_samples(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """() and () sums of squares of what differs from the mean over the first dimension, and of all.

    Of a large tensor they are taken over an even selection of 128 samples and of the positions in them, 16,384 entries
    in all, which knows their ratio to a few percent; to subtract a mean takes as much time as five norms.

    Example:
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


@np.errstate(all="ignore")  # what is not finite is told by the numbers
@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(N,) the L2 norm of each tensor of one device, in its widest float; 0 of one without entries.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([5., 0.], dtype=torch.float64)
    """
    if not tensors or tensors[0].device.type != "cpu":
        return _stacked_norms(tensors, 2.0)
    found = np.zeros(len(tensors))
    large, batches = _batches(tensors)
    for i in large:
        found[i] = math.sqrt(float(square_sum(tensors[i])))
    for batch in batches:
        found[batch.at] = np.sqrt(batch.sums(np.square(batch.values(tensors))))
    return torch.from_numpy(found)


@np.errstate(all="ignore")  # what is not finite is told by the numbers
@torch.no_grad()
def sizes(tensors: Sequence[Tensor], *, all_statistics: bool = True) -> dict[str, Tensor]:
    """What there is to say of the entries of each tensor of one device, none of which may be empty.

    On a CPU each tensor is read through once and stays in the cache meanwhile; small ones are read many at a time.

    Args:
        tensors: N of them.
        all_statistics: whether the sums and zeros are wanted, too.

    Returns:
        (N,) each: `norm` (L2), `max` of the magnitudes and the number of `nonfinite` entries; and the `sum` of the
        magnitudes and the number of `nonzero` entries.

    Example:
        >>> found = sizes([torch.tensor([3.0, -4.0]), torch.zeros(2)])
        >>> [found[name].tolist() for name in ("norm", "max", "nonfinite", "sum", "nonzero")]
        [[5.0, 0.0], [4.0, 0.0], [0.0, 0.0], [7.0, 0.0], [2.0, 0.0]]
    """
    if tensors[0].device.type != "cpu":
        found = {
            "norm": _stacked_norms(tensors, 2.0),
            "max": _stacked_norms(tensors, torch.inf),
            "nonfinite": torch.stack([torch.isfinite(tensor).logical_not_().sum() for tensor in tensors]),
        }
        if all_statistics:
            found["sum"] = _stacked_norms(tensors, 1.0)
            found["nonzero"] = torch.stack([torch.count_nonzero(tensor) for tensor in tensors])
        return found
    names = ("norm", "max", "nonfinite", "sum", "nonzero")
    arrays = {name: np.zeros(len(tensors)) for name in (names if all_statistics else names[:3])}
    large, batches = _batches(tensors)
    for i in large:
        for name, value in _sizes_of_large(tensors[i], all_statistics).items():
            arrays[name][i] = value
    for batch in batches:
        values = batch.values(tensors)
        magnitudes = np.abs(values)
        arrays["norm"][batch.at] = np.sqrt(batch.sums(np.square(values)))
        arrays["max"][batch.at] = np.maximum.reduceat(magnitudes, batch.first)
        if not np.isfinite(arrays["max"][batch.at]).all():
            arrays["nonfinite"][batch.at] = batch.sums(~np.isfinite(values))
        if all_statistics:
            arrays["sum"][batch.at] = batch.sums(magnitudes)
            arrays["nonzero"][batch.at] = batch.sums(values != 0)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _sizes_of_large(tensor: Tensor, all_statistics: bool) -> dict[str, float]:
    found = {
        "norm": math.sqrt(float(square_sum(tensor))),
        # the largest entry may be NaN
        "max": abs(float(torch.maximum(tensor.amax(), -tensor.amin()))),
    }
    if not math.isfinite(found["max"]):
        found["nonfinite"] = float(torch.isfinite(tensor).logical_not_().sum())
    if all_statistics:
        found["sum"] = _sum_of_magnitudes(tensor)
        found["nonzero"] = float(torch.count_nonzero(tensor))
    return found


def _sum_of_magnitudes(tensor: Tensor) -> float:
    flat = _in_memory(tensor) if tensor.dtype in _NARROW else None
    if flat is not None:
        total = sum(float(chunk.abs().sum(dtype=torch.float32)) for chunk in flat.split(_CHUNK))
        if math.isfinite(total):
            return total
    return float(torch.linalg.vector_norm(tensor, 1, dtype=torch.float64))


def _stacked_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = wide_dtype(tensors[0].device)
    full = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # norms want an entry
    return torch.stack(torch._foreach_norm(full, order, dtype=wide))


class Kept:
    """Copies of the tensors of one device, to tell later by how much they have changed.

    Args:
        tensors: N of them.

    Example:
        >>> weight = torch.zeros(2)
        >>> kept = Kept([weight])
        >>> _ = weight.copy_(torch.tensor([3.0, 4.0]))
        >>> kept.norms_of_change([weight])
        tensor([5.], dtype=torch.float64)
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._number = len(tensors)
        self._is_on_cpu = bool(tensors) and tensors[0].device.type == "cpu"
        large, self._batches = _batches(tensors) if self._is_on_cpu else (range(len(tensors)), [])
        self._large = {i: tensors[i].clone() for i in large}
        self._joined = [batch.joined(tensors) for batch in self._batches]

    @np.errstate(all="ignore")  # what is not finite is told by the numbers
    @torch.no_grad()
    def norms(self) -> Tensor:
        """(N,) L2 norms of what is kept; see `norms`."""
        if not self._is_on_cpu:
            return _stacked_norms(list(self._large.values()), 2.0)
        found = np.zeros(self._number)
        for i, copy in self._large.items():
            found[i] = math.sqrt(float(square_sum(copy)))
        for batch, joined in zip(self._batches, self._joined, strict=True):
            found[batch.at] = np.sqrt(batch.sums(np.square(joined.double().numpy())))
        return torch.from_numpy(found)

    @np.errstate(all="ignore")  # what is not finite is told by the numbers
    @torch.no_grad()
    def norms_of_change(self, now: Sequence[Tensor]) -> Tensor:
        """(N,) L2 norms of what has changed since; to be asked once, as the copies are used up.

        Args:
            now: the same tensors, as they are.
        """
        if not self._is_on_cpu:
            before = list(self._large.values())
            if before:
                torch._foreach_sub_(before, list(now))
            return norms(before)
        found = np.zeros(len(now))
        for i, copy in self._large.items():
            found[i] = math.sqrt(float(square_sum(copy.sub_(now[i]))))
        for batch, joined in zip(self._batches, self._joined, strict=True):
            found[batch.at] = np.sqrt(batch.sums(np.square(joined.double().numpy() - batch.values(now))))
        return torch.from_numpy(found)


@dataclass(frozen=True)
class _Batch:
    """Small tensors that are read together: a call for each of them would take longer than the reading."""

    at: list[int]
    first: npt.NDArray[np.int64]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t if (t := tensors[i]).dim() == 1 else t.reshape(-1) for i in self.at])

    def values(self, tensors: Sequence[Tensor]) -> Floats:
        values: Floats = self.joined(tensors).double().numpy()
        return values

    def sums(self, values: npt.NDArray[Any]) -> Floats:
        return np.add.reduceat(values, self.first, dtype=np.float64)


def _batches(tensors: Sequence[Tensor]) -> tuple[list[int], list[_Batch]]:
    """Which tensors are large, and the small ones in batches; those without entries are in neither."""
    lengths = [tensor.numel() for tensor in tensors]
    large = [i for i, length in enumerate(lengths) if length >= _LARGE]
    small = [i for i, length in enumerate(lengths) if 0 < length < _LARGE]
    ends = np.cumsum([lengths[i] for i in small])
    batches = []
    for at in np.split(np.array(small, dtype=np.int64), np.flatnonzero(np.diff(ends // _CHUNK)) + 1):
        if len(at):
            first = np.cumsum([0, *(lengths[i] for i in at[:-1])])
            batches.append(_Batch(at.tolist(), first))
    return large, batches


def _in_memory(tensor: Tensor) -> Tensor | None:
    """The entries in the order in which they lie in memory, without a copy; None where they do not lie side by side."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.view(-1) if tensor.is_contiguous() else None
