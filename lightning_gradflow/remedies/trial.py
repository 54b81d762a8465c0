"""The loop of a cure: one remedy at a time, on trial, kept if it helped and taken back if not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.detectors.inputs import inputs_jumped, offending_features
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Action, Finding, FindingKind
from lightning_gradflow.history import Floats, History
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.plan import DESTRUCTIVE, remedies_for
from lightning_gradflow.remedies.snapshot import Snapshot, is_finite
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.treatments import LARGEST_FACTOR, Patient, Treatment, start_factor, treat

_SHARE = 0.1  # of the planned steps that a trial lasts
_SHORTEST, _LONGEST = 16, 200  # steps of a trial: one that is judged on few losses is judged on noise
_LEARNT = 0.1  # share of the loss: less is what the outputs of a blocked network gain by becoming a constant
_FIRST_STEPS = 10  # in which nothing is learnt that is worth more than a better start
_LONGER = 3  # times as long, while the fault is gone and the loss still falls
_UNKNOWN_LENGTH = 50  # steps of a trial where nobody knows how long the run will be
_TOLERATED = 0.1  # share of the loss by which it may be higher after a trial that took the fault away
_FAR = 9.0  # share of the loss by which a trial that is not over yet has failed, if it does not fall from there
_FEWEST = 5  # losses, to say so
_CLEAR = 2.0  # standard deviations of a difference that is no chance

_BROKEN = (FindingKind.NONFINITE_GRADIENT,)


@dataclass(frozen=True)
class Decision:
    """What is to be done between two optimizer steps.

    Args:
        what: `act`, `keep` or `roll_back`.
        remedies: for `act`, those that fit, in the order in which they are tried.
        finding: for `act`, what is to be cured.
        loss: where the loss stands.
    """

    what: str
    remedies: tuple[str, ...] = ()
    finding: Finding | None = None
    loss: float = math.nan

    @property
    def words(self) -> str:
        """The same on two ranks that have decided the same."""
        finding = self.finding
        about = (str(finding.kind), finding.cause, finding.layers) if finding is not None else ()
        return repr((self.what, self.remedies, about))


@dataclass(frozen=True)
class _Trial:
    index: int
    remedy: str
    finding: Finding
    step: int
    loss: float
    held: Mapping[str, Any]
    back: Snapshot | None = None


class Mitigation:
    """Treats what is found, in the run, and proves that it helped.

    A finding of warning or above gets the first remedy that fits its cause (see `plan.PLAN`). Weights, optimizer states
    and the remedies in force are kept before it acts. After a tenth of the planned steps, 16 to 200, it is kept if the
    alarm is gone and the loss is not higher, or if the loss has clearly fallen; if not, or as soon as the loss is not
    finite, or ten times as high and not falling, all is put back, and after a pause of half as long the next remedy is
    tried.

    Weights are overwritten only while the loss stands where it began or has come back to it, and before `max_progress`
    of the run is over. A run that has learnt and broke goes back to its last good weights first; to its start, where
    its inputs were unscaled from there on, or where it is young and its first steps were too large.

    Args:
        allow: remedies that may be used, out of `plan.REMEDIES`.
        max_actions: actions in a run at most.
        max_progress: share of the planned steps after which no weights are overwritten, in (0, 1].
    """

    def __init__(self, allow: Sequence[str], max_actions: int, max_progress: float = 0.75) -> None:
        self._allow = frozenset(allow)
        self._max_actions = max_actions
        self._max_progress = max_progress
        self._held: Held | None = None
        self._state: Mapping[str, Any] = {}
        self._trial: _Trial | None = None
        self._tried: set[tuple[str, str]] = set()
        self._pause_until = -1
        self._start: Snapshot | None = None  # until something has been learnt
        self._good: Snapshot | None = None
        self._newest: Snapshot | None = None
        self._good_step = self._newest_step = -1
        self._before: tuple[Snapshot, Mapping[str, Any], int] | None = None
        self._learnt = False
        self.forbidden = ""
        """What could not be done because it is not allowed."""
        self.actions: list[Action] = []
        """All that was done, in order."""

    # -- in the course of a fit -----------------------------------------------------------------------------------

    def start(self, training: Training) -> None:
        """The fit starts: what it starts from can be gone back to, and what was in force is so again."""
        self._held = Held(training)
        if self._state:
            self._held.load_state_dict(self._state)
        if self._max_actions:
            self._good = Snapshot.take(training.model, training.optimizers)
            self._start, self._newest = None if self._learnt else self._good, None
            rows = training.history.rows
            self._good_step = rows[-1].step if self._learnt and rows else -1

    @property
    def changes_gradients(self) -> bool:
        """Whether a remedy is in force that has something to do before an optimizer steps."""
        return self._held is not None and (self._held.clipper is not None or bool(self._held.scaling.layers))

    def before_step(self, optimizer: torch.optim.Optimizer, scale: Tensor | None = None) -> None:
        """The gradients of an optimizer are complete; see `Held.before_step`."""
        if self._held is not None:
            self._held.before_step(optimizer, scale)

    def batch_end(self) -> None:
        """A batch is over."""
        if self._held is not None:
            self._held.batch_end()

    def end(self) -> None:
        """The fit is over: all hooks are taken off."""
        if self._held is not None:
            self._state = self._held.state_dict()
            self._held.release()
        self._held = self._start = self._good = self._newest = self._before = None
        if self._trial is not None:
            self._trial = replace(self._trial, back=None)

    @property
    def clipping_advice(self) -> str:
        """What to do where more than half of the steps are clipped; else nothing. Reads from the device."""
        clipper = self._held.clipper if self._held is not None else None
        return clipper.advice() if clipper is not None else ""

    # -- what to do -------------------------------------------------------------------------------------------------

    def decide(self, said: Sequence[Finding], history: History, progress: float) -> Decision | None:
        """What to do after the newest row; the same on all ranks.

        Args:
            said: what is wrong at this row.
            history: what was measured.
            progress: share of the planned steps that is done, in [0, 1], or NaN.
        """
        self._before = None
        alarms = sorted((f for f in said if f.severity.is_alarm), key=lambda f: -f.severity.rank)
        step = history.rows[-1].step
        if self._trial is not None:
            return self._verdict(self._trial, alarms, history)
        self._learnt |= not alarms and has_learnt(history, _LEARNT)
        if step < self._pause_until or len(self.actions) >= self._max_actions:
            return None
        for finding in alarms:
            remedies = tuple(r for r in self._fitting(finding) if self._may(r, finding, history, progress))
            if remedies:
                return Decision("act", remedies, finding, _loss_at(history, self._good_step))
            forbidden = [r for r in self._fitting(finding) if r not in self._allow]
            if forbidden and not self.forbidden:
                self.forbidden = (
                    f"{finding.kind.replace('_', ' ')} was found, and nothing was changed: {' or '.join(forbidden)} "
                    "would fit, and may not be used (allow)."
                )
        return None

    def _fitting(self, finding: Finding) -> tuple[str, ...]:
        fitting = remedies_for(finding.kind, finding.cause, has_learnt=self._learnt)
        if self._held is None or not self._held.rollbacks:
            return fitting
        # to go back once more is the last resort
        return tuple(sorted(fitting, key=lambda remedy: remedy == "rollback"))

    def _may(self, remedy: str, finding: Finding, history: History, progress: float) -> bool:
        if remedy not in self._allow or (str(finding.kind), remedy) in self._tried:
            return False
        if remedy == "clip" and self._held is not None and self._held.clipper is not None:
            return False
        if remedy in DESTRUCTIVE and progress > self._max_progress:
            return False
        if remedy == "scale_inputs" and self._is_late(history):
            return False
        # a loss that comes down from an absurd start has learnt nothing in the first steps
        return remedy != "reinit" or not has_learnt(history, _LEARNT) or history.rows[-1].step < _FIRST_STEPS

    def _is_late(self, history: History) -> bool:
        """Whether to start anew costs much, and it is not known yet that to go back is no help."""
        rollbacks = self._held.rollbacks if self._held is not None else 0
        return self._learnt and not rollbacks and not self._is_young(history) and not inputs_jumped(history)

    def _is_young(self, history: History) -> bool:
        """Whether the run had gone well for no more steps than a trial that fails and the pause after it cost."""
        return self._good_step <= _length(history) + _length(history) // 2

    def _verdict(self, trial: _Trial, alarms: Sequence[Finding], history: History) -> Decision | None:
        losses = history.losses[history.loss_steps > trial.step]
        row = history.rows[-1]
        if row.step <= trial.step:
            return None
        before = trial.loss
        now = _level(losses[-max(3, len(losses) // 3) :]) if losses.size else math.nan
        noise = _noise(losses)
        is_known = losses.size > 0
        margin = _CLEAR * 1.25 * noise / math.sqrt(max(1, len(losses) // 3))
        if any(f.kind in _BROKEN for f in alarms) or (is_known and not math.isfinite(now)):
            return Decision("roll_back", loss=now)
        third = max(1, len(losses) // 3)
        is_falling = is_known and _level(losses[:third]) - now > margin
        if len(losses) >= _FEWEST and now > before + _FAR * abs(before) and not is_falling:
            return Decision("roll_back", loss=now)
        if row.step - trial.step < _length(history):
            return None
        is_gone = all(f.kind is not trial.finding.kind for f in alarms)
        has_fallen = is_known and not now >= before - margin  # also where it was not finite
        is_higher = is_known and now > before + _TOLERATED * abs(before) + margin
        # of what is told at the start alone it says nothing that it is not told any more
        is_gone &= "output_growth" not in trial.finding.evidence
        # what gets worse and worse has not got there yet
        is_rising = is_known and now > max(before, _level(losses[:third])) + margin
        helped = (is_gone and not is_higher and not is_rising) or has_fallen
        # new weights may start above what a constant gives, which is where a blocked network stood
        if not helped and is_gone and is_falling and row.step - trial.step < _LONGER * _length(history):
            return None
        return Decision("keep" if helped else "roll_back", loss=now)

    # -- and to do it -------------------------------------------------------------------------------------------------

    def carry_out(self, decision: Decision, training: Training) -> Action | None:
        """Does what was decided, between two optimizer steps.

        Returns:
            The action that was taken, or the one that was decided about; None where nothing could be done.
        """
        if self._held is None:
            return None
        if decision.what != "act":
            return self._settle(decision, training)
        finding = decision.finding
        assert finding is not None
        held = self._held.state_dict()
        now = Snapshot.take(training.model, training.optimizers)
        self._before = now, held, len(self.actions)
        self._newest = None
        finite = is_finite(training.model, training.averaged)
        is_sound = finite and self._learnt and has_learnt(training.history, _LEARNT)
        if is_sound:
            self._good, self._good_step = now, training.history.rows[-1].step
        for remedy in decision.remedies:
            target, has_past = self._target(finding, remedy, training.history)
            has_past |= is_sound
            goes_back = not is_sound and ("rollback" in self._allow | {remedy} or not finite)
            if goes_back and target is not None:
                target.restore(training.model, training.optimizers)
            good_step = self._good_step if has_past else -1
            done = treat(remedy, Patient(training, finding, self._held, has_past, good_step, "clip" in self._allow))
            if done is not None:
                back = now if finite else target
                return self._begin(remedy, decision, done, held, training.history, back)
            self._tried.add((str(finding.kind), remedy))
        now.restore(training.model, training.optimizers)
        return None

    def _target(self, finding: Finding, remedy: str, history: History) -> tuple[Snapshot | None, bool]:
        """What a run that broke goes back to, and whether that is a state in which it went well.

        One that has learnt nothing starts anew: what a fault has left of its weights is no better than what they were.
        So does one whose inputs were unscaled from the start: its weights fit no others. And so does one that is young
        and made large steps from the start: they have done harm before it showed.
        """
        is_accident = finding.kind in _BROKEN and finding.cause != "learning_rate_too_large"
        if self._start is not None:
            if remedy == "scale_inputs" and not inputs_jumped(history):
                return self._start, False
            is_fast = not is_accident and self._is_young(history) and start_factor(history) <= LARGEST_FACTOR
            if remedy == "rollback" and is_fast:
                return self._start, False
        if self._learnt or (is_accident and self._good_step >= 0):
            return self._good, True
        return self._start, False

    def undo(self, training: Training) -> None:
        """Puts back what the last `carry_out` did: where it failed half-way, or another rank did something else."""
        if self._before is None or self._held is None:
            return
        now, held, count = self._before
        now.restore(training.model, training.optimizers)
        self._held.load_state_dict(held)
        del self.actions[count:]
        self._trial = self._before = None

    def _begin(
        self,
        remedy: str,
        decision: Decision,
        done: Treatment,
        held: Mapping[str, Any],
        history: History,
        back: Snapshot | None,
    ) -> Action:
        finding = decision.finding
        assert finding is not None
        step = history.rows[-1].step
        action = Action(
            step=step,
            kind=remedy,
            layers=done.layers,
            reason=f"{finding.kind.replace('_', ' ')}, {finding.cause.replace('_', ' ')}",
            before={"loss": decision.loss, **done.before},
            after=dict(done.after),
        )
        # a run that broke is measured by what it had reached before, one that has learnt nothing by its start
        self._trial = _Trial(len(self.actions), remedy, finding, step, decision.loss, held, back)
        self.actions.append(action)
        return action

    def _settle(self, decision: Decision, training: Training) -> Action | None:
        trial, self._trial = self._trial, None
        if trial is None or self._held is None:
            return None
        step = training.history.rows[-1].step
        is_kept = decision.what == "keep"
        if is_kept:  # nothing goes back behind what has helped
            self._good = Snapshot.take(training.model, training.optimizers)
            self._start = None if self._learnt else self._good
            self._good_step = step if self._learnt else -1
        else:
            back = trial.back or self._good
            if back is not None:
                back.restore(training.model, training.optimizers)
            count, slowest = self._held.rollbacks, self._held.slowest
            self._held.load_state_dict(trial.held)
            self._held.rollbacks, self._held.slowest = count, slowest  # the next one has to be slower still
        if trial.remedy != "rollback":
            self._tried.add((str(trial.finding.kind), trial.remedy))
        self._pause_until = step + _length(training.history) // 2
        action = self.actions[trial.index]
        self.actions[trial.index] = replace(
            action,
            after={**action.after, "loss": decision.loss},
            outcome="kept" if is_kept else "rolled_back",
            decided_step=step,
        )
        return self.actions[trial.index]

    def keep_good(self, said: Sequence[Finding], training: Training) -> None:
        """Remembers the present weights of a run that is well; they count as good when the next sample is well too."""
        history = training.history
        if self._trial is not None or not self._max_actions or len(self.actions) >= self._max_actions:
            return
        if any(f.severity.is_alarm for f in said) or not self._is_well(history):
            self._newest = None
            return
        if self._newest is not None:
            self._good, self._good_step = self._newest, self._newest_step
            if self._learnt and not self._is_young(history) and not offending_features(history):
                self._start = None
        self._newest = Snapshot.take(training.model, training.optimizers)
        self._newest_step = history.rows[-1].step

    def _is_well(self, history: History) -> bool:
        """Whether the run has learnt, or has at least gone on for as long as a trial lasts without getting worse."""
        if has_learnt(history, _LEARNT):
            return True
        if self._learnt or history.rows[-1].step < _length(history):
            return False
        losses = history.losses[np.isfinite(history.losses)]
        start, now = _loss_at(history, -1), _level(losses[-max(3, min(20, len(losses) // 3)) :])
        return now <= start + _TOLERATED * abs(start)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was done, is in force, and is on trial; if that fails, there is nothing to go back to."""
        trial = self._trial
        on_trial = None
        if trial is not None:
            on_trial = [trial.index, trial.remedy, trial.finding.to_dict(), trial.step, trial.loss, trial.held]
        return {
            "trial": on_trial,
            "held": self._held.state_dict() if self._held is not None else self._state,
            "tried": sorted(list(pair) for pair in self._tried),
            "pause_until": self._pause_until,
            "learnt": self._learnt,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, actions: Sequence[Action]) -> None:
        """Continues from what `state_dict` gave, if anything, with the actions that were taken."""
        self.actions, self._trial = list(actions), None
        if state is None:
            return
        self._state = state["held"]
        self._tried = {(kind, remedy) for kind, remedy in state["tried"]}
        self._pause_until, self._learnt = state["pause_until"], state["learnt"]
        if state["trial"] is not None:
            index, remedy, finding, step, loss, held = state["trial"]
            self._trial = _Trial(index, remedy, Finding.from_dict(finding), step, loss, held)


def _loss_at(history: History, step: int) -> float:
    """Where the loss stood when `step` was over."""
    losses = history.losses[history.loss_steps <= step]
    losses = losses[np.isfinite(losses)]
    if step < 0 or not losses.size:
        losses = history.losses[np.isfinite(history.losses)]
        first = _level(losses[: max(3, min(10, len(losses) // 10))])
        diverged = losses.size > 0 and first > losses[0] + _CLEAR * _noise(losses) and first > 2 * abs(losses[0])
        return float(losses[0]) if diverged else first
    return _level(losses[-max(3, min(20, len(losses) // 3)) :])


def _level(losses: Floats) -> float:
    """The median; not finite where one of them is not."""
    return float(np.median(losses)) if losses.size and np.isfinite(losses).all() else math.nan


def _noise(losses: Floats) -> float:
    finite = losses[np.isfinite(losses)]
    return float(np.median(np.abs(np.diff(finite)))) if len(finite) > 1 else 0.0


def _length(history: History) -> int:
    planned = history.rows[-1].scalars.get("planned_steps", math.nan)
    if not math.isfinite(planned):
        return _UNKNOWN_LENGTH
    return int(min(max(_SHORTEST, _SHARE * planned), _LONGEST))
