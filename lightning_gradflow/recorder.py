"""Rows go in; findings come out, are told once, and are shown by the sinks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_gradflow import advice
from lightning_gradflow.border import Border, warn
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.findings import WARNINGS, Action, Finding, FindingKind, Ledger, Suggestion
from lightning_gradflow.history import Floats, History, Row
from lightning_gradflow.metrics import METRICS
from lightning_gradflow.sinks.base import Sink, View

_JUDGED_BY = {
    FindingKind.VANISHING_GRADIENT: ("delta_norm", "grad_norm"),
    FindingKind.EXPLODING_GRADIENT: ("delta_norm", "grad_norm"),
    FindingKind.DEAD_UNITS: ("dead_fraction", "unit_spread", "matrix_spread"),
    FindingKind.SATURATED_ACTIVATION: ("saturated_fraction",),
}
_ONCE = "softmax_gap"  # is measured for as long as it is large
_MAX_WARNINGS = 20  # per run: whoever has not looked by then is not helped by more


class Recorder:
    """What the callbacks of one Trainer share: history, detectors, ledger and sinks.

    Args:
        detectors: judge the history after each row; one that raises is switched off.
        border: catches the errors.
        suggest: whether findings carry suggestions.
        model: class name of the model, for the sinks.

    Example:
        >>> recorder = Recorder([], Border())
        >>> recorder.add(Row(step=0, scalars={"loss": 2.3}), step=0)
        []
        >>> recorder.history.steps
        array([0])
    """

    def __init__(
        self, detectors: Sequence[Detector], border: Border, *, suggest: bool = True, model: str = "model"
    ) -> None:
        self.history = History()
        self._judged: History | None = None  # without the rows that nobody can be judged by, where there are such
        self._losses: list[Floats] = []  # that came with those since the last other one
        self._val_loss: float | None = None  # the newest of them
        self.ledger = Ledger()
        self.actions: list[Action] = []
        self.sinks: list[Sink] = []
        self.tells = True
        self.is_treated = False  # the run, where it is found to be sick
        self.holds: Callable[[Finding], bool] = lambda _: False
        """Whether a new finding waits, because more is about to be known of it."""
        names = _numbered(f"detector {type(detector).__name__}" for detector in detectors)
        self._named_detectors = tuple(zip(names, detectors, strict=True))
        self._border = border
        self._suggest = suggest
        self.model = model
        self.said: tuple[Finding, ...] = ()
        """What is wrong at the newest row, whether or not it is news."""
        self._step = 0
        self._progress = float("nan")
        self._warned = 0
        self._ended = False

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings that were ever opened, in order."""
        return self.ledger.findings

    @property
    def judged(self) -> History:
        """The rows that findings come from: all but those that hold nothing but the size of the gradients."""
        return self.history if self._judged is None else self._judged

    @property
    def view(self) -> View:
        """What there is to see now."""
        return View(
            self.judged if self.judged.rows else self.history,
            self.findings,
            tuple(self.actions),
            self._step,
            self._progress,
            self.model,
        )

    def expect_gradients_only(self) -> None:
        """Rows are about to come that hold nothing but the size of the gradients; before, all are judged by."""
        if self._judged is None:
            self._judged = self._beside(self.history.state_dict())

    def _beside(self, state: Mapping[str, Any]) -> History:
        """A history out of a state, with the names of the one that holds all rows."""
        history = History()
        history.load_state_dict(state)
        history.share_names(self.history)
        return history

    def add(self, row: Row, step: int, progress: float = float("nan")) -> list[Finding]:
        """Takes the newest row, judges, and shows what came of it.

        Args:
            row: one sampled step.
            step: the step to log it under.
            progress: share of the planned steps that is done, in [0, 1], or NaN.

        Returns:
            The findings that were opened by it, most severe first.
        """
        self._step, self._progress, self._ended = step, progress, False
        is_judged = self._append(row)
        opened = self._open(is_sample=True) if is_judged else []
        view = self.view if is_judged else replace(self.view, history=self.history)
        for part, sink in self._named_sinks():
            self._show(part, sink, "on_row", view)
        self._tell(opened)
        return opened

    def _append(self, row: Row) -> bool:
        """Whether the row is one to be judged by: of gradients alone only one in which they are not finite is."""
        self.history.append(row)
        if self._judged is None:
            return True
        self._losses.append(row.losses)
        if row.gradients_only and not np.any(row.values.get("grad_nonfinite_fraction", np.empty(0)) > 0):
            self._val_loss = row.scalars.get("val_loss", self._val_loss)
            return False
        scalars = {"val_loss": self._val_loss} if self._val_loss is not None else {}
        self._judged.append(replace(row, losses=np.concatenate(self._losses), scalars={**scalars, **row.scalars}))
        self._losses, self._val_loss = [], None
        return True

    def act(self, actions: Sequence[Action], action: Action) -> None:
        """Shows an action that was taken, or decided about.

        Args:
            actions: all that there were, in order.
            action: the one that is new, or was decided about.
        """
        self.actions = list(actions)
        if action.outcome == "kept":
            self.ledger.amend(lambda suggestion: advice.with_rate_of(suggestion, action))
        for part, sink in self._named_sinks():
            self._show(part, sink, "on_action", action, self.view)

    def close(self, step: int, losses: Floats, val_loss: float, progress: float) -> None:
        """Takes the losses that came after the newest row, and judges once more: a plateau is in them.

        Args:
            step: the last step.
            losses: (n,) training loss of each step since the newest row.
            val_loss: the last validation loss, or NaN.
            progress: share of the planned steps that is done, in [0, 1], or NaN.
        """
        self.history.close(step, losses, val_loss)
        if self._judged is not None:
            pending = self._val_loss if math.isnan(val_loss) and self._val_loss is not None else val_loss
            self._judged.close(step, np.concatenate([*self._losses, losses]), pending)
            self._losses, self._val_loss = [], None
        if self.judged.rows:
            self._progress = progress
            self._tell(self._open(is_sample=False))

    def _open(self, *, is_sample: bool) -> list[Finding]:
        said = [finding for part, detector in self._named_detectors for finding in self._judge(part, detector)]
        if is_sample:
            said = [finding for finding in said if not (self.ledger.is_news(finding) and self.holds(finding))]
        found = consolidate(said, self.ledger.open)
        self.said = tuple(found)
        told = [self._explain(finding) if self.ledger.is_news(finding) else finding for finding in found]
        return self.ledger.update(self.judged.rows[-1].step, told, is_sample, self._was_seen)

    def _was_seen(self, finding: Finding) -> bool:
        """Whether the newest row measured, in a layer of the finding, what it is judged by."""
        metrics = _JUDGED_BY.get(finding.kind)
        if metrics is None or not finding.layers or _ONCE in finding.evidence:
            return True
        seen: set[str] = set()
        for metric in metrics:
            values = self.judged.rows[-1].values.get(metric, np.empty(0))
            axis = self.history.layer_axis if METRICS[metric].axis == "layers" else self.history.point_axis
            measured = {name for name in axis.names if _is_finite(values, axis.identity(name))}
            seen |= measured if METRICS[metric].axis == "layers" else self._modules(measured)
        return bool(seen & set(finding.layers))

    def _modules(self, points: set[str]) -> set[str]:
        return {point.module for point in self.history.points if point.name in points}

    def _tell(self, opened: Sequence[Finding]) -> None:
        for part, sink in self._named_sinks():
            for finding in opened:
                self._show(part, sink, "on_finding", finding, self.view)
        self._warn(opened)

    def end(self) -> None:
        """The fit is over, or died: the sinks show the whole, once."""
        if self._ended or not self.history.rows:
            return
        self._ended = True
        for part, sink in self._named_sinks():
            self._show(part, sink, "on_end", self.view)

    def _named_sinks(self) -> Iterator[tuple[str, Sink]]:
        return zip(_numbered(f"output to {sink.name}" for sink in self.sinks), self.sinks, strict=True)

    def _judge(self, part: str, detector: Detector) -> list[Finding]:
        empty: list[Finding] = []
        return self._border.run(part, detector.judge, self.judged, default=empty)

    def _explain(self, finding: Finding) -> Finding:
        none: tuple[Suggestion, ...] = ()
        suggestions = none
        if self._suggest:
            suggestions = self._border.run(
                "advice", advice.suggest, finding, self.judged, self.is_treated, default=none
            )
        return replace(finding, message=advice.explain(finding), suggestions=suggestions)

    def _show(self, part: str, sink: Sink, hook: str, *args: Any) -> None:
        self._border.run(part, getattr(sink, hook), *args, default=None)

    def _warn(self, opened: Sequence[Finding]) -> None:
        for finding in opened:
            if self.tells and finding.severity.is_alarm and self._warned < _MAX_WARNINGS:
                self._warned += 1
                text = f"step {finding.step}: {finding.message}"
                if finding.suggestions:
                    text += f" What to do: {finding.suggestions[0].title}."
                warn(text, WARNINGS[finding.kind])

    def state_dict(self) -> dict[str, Any]:
        """History, findings and actions, so that a resumed run continues them."""
        return {
            "history": self.history.state_dict(),
            "judged": self._judged.state_dict() if self._judged is not None else None,
            "losses": [losses.tolist() for losses in self._losses],
            "val_loss": self._val_loss,
            "ledger": self.ledger.state_dict(),
            "actions": [action.to_dict() for action in self.actions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self.history.load_state_dict(state["history"])
        self._judged = self._beside(state["judged"]) if state["judged"] is not None else None
        self._losses = [np.array(losses, dtype=np.float64) for losses in state["losses"]]
        self._val_loss = state["val_loss"]
        self.ledger.load_state_dict(state["ledger"])
        self.actions = [Action.from_dict(action) for action in state["actions"]]


def _is_finite(values: Floats, at: int) -> bool:
    return at < len(values) and bool(np.isfinite(values[at]))


def _numbered(names: Iterable[str]) -> list[str]:
    """The names that the border knows the parts by: of namesakes the second and later ones get a number."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return numbered
