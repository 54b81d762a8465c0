"""The least that every logger takes: a handful of scalars."""

from __future__ import annotations

from typing import Any

from lightning_gradflow.sinks.base import Sink, View, scalars


class ScalarSink(Sink):
    """Logs the scalars of each row to any Lightning logger, such as `CSVLogger`.

    Args:
        logger: a Lightning logger.
    """

    def __init__(self, logger: Any) -> None:
        self.name = type(logger).__name__
        self._logger = logger

    def on_row(self, view: View) -> None:
        """Logs one row."""
        found = scalars(view.history)
        if found:
            self._logger.log_metrics(found, step=view.step)
