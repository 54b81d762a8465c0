"""Norms, largest entries and counts of many tensors: the fewest readings that are exact at any scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.reading import CHUNK, NARROW, Squares, batches, square_sums
from lightning_gradflow.probes.transfer import wide_dtype


@np.errstate(all="ignore")  # what is not finite is told by the numbers
@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(N,) the L2 norm of each tensor of one device, in its widest float; 0 of one without entries.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([5., 0.], dtype=torch.float64)
    """
    if not tensors or tensors[0].device.type != "cpu":
        return stacked_norms(tensors, 2.0)
    found = np.zeros(len(tensors))
    large, small = batches(tensors)
    found[large] = np.sqrt(square_sums([tensors[i] for i in large]))
    for batch in small:
        found[batch.at] = np.sqrt(batch.sums(np.square(batch.values(tensors))))
    return torch.from_numpy(found)


@np.errstate(all="ignore")  # what is not finite is told by the numbers
@torch.no_grad()
def sizes(tensors: Sequence[Tensor], *, all_statistics: bool = True) -> dict[str, Tensor]:
    """What there is to say of the entries of each tensor of one device, none of which may be empty.

    On a CPU each tensor is read through once and stays in the cache meanwhile; small ones are read many at a time.

    Args:
        tensors: N of them.
        all_statistics: whether more is wanted than the first two.

    Returns:
        (N,) each: `norm` (L2) and the number of `nonfinite` entries; and the `max` and the `sum` of the magnitudes, and
        the number of `nonzero` entries.

    Example:
        >>> found = sizes([torch.tensor([3.0, -4.0]), torch.zeros(2)])
        >>> [found[name].tolist() for name in ("norm", "nonfinite", "max", "sum", "nonzero")]
        [[5.0, 0.0], [0.0, 0.0], [4.0, 0.0], [7.0, 0.0], [2.0, 0.0]]
    """
    if tensors[0].device.type != "cpu":
        found = {
            "norm": stacked_norms(tensors, 2.0),
            "nonfinite": torch.stack([torch.isfinite(tensor).logical_not_().sum() for tensor in tensors]),
        }
        if all_statistics:
            found["max"] = stacked_norms(tensors, torch.inf)
            found["sum"] = stacked_norms(tensors, 1.0)
            found["nonzero"] = torch.stack([torch.count_nonzero(tensor) for tensor in tensors])
        return found
    names = ("norm", "nonfinite", "max", "sum", "nonzero")
    arrays = {name: np.zeros(len(tensors)) for name in (names if all_statistics else names[:2])}
    large, small = batches(tensors)
    if large:
        for name, column in _sizes_of_large([tensors[i] for i in large], all_statistics).items():
            arrays[name][large] = column
    for batch in small:
        values = batch.values(tensors)
        arrays["norm"][batch.at] = np.sqrt(batch.sums(np.square(values)))
        if not np.isfinite(arrays["norm"][batch.at]).all():
            arrays["nonfinite"][batch.at] = batch.sums(~np.isfinite(values))
        if all_statistics:
            magnitudes = np.abs(values)
            arrays["max"][batch.at] = np.maximum.reduceat(magnitudes, batch.first)
            arrays["sum"][batch.at] = batch.sums(magnitudes)
            arrays["nonzero"][batch.at] = batch.sums(values != 0)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _sizes_of_large(tensors: Sequence[Tensor], all_statistics: bool) -> dict[str, Floats]:
    squares = Squares()
    extremes: list[Tensor] = []
    found: dict[str, list[float]] = {"sum": [], "nonzero": []} if all_statistics else {}
    for tensor in tensors:
        entries = squares.take(tensor)
        if all_statistics:  # now, as it is in the cache
            extremes += torch.aminmax(entries)  # NaN, where there is one
            found["sum"].append(_sum_of_magnitudes(entries))
            found["nonzero"].append(float(torch.count_nonzero(entries)))
    columns = {name: np.array(column) for name, column in found.items()}
    columns["norm"] = np.sqrt(squares.sums())
    columns["nonfinite"] = np.zeros(len(tensors))
    for i in np.flatnonzero(~np.isfinite(columns["norm"])).tolist():
        columns["nonfinite"][i] = float(torch.isfinite(tensors[i]).logical_not_().sum())
    if all_statistics:
        columns["max"] = np.abs(torch.stack(extremes).double().numpy()).reshape(-1, 2).max(axis=1)
    return columns


def _sum_of_magnitudes(entries: Tensor) -> float:
    if entries.dim() == 1 and entries.dtype in NARROW:
        total = sum(float(chunk.abs().sum(dtype=torch.float32)) for chunk in entries.split(CHUNK))
        if math.isfinite(total):
            return total
    return float(torch.linalg.vector_norm(entries, 1, dtype=torch.float64))


def stacked_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """(N,) the norms of an order of tensors on any one device, in its widest float."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = wide_dtype(tensors[0].device)
    full = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # norms want an entry
    return torch.stack(torch._foreach_norm(full, order, dtype=wide))
