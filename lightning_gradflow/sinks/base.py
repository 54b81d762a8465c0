"""What a sink is shown, and what it must be able to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.findings import Action, Finding
from lightning_gradflow.history import Floats, History


@dataclass(frozen=True)
class View:
    """The state of a run, as sinks show it.

    Args:
        history: all rows so far.
        findings: all findings so far, with what has become of them.
        actions: what the mitigator did.
        step: the step to log under (the x axis of the Trainer's own logging).
        progress: share of the planned steps that is done, in [0, 1]; NaN for a run without an end.
        model: class name of the LightningModule.
    """

    history: History
    findings: tuple[Finding, ...]
    actions: tuple[Action, ...]
    step: int
    progress: float
    model: str


class Sink:
    """Shows rows and findings. A method does nothing unless overridden; what it raises is caught by the recorder."""

    name: str = "sink"

    def on_row(self, view: View) -> None:
        """A row was added."""

    def on_finding(self, finding: Finding, view: View) -> None:
        """A finding was opened."""

    def on_action(self, action: Action, view: View) -> None:
        """The run was changed; called again, with its outcome, when the trial of the action has ended."""

    def on_end(self, view: View) -> None:
        """The fit is over, or died; called once."""


def scalars(history: History) -> dict[str, float]:
    """The handful of numbers of the newest row that every logger gets; what was not measured is left out.

    An empty history has none.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.append(Row(0, {"grad_norm": np.array([3.0, 4.0])}, {"grad_norm_total": 5.0}))
        >>> scalars(history)["gradflow/grad_norm_max"]
        4.0
    """
    if not history.rows:
        return {}
    row = history.rows[-1]
    found = {name: row.scalars.get(name, math.nan) for name in _SCALARS}
    for metric, statistics in _SUMMARIES.items():
        values = row.values.get(metric, np.empty(0))
        values = values[~np.isnan(values)]
        for suffix, statistic in statistics.items():
            found[metric + suffix] = float(statistic(values)) if values.size else math.nan
    profile = None if row.gradients_only else depth_profile(history)
    found["delta_span"] = profile.span if profile is not None else math.nan
    found["effective_depth"] = profile.effective_depth[0] if profile is not None else math.nan
    return {f"gradflow/{name}": value for name, value in found.items() if not math.isnan(value)}


def action_counts(actions: Iterable[Action]) -> dict[str, float]:
    """How many actions there were so far, and what has become of them; an outcome that never came is left out.

    Example:
        >>> action_counts([Action(1, "clip"), Action(9, "reinit", outcome="kept")])
        {'gradflow/actions': 2.0, 'gradflow/actions_kept': 1.0}
    """
    outcomes = Counter(action.outcome for action in actions)
    decided = {f"gradflow/actions_{name}": float(outcomes[name]) for name in ("kept", "rolled_back") if outcomes[name]}
    return {"gradflow/actions": float(outcomes.total()), **decided}


_SCALARS = ("grad_norm_total", "clip_factor", "clipped_fraction", "loss_scale", "step_skipped")
_SUMMARIES: dict[str, dict[str, Callable[[Floats], Any]]] = {
    "grad_norm": {"_max": np.max, "_median": np.median, "_min": np.min},
    "grad_zero_fraction": {"_max": np.max},
    "grad_nonfinite_fraction": {"_max": np.max},
    "update_ratio": {"_max": np.max, "_median": np.median},
    "saturated_fraction": {"_max": np.max},
    "dead_fraction": {"_max": np.max},
}

_SUMMARISED = tuple(metric + suffix for metric, statistics in _SUMMARIES.items() for suffix in statistics)
LOGGED = (*_SCALARS, *_SUMMARISED, "delta_span", "effective_depth")
"""Names of all that `scalars` may give, without `gradflow/`."""
