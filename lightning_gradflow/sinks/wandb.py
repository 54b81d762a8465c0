"""Weights & Biases: the heatmap, the layers as one histogram, a few scalars, alerts, findings and actions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_gradflow.figures import heatmap
from lightning_gradflow.findings import Action, Finding
from lightning_gradflow.history import Floats, Ints
from lightning_gradflow.metrics import HISTOGRAM_BINS, HISTOGRAMS, MIN_EXPONENT
from lightning_gradflow.sinks import words
from lightning_gradflow.sinks.base import Sink, View, action_counts, scalars
from lightning_gradflow.sinks.pace import Pace
from lightning_gradflow.sinks.report import page

MAX_ALERTS = 20
MAX_BINS = 80
"""More layers are merged, and the largest norm is shown: so a row stays below 3 kB. (W&B itself takes 512 bins.)"""
LOWEST_DECADE = -12
"""Gradient norms below 1e-12 count as 1, the least count above nothing."""
MAX_COUNT = 240
"""The count of a norm that is not finite; 1e12 and above stay one below it."""
_ENCODING = (
    "gradflow/layers: bin i is the layer `layers[i * layers_per_bin]` of this list (with the next ones merged in, if "
    "layers_per_bin > 1); its count is 10 * (log10(grad_norm) + 12), so 10 counts are a decade, 120 is a norm of 1, "
    "1 is 1e-12 or less, 240 is not finite, and 0 is exactly zero or not measured."
)
_ALERT_LEVELS = {"warning": "WARN", "critical": "ERROR"}
_COLUMNS: list[str | int] = ["kind", "severity", "step", "resolved_step", "layers", "cause", "message", "suggestions"]
_ACTION_COLUMNS: list[str | int] = ["step", "kind", "layers", "reason", "numbers", "outcome", "decided_step"]


class WandbSink(Sink):
    """A row of W&B's table for each row of the history, at most 20 alerts, and findings and actions at the end.

    Args:
        logger: Lightning's `WandbLogger`.
        now: tells the time in seconds, for the pace of the heatmap.
    """

    name = "W&B"

    def __init__(self, logger: Any, now: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._pace = Pace(now)
        self._layers: list[str] = []
        self._configured = 0
        self._alerts = 0

    def on_row(self, view: View) -> None:
        """Logs scalars, histograms and at times the heatmap, as one row."""
        if not self._configured:
            self._logger.experiment.define_metric("gradflow/*", step_metric="trainer/global_step")
        found: dict[str, Any] = dict(scalars(view.history))
        found.update(self._layer_histogram(view))
        for name in HISTOGRAMS:
            found.update(_exponents(f"gradflow/{name}", view.history.rows[-1].histograms.get(name)))
        if self._pace.is_due(view):
            with self._pace.drawing():
                found["gradflow/heatmap"] = self._image(view)
                self._logger.log_metrics(found, step=view.step)
        elif found:
            self._logger.log_metrics(found, step=view.step)

    def on_finding(self, finding: Finding, view: View) -> None:  # noqa: ARG002
        """Sends an alert for a warning or worse."""
        if not finding.severity.is_alarm:
            return
        text = words.message(finding)
        if finding.suggestions:
            text += f"\n\nWhat to do: {finding.suggestions[0].title}"
        self._alert(f"{words.kind(finding)} at step {finding.step}", text, _ALERT_LEVELS[finding.severity.value])

    def on_action(self, action: Action, view: View) -> None:
        """Sends an alert of what was changed, or of what has become of it, and logs the counts as a row."""
        counts = action_counts(view.actions)
        # at the end this key is a table, and W&B takes one type for a key
        counts["gradflow/actions_taken"] = counts.pop("gradflow/actions")
        self._logger.log_metrics(counts, step=view.step)
        when = f"step {action.step}" if action.decided_step is None else f"step {action.decided_step}"
        self._alert(f"Action at {when}: {words.outcome_of(action)}", words.action_line(action), "INFO")

    def _alert(self, title: str, text: str, level: str) -> None:
        """The service limits how often a title may come: with the step in it, each has its own."""
        if self._alerts < MAX_ALERTS:
            self._alerts += 1
            self._logger.experiment.alert(title=title, text=text, level=level)

    def on_end(self, view: View) -> None:
        """Logs findings and actions as tables, the report without its figures, and the last heatmap, as one row."""
        import wandb

        found: dict[str, Any] = {
            "gradflow/findings": wandb.Table(columns=_COLUMNS, data=[_cells(finding) for finding in view.findings]),
            # The figures need 5 MB of plotly.js, and W&B shows the numbers behind them already.
            "gradflow/report": wandb.Html(page(view, figures=False), inject=False),
        }
        if view.actions:
            cells = [_action_cells(action) for action in view.actions]
            found["gradflow/actions"] = wandb.Table(columns=_ACTION_COLUMNS, data=cells)
        if self._pace.is_due_at_end:
            found["gradflow/heatmap"] = self._image(view)
        self._logger.log_metrics(found, step=view.step)

    def _image(self, view: View) -> Any:
        import wandb

        return wandb.Image(heatmap(view.history, actions=view.actions))

    def _layer_histogram(self, view: View) -> dict[str, Any]:
        """A histogram whose bins are layers: W&B draws its history as a heatmap, for 1 kB a row at most."""
        import wandb

        values = view.history.rows[-1].values.get("grad_norm")
        if values is None:
            return {}
        axis = view.history.layer_axis
        # An index must mean one layer for the whole run: layers that are discovered later come last.
        known = set(self._layers)
        self._layers += [name for name in axis.names if name not in known]
        norms = np.full(len(self._layers), np.nan)
        for index, name in enumerate(self._layers):
            identity = axis.identity(name)
            norms[index] = values[identity] if identity < len(values) else np.nan
        if not len(norms):
            return {}
        per_bin = -(-len(norms) // MAX_BINS)
        self._configure(per_bin)
        counts = np.maximum.reduceat(layer_counts(norms), np.arange(0, len(norms), per_bin))
        return {"gradflow/layers": wandb.Histogram(np_histogram=(counts, np.arange(len(counts) + 1)))}

    def _configure(self, per_bin: int) -> None:
        """Says in the run's config which bin is which layer, and again when layers were added."""
        if len(self._layers) == self._configured:
            return
        self._configured = len(self._layers)
        config: Any = getattr(self._logger.experiment, "config", None)
        if hasattr(config, "update"):  # not so on the stand-in that Lightning gives to other ranks
            about = {"layers": list(self._layers), "layers_per_bin": per_bin, "encoding": _ENCODING}
            config.update({"gradflow": about}, allow_val_change=True)


def _exponents(key: str, counts: Ints | None) -> dict[str, Any]:
    """The exponents of gradient entries as a histogram, from the lowest to the highest that occurs."""
    import wandb

    filled = np.flatnonzero(counts[:HISTOGRAM_BINS]) if counts is not None else np.empty(0, dtype=np.int64)
    if counts is None or not filled.size:
        return {}
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = np.arange(MIN_EXPONENT + first, MIN_EXPONENT + last + 1)
    return {key: wandb.Histogram(np_histogram=(counts[first:last], edges))}


def layer_counts(norms: Floats) -> Ints:
    """Gradient norms as the whole counts that a histogram takes: ten to the decade, from 1e-12 up.

    The scale is the same for all runs, so that two of them can be compared in one panel.

    Args:
        norms: (L,) gradient norms, not negative.

    Returns:
        (L,) `10 * (log10(norm) + 12)` in [1, 239]; 240 where not finite; 0 where zero or not measured.

    Example:
        >>> layer_counts(np.array([1.0, 1e-3, 1e-30, 0.0, np.nan, np.inf])).tolist()
        [120, 90, 1, 0, 0, 240]
    """
    usable = np.isfinite(norms) & (norms > 0)
    logs = np.log10(np.where(usable, norms, 1.0))
    counts = np.clip(np.round(10 * (logs - LOWEST_DECADE)), 1, MAX_COUNT - 1)
    return np.where(usable, counts, np.where(np.isinf(norms), MAX_COUNT, 0)).astype(np.int64)


def _cells(finding: Finding) -> list[Any]:
    return [
        finding.kind.value,
        finding.severity.value,
        finding.step,
        finding.resolved_step,
        ", ".join(finding.layers),
        finding.cause,
        finding.message,
        "\n\n".join(f"{s.title}\n{s.code}".strip() for s in finding.suggestions),
    ]


def _action_cells(action: Action) -> list[Any]:
    return [
        action.step,
        action.kind,
        ", ".join(action.layers),
        action.reason,
        words.changes(action),
        words.outcome_of(action),
        action.decided_step,
    ]
