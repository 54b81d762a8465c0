"""When a picture of the whole run is worth sending."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_gradflow.sinks.base import View

MAX_SHARE = 0.005
"""The share of the time since the fit began that pictures may take, before its end."""
ASSUMED_SECONDS = 0.2
"""What the first picture is taken to cost: a large one, with what is imported for it, on a busy machine."""


class Pace:
    """Says when the heatmap is due: at every 10 % of the run, if there is time for it, and at the end.

    A run without an end has no progress: then it is due whenever the number of rows has doubled. It never is at the
    first row, in which there is nothing to see. Pictures are drawn while the training waits: one that would make them
    cost more than half a percent of the time since the fit began comes later, or not at all. So a fit of less than 40
    seconds has the one at its end alone, and how long a picture takes on this machine decides how many there are.

    Args:
        now: tells the time in seconds; it must not go back.

    Example:
        >>> from lightning_gradflow.history import History
        >>> seconds = iter(range(0, 1000, 100))
        >>> pace = Pace(now=lambda: next(seconds))
        >>> [pace.is_due(View(History(), (), (), 0, done, "Net")) for done in (0.01, 0.02, 0.11, 0.12, 0.2)]
        [False, False, True, False, True]
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._spent = 0.0
        self._next_cost = ASSUMED_SECONDS
        self._tenth = 0
        self._rows = 0
        self._next_row = 2
        self._is_fresh = False

    def is_due(self, view: View) -> bool:
        """Whether to send the picture with this row; to be asked once for each row."""
        self._rows += 1
        tenth = 0 if math.isnan(view.progress) else int(view.progress * 10 + 1e-9)
        is_time = self._rows >= self._next_row if math.isnan(view.progress) else tenth > self._tenth
        self._is_fresh = self._rows > 1 and is_time and self._is_affordable()
        if self._is_fresh:
            self._tenth, self._next_row = tenth, 2 * self._rows
        return self._is_fresh

    def _is_affordable(self) -> bool:
        return self._spent + self._next_cost <= MAX_SHARE * (self._now() - self._began)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Goes around all that is done for a picture, and takes its time."""
        began = self._now()
        try:
            yield
        finally:
            self._next_cost = self._now() - began
            self._spent += self._next_cost

    @property
    def is_due_at_end(self) -> bool:
        """Whether the picture that was sent last lacks a row; false where there was no row at all."""
        return self._rows > 0 and not self._is_fresh
