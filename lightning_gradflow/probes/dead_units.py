"""Units that have been silent for several samples in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradflow.history import Ints


class SilentUnits:
    """Counts for each unit of each activation the samples in a row in which it never left its flat side.

    Args:
        window: samples in a row after which a unit counts as dead, in [1, inf).

    Raises:
        ValueError: if `window` is below 1.

    Example:
        >>> silent = SilentUnits(window=2)
        >>> [silent.update("relu", np.array([True, False])) for _ in range(3)]
        [nan, 0.5, 0.5]
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be in [1, inf), got {window!r}")
        self._window = window
        self._samples: dict[str, int] = {}
        self._silent: dict[str, Ints] = {}

    def update(self, name: str, active: npt.NDArray[np.bool_]) -> float:
        """Takes one sample of an activation.

        Args:
            name: which activation.
            active: (U,) the units that left their flat side. A new U (a sequence of another length) starts anew.

        Returns:
            The share of dead units; NaN before there are `window` samples.
        """
        silent = self._silent.get(name)
        if silent is None or silent.shape != active.shape:
            silent, self._samples[name] = np.zeros(active.shape, dtype=np.int64), 0
        self._samples[name] += 1
        self._silent[name] = np.where(active, 0, silent + 1)
        if self._samples[name] < self._window:
            return math.nan
        return float((self._silent[name] >= self._window).mean())

    def state_dict(self) -> dict[str, Any]:
        """The counts as arrays, so that a resumed run does not have to see a whole window first."""
        return {name: [samples, self._silent[name]] for name, samples in self._samples.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._samples = {name: int(samples) for name, (samples, _) in state.items()}
        self._silent = {name: np.asarray(silent, dtype=np.int64) for name, (_, silent) in state.items()}
