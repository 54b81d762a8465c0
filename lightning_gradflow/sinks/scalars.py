"""The least that every logger takes: a handful of scalars."""

from __future__ import annotations

from typing import Any

from lightning_gradflow.findings import Action
from lightning_gradflow.sinks.base import Sink, View, action_counts, scalars


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

    def on_action(self, action: Action, view: View) -> None:  # noqa: ARG002
        """Logs how many actions there were so far, and how many were kept or taken back."""
        self._logger.log_metrics(action_counts(view.actions), step=view.step)
