"""TensorBoard: scalars, the heatmap, two histograms, and findings and actions as text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_gradflow.figures import heatmap
from lightning_gradflow.findings import Action, Finding
from lightning_gradflow.history import Ints
from lightning_gradflow.metrics import HISTOGRAM_BINS, HISTOGRAMS, MIN_EXPONENT
from lightning_gradflow.sinks import words
from lightning_gradflow.sinks.base import Sink, View, action_counts, scalars
from lightning_gradflow.sinks.pace import Pace


class TensorBoardSink(Sink):
    """Logs scalars and histograms at each row, the heatmap ten times a run at most, findings and actions as they come.

    Args:
        logger: Lightning's `TensorBoardLogger`.
        now: tells the time in seconds, for the pace of the heatmap.
    """

    name = "TensorBoard"

    def __init__(self, logger: Any, now: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._pace = Pace(now)

    def on_row(self, view: View) -> None:
        """Logs one row."""
        found = scalars(view.history)
        if found:
            self._logger.log_metrics(found, step=view.step)
        for name in HISTOGRAMS:
            counts = view.history.rows[-1].histograms.get(name)
            if counts is not None and counts[:HISTOGRAM_BINS].any():
                self._log_histogram(f"gradflow/{name}", counts[:HISTOGRAM_BINS], view.step)
        if self._pace.is_due(view):
            with self._pace.drawing():
                self._log_heatmap(view)

    def on_finding(self, finding: Finding, view: View) -> None:
        """Writes the finding with what to do, as Markdown."""
        self._logger.experiment.add_text("gradflow/findings", markdown(finding), global_step=view.step)

    def on_action(self, action: Action, view: View) -> None:
        """Writes what was changed, or what has become of it, and logs the counts of actions."""
        self._logger.log_metrics(action_counts(view.actions), step=view.step)
        text = _plain(words.action_line(action))
        self._logger.experiment.add_text("gradflow/actions", text, global_step=view.step)

    def on_end(self, view: View) -> None:
        """Writes the verdict and the last heatmap."""
        if self._pace.is_due_at_end:
            self._log_heatmap(view)
        self._logger.experiment.add_text("gradflow/verdict", _plain(words.verdict(view)), global_step=view.step)

    def _log_heatmap(self, view: View) -> None:
        pixels = heatmap(view.history, actions=view.actions)
        self._logger.experiment.add_image("gradflow/heatmap", pixels, global_step=view.step, dataformats="HWC")

    def _log_histogram(self, tag: str, counts: Ints, step: int) -> None:
        """Logs counts of log2 |gradient entry|; an entry of exponent e lies in [e, e + 1), so its middle is e + 1/2."""
        lower = np.arange(MIN_EXPONENT, MIN_EXPONENT + HISTOGRAM_BINS, dtype=np.float64)
        filled = np.flatnonzero(counts)
        self._logger.experiment.add_histogram_raw(
            tag,
            min=float(lower[filled[0]]),
            max=float(lower[filled[-1]] + 1),
            num=int(counts.sum()),
            sum=float(counts @ (lower + 0.5)),
            sum_squares=float(counts @ (lower + 0.5) ** 2),
            bucket_limits=(lower + 1).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def markdown(finding: Finding) -> str:
    """A finding with what to do, as Markdown."""
    blocks = [
        f"**{words.kind(finding)}** ({finding.severity.value}, step {finding.step})",
        _plain(words.message(finding)),
    ]
    for suggestion in finding.suggestions:
        blocks.append(f"**{_plain(suggestion.title)}** {_plain(suggestion.reason)}")
        blocks += [f"```python\n{suggestion.code}\n```"] if suggestion.code else []
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Text in which `blocks.__init__` or `a*b` stays as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_<>[]" else letter for letter in text)
