"""The training loss of every step, of old ones as means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_gradflow.history.rows import Floats
from lightning_gradflow.history.tables import Grown


class LossTrace:
    """Losses with the steps that they belong to; when they become too many, neighbours in the middle are merged.

    Args:
        max_rows: rows of the history; eight times as many losses are kept.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._set(np.empty((0, 3)))

    @property
    def steps(self) -> Floats:
        """(S,) step at the middle of each entry, read-only."""
        return self._steps.rows

    @property
    def losses(self) -> Floats:
        """(S,) loss, or mean over the steps of the entry, read-only."""
        return self._losses.rows

    def add(self, step: int, losses: Floats) -> None:
        """Takes the losses of the steps up to `step`, oldest first."""
        n = len(losses)
        self._steps.extend(np.arange(step - n + 1, step + 1, dtype=np.float64))
        self._losses.extend(np.asarray(losses, dtype=np.float64))
        self._counts.extend(np.ones(n))
        if len(self._losses) > 8 * self._max_rows:
            entries = self.state().tolist()
            first, recent = self._max_rows // 4, len(entries) - 4 * self._max_rows
            old = _thin(entries[first:recent], 2 * self._max_rows)
            self._set(np.array([*entries[:first], *old, *entries[recent:]]))

    def state(self) -> Floats:
        """(S, 3) step, loss and number of steps of each entry."""
        return np.stack([self.steps, self.losses, self._counts.rows], axis=1)

    def load(self, state: Any) -> None:
        """Continues from what `state` gave."""
        self._set(np.asarray(state, dtype=np.float64).reshape(-1, 3))

    def _set(self, entries: Floats) -> None:
        self._steps, self._losses, self._counts = (Grown(entries[:, i]) for i in range(3))


def _thin(entries: list[list[float]], limit: int) -> list[list[float]]:
    """Merges neighbours to at most `limit` + 1 means over about equal numbers of steps.

    A loss that is not finite does not take its neighbours along: of such a pair the other one is kept.
    """
    target = sum(n for _, _, n in entries) / limit
    merged = [list(entries[0])]
    for step, loss, n in entries[1:]:
        last_step, last_loss, last_n = merged[-1]
        if last_n >= target:
            merged.append([step, loss, n])
        elif math.isfinite(loss) and math.isfinite(last_loss):
            total = last_n + n
            merged[-1] = [(last_step * last_n + step * n) / total, (last_loss * last_n + loss * n) / total, total]
        elif math.isfinite(loss):
            merged[-1] = [step, loss, n]
    return merged
