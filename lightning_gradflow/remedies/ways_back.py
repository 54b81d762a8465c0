"""What a run can go back to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_gradflow.detectors.inputs import inputs_jumped, offending_features
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import YOUNG, keeps_residual, steps_at_full_rate, steps_needed
from lightning_gradflow.detectors.unscaled_targets import were_offset
from lightning_gradflow.detectors.vanishing import vanished_before
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies.plan import OFF_TARGET, TOO_LARGE, UNTOUCHED
from lightning_gradflow.remedies.slowing import LARGEST_FACTOR, start_factor
from lightning_gradflow.remedies.snapshot import Snapshot
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.verdict import BROKEN, TOLERATED, length, level, loss_at

LEARNT = 0.1
"""Share of the loss: less is what the outputs of a blocked network gain by becoming a constant."""

_AS_MANY = 0.5  # dead units, of those that are dead now


class WaysBack:
    """Keeps the weights that a run started from, those with which it went well last, and those of the newest sample."""

    def __init__(self) -> None:
        self.learnt = False
        """Whether the run has learnt something."""
        self.good_step = -1
        """The step of the last good weights; -1 for those that it started from."""
        self.good: Snapshot | None = None
        """The last good weights."""
        self._start: Snapshot | None = None  # until something has been learnt
        self._start_step = 0
        self._birth: Snapshot | None = None  # the same for longer, for a run that may know no more than a constant
        self._newest: Snapshot | None = None
        self._newest_step = -1

    def begin(self, training: Training) -> None:
        """The fit starts."""
        self.good = Snapshot.take(training.model, training.optimizers)
        self._start, self._newest = None if self.learnt else self.good, None
        rows = training.history.rows
        self._start_step = rows[-1].step if rows else 0
        self.good_step = rows[-1].step if self.learnt and rows else -1

    def end(self) -> None:
        """Lets go of all."""
        self._start = self._birth = self.good = self._newest = None

    def drop_newest(self) -> None:
        """The newest weights are not good."""
        self._newest = None

    def stand_by(self, now: Snapshot, step: int) -> None:
        """The present weights are good."""
        self.good, self.good_step = now, step

    def stay(self, training: Training) -> None:
        """Nothing goes back behind what has helped."""
        self.good = Snapshot.take(training.model, training.optimizers)
        self._start, self._birth = None if self.learnt else self.good, None
        self._start_step = training.history.rows[-1].step
        self.good_step = training.history.rows[-1].step if self.learnt else -1

    def is_young(self, history: History) -> bool:
        """Whether the run had gone well for no more steps than a trial that fails and the pause after it cost."""
        return self.good_step <= length(history) + length(history) // 2

    def targets(self, finding: Finding, remedy: str, history: History) -> list[tuple[Snapshot | None, bool]]:
        """What a run that broke goes back to, and whether that is a state in which it went well; the best first.

        One that has learnt nothing starts anew: what a fault has left of its weights is no better than what they were.
        So does one whose inputs or targets were unscaled from the start: its weights fit no others; and one that knows
        no more than a constant as its weights were too large: the others have grown beside them. And so does one that
        is young and made large steps from the start: they have done harm before it showed. Where the finding tells
        which step did, and the last good weights are younger, these are no better. A young one that knows no more than
        a constant has nothing to lose: it starts anew if that can be done with smaller steps.
        """
        start = [(self._start, False)]
        origin = self._origin(finding, history)
        if origin is not None:
            return [(origin, False)]
        is_accident = finding.kind in BROKEN and finding.cause != "learning_rate_too_large"
        went_well = self.learnt or (is_accident and self.good_step >= 0)
        if self._start is None or not went_well:
            return [(self.good, True)] if went_well else start
        if remedy == "scale_inputs" and not inputs_jumped(history):
            return start
        is_young = not is_accident and self.is_young(history)
        is_fast = is_young and start_factor(history) <= LARGEST_FACTOR
        if remedy == "rollback" and (is_fast or self.came_before(finding, history)):
            return start
        knows_little = remedy == "rollback" and is_young and keeps_residual(history)
        return [*(start if knows_little else []), (self.good, True)]

    def leads_nowhere(self, finding: Finding, history: History) -> bool:
        """Whether the gradient vanished in all that there is to go back to as well."""
        is_vanishing = finding.kind is FindingKind.VANISHING_GRADIENT
        ways = {self._start_step, max(self.good_step, self._start_step)}
        return is_vanishing and all(_was_so(finding, history, step) for step in ways)

    def came_before(self, finding: Finding, history: History) -> bool:
        """Whether the harm was done before the last good weights.

        A run whose loss has come down from where large steps had thrown it counts as one that has learnt, while it
        knows no more than a constant.
        """
        if finding.evidence.get("largest_step", math.inf) <= self.good_step:
            return True
        return self.good_step >= 0 and keeps_residual(history) and _was_so(finding, history, self.good_step)

    def starts_anew(self, finding: Finding, history: History) -> bool:
        """Whether the run has learnt nothing but a constant, and what it started from is still there."""
        return self._origin(finding, history) is not None

    def _origin(self, finding: Finding, history: History) -> Snapshot | None:
        what = (finding.kind, finding.cause)
        if what == OFF_TARGET or (what == TOO_LARGE and keeps_residual(history)):
            return self._start or self._birth
        return self._start if what == UNTOUCHED else None

    def keep(self, said: Sequence[Finding], training: Training) -> None:
        """Remembers the present weights of a run that is well; they count as good when the next sample is well too."""
        history = training.history
        if any(f.severity.is_alarm for f in said) or not self._is_well(history):
            self._newest = None
            return
        if self._newest is not None:
            self.good, self.good_step = self._newest, self._newest_step
            is_slow = start_factor(history) > LARGEST_FACTOR
            if self.learnt and is_slow and not self.is_young(history) and not offending_features(history):
                knows_little = were_offset(history) or (keeps_residual(history) and _may_be_told(history))
                self._birth = (self._birth or self._start) if knows_little else None
                self._start = None
        self._newest = Snapshot.take(training.model, training.optimizers)
        self._newest_step = history.rows[-1].step

    def _is_well(self, history: History) -> bool:
        """Whether the run has learnt, or has at least gone on for as long as a trial lasts without getting worse."""
        if has_learnt(history, LEARNT):
            return True
        if self.learnt or history.rows[-1].step < length(history):
            return False
        losses = history.losses[np.isfinite(history.losses)]
        start, now = loss_at(history, -1), level(losses[-max(3, min(20, len(losses) // 3)) :])
        return now <= start + TOLERATED * abs(start)


def _may_be_told(history: History) -> bool:
    """Whether weights that were too large from the start may still be told."""
    return steps_at_full_rate(history) <= YOUNG * steps_needed(history)


def _was_so(finding: Finding, history: History, step: int) -> bool:
    """Whether the gradient vanished at a step as it does now, or as many units were dead, but for half of them."""
    row = min(int(np.searchsorted(history.steps, step)), len(history) - 1)
    if finding.kind is FindingKind.VANISHING_GRADIENT:
        return vanished_before(history, row)
    dead = history["dead_fraction"][[row, -1]]
    is_known = ~np.isnan(dead).all(axis=1)
    if finding.kind is not FindingKind.DEAD_UNITS or not is_known.all():
        return False
    then, now = np.nanmax(dead, axis=1)
    return bool(then >= _AS_MANY * now)
