"""Units that have been silent for several samples in a row."""

from __future__ import annotations

import torch
from torch import Tensor


class SilentUnits:
    """Counts for each unit of each activation the samples in a row in which it never left its flat side.

    Args:
        window: samples in a row after which a unit counts as dead, in [1, inf).

    Raises:
        ValueError: if `window` is below 1.

    Example:
        >>> silent = SilentUnits(window=2)
        >>> [silent.update("relu", torch.tensor([True, False])).item() for _ in range(3)]
        [nan, 0.5, 0.5]
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be in [1, inf), got {window!r}")
        self._window = window
        self._samples: dict[str, int] = {}
        self._silent: dict[str, Tensor] = {}

    def update(self, name: str, active: Tensor) -> Tensor:
        """Takes one sample of an activation.

        Args:
            name: which activation.
            active: (U,) bool, the units that left their flat side. A new U (a sequence of another length) starts anew.

        Returns:
            The share of dead units, a scalar on the device; NaN before there are `window` samples.
        """
        silent = self._silent.get(name)
        if silent is None or silent.shape != active.shape:
            silent, self._samples[name] = torch.zeros_like(active, dtype=torch.int64), 0
        self._samples[name] += 1
        self._silent[name] = torch.where(active, 0, silent + 1)
        if self._samples[name] < self._window:
            return torch.full((), torch.nan, device=active.device)
        return (self._silent[name] >= self._window).float().mean()
