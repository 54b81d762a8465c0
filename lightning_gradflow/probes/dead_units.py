"""Units that have been silent for several samples in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_gradflow.history import Bools, Floats, Ints


class SilentUnits:
    """Counts for each unit of each activation the samples in a row in which it never left its flat side.

    Args:
        window: samples in a row after which a unit counts as dead, in [1, inf).

    Raises:
        ValueError: if `window` is below 1.

    Example:
        >>> silent = SilentUnits(window=2)
        >>> samples = [silent.update(["relu"], np.array([2]), np.array([True, False])) for _ in range(3)]
        >>> np.concatenate(samples)
        array([nan, 0.5, 0.5])
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be in [1, inf), got {window!r}")
        self._window = window
        self._samples: dict[str, int] = {}
        self._silent: dict[str, Ints] = {}

    def update(self, names: Sequence[str], lengths: Ints, active: Bools) -> Floats:
        """Takes one sample of activations.

        Args:
            names: which N activations.
            lengths: (N,) how many units each has, in [1, inf). Another number (a sequence of another length) starts
                anew.
            active: (sum of lengths,) the units that left their flat side, one activation behind the other.

        Returns:
            (N,) the share of dead units; NaN before there are `window` samples.
        """
        ends = np.cumsum(lengths)
        before: list[Ints] = []
        for name, length in zip(names, lengths.tolist(), strict=True):
            silent = self._silent.get(name)
            if silent is None or len(silent) != length:
                silent, self._samples[name] = np.zeros(length, dtype=np.int64), 0
            self._samples[name] += 1
            before.append(silent)
        if not before:
            return np.empty(0)
        counts = np.where(active, 0, np.concatenate(before) + 1)
        for name, end, length in zip(names, ends.tolist(), lengths.tolist(), strict=True):
            self._silent[name] = counts[end - length : end].copy()  # not to hold the counts of all others with it
        dead = np.add.reduceat(counts >= self._window, ends - lengths, dtype=np.int64) / lengths
        is_known = np.array([self._samples[name] >= self._window for name in names])
        return np.where(is_known, dead, np.nan)

    def state_dict(self) -> dict[str, Any]:
        """The counts as arrays, so that a resumed run does not have to see a whole window first."""
        return {name: [samples, self._silent[name]] for name, samples in self._samples.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._samples = {name: int(samples) for name, (samples, _) in state.items()}
        self._silent = {name: np.asarray(silent, dtype=np.int64) for name, (_, silent) in state.items()}
