"""When a picture of the whole run is worth sending."""

from __future__ import annotations

import math

from lightning_gradflow.sinks.base import View


class Pace:
    """Says when the heatmap is due: at the first row, at every further 10 % of the run, and at the end.

    A run without an end has no progress: then it is due whenever the number of rows has doubled.

    Example:
        >>> import numpy as np
        >>> from lightning_gradflow.history import History
        >>> pace = Pace()
        >>> [pace.is_due(View(History(), (), (), 0, done, "Net")) for done in (0.01, 0.02, 0.11, 0.12)]
        [True, False, True, False]
    """

    def __init__(self) -> None:
        self._tenth = -1
        self._rows = 0
        self._next_row = 1
        self._is_fresh = False

    def is_due(self, view: View) -> bool:
        """Whether to send the picture with this row; to be asked once for each row."""
        self._rows += 1
        if math.isnan(view.progress):
            due = self._rows >= self._next_row
        else:
            tenth = int(view.progress * 10 + 1e-9)
            due = tenth > self._tenth
            self._tenth = max(tenth, self._tenth)
        if due:
            self._next_row = 2 * self._rows
        self._is_fresh = due
        return due

    @property
    def is_due_at_end(self) -> bool:
        """Whether the picture that was sent last lacks a row; false where there was no row at all."""
        return self._rows > 0 and not self._is_fresh
