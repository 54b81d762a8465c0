"""Made-up runs: what sinks and figures are shown in tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_gradflow.findings import Action, Finding, FindingKind, Severity, Suggestion
from lightning_gradflow.history import Floats, History, Point, Row
from lightning_gradflow.metrics import HISTOGRAM_BINS
from lightning_gradflow.sinks.base import View


def empty_history(layers: int, name: str = "net.{}") -> History:
    """A stack of linear layers with a sigmoid between any two, before its first row."""
    history = History()
    names = [name.format(2 * i) for i in range(layers)]
    points = []
    for i, layer in enumerate(names):
        points.append(Point(layer, layer))
        if i < layers - 1:
            points.append(Point(f"{name.format(2 * i + 1)}.sigmoid", name.format(2 * i + 1), "sigmoid"))
    history.layer_axis.merge(names)
    history.add_points(points)
    return history


def row(step: int, layers: int, grad_norm: Floats | None = None) -> Row:
    """A step of a run whose signal loses a decade at each layer."""
    n = 2 * layers - 1
    decay = 10.0 ** -np.arange(n)[::-1]
    is_activation = np.arange(n) % 2 == 1
    early, late = np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64), np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
    early[20:25], early[HISTOGRAM_BINS] = 100, 7
    late[50:55] = 100
    return Row(
        step,
        values={
            "grad_norm": 10.0 ** -np.arange(layers)[::-1] if grad_norm is None else grad_norm,
            "delta_norm": decay,
            "saturated_fraction": np.where(is_activation, 0.5, np.nan),
            "dead_fraction": np.where(is_activation, 0.25, np.nan),
            "grad_zero_fraction": np.zeros(layers),
            "grad_nonfinite_fraction": np.zeros(layers),
        },
        scalars={"loss": 2.3, "grad_norm_total": 1.5},
        histograms={"grad_hist_early": early, "grad_hist_late": late},
        losses=np.array([2.4, 2.3]),
    )


def history(rows: int = 5, layers: int = 4, name: str = "net.{}") -> History:
    """Such a run, sampled every tenth step."""
    made = empty_history(layers, name)
    for i in range(rows):
        made.append(row(10 * i, layers))
    return made


def gradients(*rows: list[float]) -> History:
    """A history of nothing but gradient norms: a list for each step, first layer first."""
    made = History()
    made.layer_axis.merge([f"fc{i}" for i in range(len(rows[0]) if rows else 0)])
    for step, values in enumerate(rows):
        made.append(Row(step, {"grad_norm": np.array(values)}))
    return made


def finding(
    severity: Severity = Severity.CRITICAL,
    kind: FindingKind = FindingKind.VANISHING_GRADIENT,
    resolved_step: int | None = None,
    message: str = "The signal dies on its way to net.0. Three sigmoids shrink it.",
    layers: tuple[str, ...] = ("net.0", "net.2"),
) -> Finding:
    """A finding with one suggestion."""
    suggestion = Suggestion("Use ReLU", "model.net[1] = nn.ReLU()", "Its slope is 1.", "Glorot 2011")
    evidence = {"span": -6.0}
    return Finding(kind, severity, 10, layers, "saturation", message, evidence, (suggestion,), resolved_step)


def view(
    shown: History | None = None,
    findings: tuple[Finding, ...] = (),
    actions: tuple[Action, ...] = (),
    progress: float = 0.5,
) -> View:
    """The view of a made-up run."""
    shown = history() if shown is None else shown
    return View(shown, findings, actions, int(shown.steps[-1]) if len(shown) else 0, progress, "Net")


ACTIONS = (
    Action(10, "reinit", ("net.0", "net.2"), "vanishing gradient, saturation", {"span": -8.1}, {"span": -0.3}),
    Action(10, "clip", (), "exploding gradient", {"grad_norm_total": 1e9}, {"max_norm": 2.5}),
)
"""Two actions as they are taken."""

DECIDED = (
    replace(ACTIONS[0], before={"span": -8.1, "loss": 2.31}, after={"span": -0.3, "loss": 1.02}, outcome="kept"),
    replace(ACTIONS[1], outcome="rolled_back"),
)
DECIDED = tuple(replace(action, decided_step=30) for action in DECIDED)
"""The same when their trials have ended: one was kept, the other taken back."""


def replay(
    sink,
    rows: int,
    layers: int = 4,
    progress=lambda done: done,
    findings: tuple[Finding, ...] = (),
    actions: tuple[Action, ...] = (),
) -> None:
    """Shows a sink a run row by row, to the end.

    The findings open at the second row. With `actions`, they are `ACTIONS`: taken at the second row, and decided at
    the fourth.
    """
    made = empty_history(layers)
    for i in range(rows):
        made.append(row(10 * i, layers))
        sink.on_row(view(made, findings if i else (), progress=progress((i + 1) / rows)))
        for opened in findings if i == 1 else ():
            sink.on_finding(opened, view(made, findings))
        if actions and i in (1, 3):
            now = actions if i == 1 else DECIDED
            for k, action in enumerate(now):
                # those that come later have not been taken, or not been decided, when the sink hears of this one
                sink.on_action(action, view(made, findings, now[: k + 1] + (() if i == 1 else actions[k + 1 :])))
    sink.on_end(view(made, findings, DECIDED if actions else (), progress=1.0))


class Hours:
    """A clock by which there is time for every picture: an hour goes by at each row, and none while one is drawn."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def row(self, done: float) -> float:
        """The progress of a row, as `replay` asks for it."""
        self.seconds += 3600
        return done
