"""The training losses between two samples, kept as references until the next row fetches them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.transfer import wide_dtype

MAX_LOSSES = 1024
"""References held between two samples; half a megabyte at most on a GPU."""


class PendingLosses:
    """Losses of batches, each with its step and a factor; nothing is computed with them until they are fetched.

    Example:
        >>> losses = PendingLosses()
        >>> losses.add(0, torch.tensor(1.0))
        >>> losses.add(0, torch.tensor(3.0))
        >>> losses.by_step(losses.stack(torch.device("cpu")).numpy())
        array([2.])
        >>> len(losses)
        0
    """

    def __init__(self) -> None:
        self._losses: deque[tuple[int, Tensor, float]] = deque(maxlen=MAX_LOSSES)

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, step: int, loss: Tensor, factor: float = 1.0) -> None:
        """Keeps a reference to the loss of a batch, to be multiplied by `factor` later."""
        self._losses.append((step, loss, factor))

    def stack(self, device: torch.device, length: int = 0) -> Tensor:
        """(N,) the losses on one device, with zeros behind them up to `length`."""
        values = [loss.detach().reshape(()).to(device, wide_dtype(device)) for _, loss, _ in self._losses]
        padding = torch.zeros(max(0, length - len(values)), dtype=wide_dtype(device), device=device)
        return torch.cat([torch.stack(values), padding]) if values else padding

    def by_step(self, values: Floats, ranks: int = 1) -> Floats:
        """(S,) mean loss of each step, and forgets them.

        Args:
            values: what `stack` gave, summed over the ranks.
            ranks: how many ranks these are.
        """
        of_step: dict[int, list[float]] = {}
        for (step, _, factor), value in zip(self._losses, values.tolist(), strict=False):
            of_step.setdefault(step, []).append(value * factor / ranks)
        self._losses.clear()
        return np.array([sum(found) / len(found) for _, found in sorted(of_step.items())], dtype=np.float64)

    def state_dict(self) -> list[list[Any]]:
        """Step, loss and factor of each."""
        device = self._losses[0][1].device if self._losses else torch.device("cpu")
        values = self.stack(device).tolist()
        return [[step, value, factor] for (step, _, factor), value in zip(self._losses, values, strict=True)]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Continues from what `state_dict` gave."""
        for step, loss, factor in state:
            self.add(int(step), torch.tensor(loss, dtype=torch.float64), float(factor))
