"""By how much tensors have changed, out of copies of what they were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.probes.norms import norms, stacked_norms
from lightning_gradflow.probes.reading import batches, square_sums


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
        large, self._small = batches(tensors) if self._is_on_cpu else (range(len(tensors)), [])
        self._large = {i: tensors[i].clone() for i in large}
        self._joined = [batch.joined(tensors) for batch in self._small]

    @np.errstate(all="ignore")  # what is not finite is told by the numbers
    @torch.no_grad()
    def norms(self) -> Tensor:
        """(N,) L2 norms of what is kept; see `norms`."""
        if not self._is_on_cpu:
            return stacked_norms(list(self._large.values()), 2.0)
        found = np.zeros(self._number)
        found[list(self._large)] = np.sqrt(square_sums(list(self._large.values())))
        for batch, joined in zip(self._small, self._joined, strict=True):
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
        found[list(self._large)] = np.sqrt(square_sums(copy.sub_(now[i]) for i, copy in self._large.items()))
        for batch, joined in zip(self._small, self._joined, strict=True):
            found[batch.at] = np.sqrt(batch.sums(np.square(joined.double().numpy() - batch.values(now))))
        return torch.from_numpy(found)
