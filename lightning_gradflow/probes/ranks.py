"""Sums over the batches of a sampled step and over the ranks of a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


class PackedSum(Metric):
    """A vector that is summed over updates and over ranks: all statistics of a sample in one state, so one collective.

    Args:
        **kwargs: as for every `torchmetrics.Metric`.

    Example:
        >>> total = PackedSum()
        >>> total.update(torch.tensor([1.0, 2.0]))
        >>> total.update(torch.tensor([3.0, 4.0]))
        >>> total.compute()
        tensor([4., 6.])
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # one zero stands for as many as the first update brings
        self.add_state("sums", default=torch.zeros(1), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds a (N,) vector; N is the same at every update between two resets."""
        self.sums = self.sums.to(values) + values

    def compute(self) -> Tensor:
        """(N,) sums over all updates and all ranks."""
        return self.sums


def world_size() -> int:
    """The number of ranks that train together; 1 outside distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
