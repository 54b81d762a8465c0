"""Which steps are sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Cadence:
    """Says which steps are sampled: 0, 1, 2, 4, 8, ... up to the interval, then every `interval` steps.

    Where several optimizers step at different rates (manual optimization), one that did not step in a sampled step
    would be missed for good, if its own steps never fell on one. So a step more is sampled: the next one at which it
    is expected, from the gap between its last two.

    Args:
        interval: steps between two samples, in [1, inf).

    Example:
        >>> cadence = Cadence(12)
        >>> [step for step in range(40) if cadence.is_due(step)]
        [0, 1, 2, 4, 8, 12, 24, 36]
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._last: dict[int, int] = {}  # by optimizer: its newest step
        self._gap: dict[int, int] = {}
        self._missed: set[int] = set()

    def is_due(self, step: int) -> bool:
        """Whether a step is to be sampled."""
        if step % self.interval == 0 or (step < self.interval and step & (step - 1) == 0):
            return True
        return any(step == self._last.get(key, step) + self._gap.get(key, 0) for key in self._missed)

    def note(self, optimizer: int, step: int) -> None:
        """An optimizer has stepped."""
        last = self._last.get(optimizer, step)
        if step > last:
            self._gap[optimizer] = step - last
        self._last[optimizer] = step

    def sampled(self, step: int, optimizers: Iterable[int], read: Iterable[int]) -> None:
        """A step was sampled.

        Args:
            step: which.
            optimizers: all there are.
            read: those that have stepped in it.
        """
        regular = step % self.interval == 0 or step < self.interval
        self._missed = (set(optimizers) if regular else self._missed) - set(read)
        # each is tried once: one that is late, or has stopped, waits for the next regular sample
        self._missed = {key for key in self._missed if self._last.get(key, step) + self._gap.get(key, 0) > step}

    def state_dict(self) -> dict[str, Any]:
        """When each optimizer stepped, so that a resumed run samples the same steps."""
        return {"last": dict(self._last), "gap": dict(self._gap), "missed": sorted(self._missed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._last, self._gap = dict(state["last"]), dict(state["gap"])
        self._missed = set(state["missed"])
