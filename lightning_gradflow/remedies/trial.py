"""The loop of a cure: one remedy at a time, on trial, kept if it helped and taken back if not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Action, Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.patient import Patient, Treatment
from lightning_gradflow.remedies.plan import BY_BIRTH, DESTRUCTIVE, UNTOUCHED, remedies_for
from lightning_gradflow.remedies.snapshot import Snapshot, is_finite
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.treatments import treat
from lightning_gradflow.remedies.verdict import (
    BROKEN,
    MAX_LEFT_OUT,
    Decision,
    Trial,
    length,
    loss_at,
    of_steps_made,
    verdict,
)
from lightning_gradflow.remedies.ways_back import LEARNT, WaysBack

_STUCK = (FindingKind.LOSS_PLATEAU, FindingKind.LOSS_MISMATCH)
_FIRST_STEPS = 10  # in which nothing is learnt that is worth more than a better start
_NEWEST = 20  # losses that tell whether a run goes on


class Mitigation:
    """Treats what is found, in the run, and proves that it helped.

    A finding of warning or above gets the first remedy that fits its cause (see `plan.PLAN`). Weights, optimizer states
    and the remedies in force are kept before it acts. After a tenth of the planned steps, 16 to 200, it is kept if the
    alarm is gone and the loss is not higher, or if the loss has clearly fallen; if not, or as soon as the loss is not
    finite, or ten times as high and not falling, all is put back, and after a pause of half as long the next remedy is
    tried.

    Weights are overwritten only while the loss stands where it began or has come back to it, or while an offset of the
    targets is all that it fell by, and before `max_progress` of the run is over. A run that has learnt and broke goes
    back to its last good weights first; to its start, where its inputs were unscaled from there on, or where it is
    young and its first steps were too large.

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
        self._trial: Trial | None = None
        self._tried: set[tuple[str, ...]] = set()
        self._pause_until = -1
        self._ways = WaysBack()
        self._before: tuple[Snapshot, Mapping[str, Any], int] | None = None
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
            self._ways.begin(training)

    @property
    def changes_gradients(self) -> bool:
        """Whether a remedy is in force that has something to do before an optimizer steps."""
        return self._held is not None and (self._held.clipper is not None or self._held.coordinates.is_in_force)

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
        self._held = self._before = None
        self._ways.end()
        if self._trial is not None:
            self._trial = replace(self._trial, back=None)

    @property
    def clipping_advice(self) -> str:
        """What to do where more than half of the steps are clipped; else nothing. Reads from the device."""
        clipper = self._held.clipper if self._held is not None else None
        return clipper.advice() if clipper is not None else ""

    @property
    def _leaves_out(self) -> bool:
        return self._held is not None and self._held.clipper is not None

    @property
    def left_out(self) -> tuple[int, int]:
        """How many steps were left out since clipping began, and of how many; (0, 0) without. Reads from the device."""
        clipper = self._held.clipper if self._held is not None else None
        return clipper.left_out() if clipper is not None else (0, 0)

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
        alarms = [finding for finding in alarms if not self._is_left_out(finding, history)]
        step = history.rows[-1].step
        if self._trial is not None:
            return verdict(self._trial, alarms, history, leaves_out=self._leaves_out)
        self._ways.learnt |= not alarms and has_learnt(history, LEARNT)
        if step < self._pause_until or len(self.actions) >= self._max_actions:
            return None
        for finding in alarms:
            remedies = tuple(r for r in self._fitting(finding) if self._may(r, finding, history, progress))
            if remedies:
                return Decision("act", remedies, finding, loss_at(history, self._ways.good_step))
            forbidden = [r for r in self._fitting(finding) if r not in self._allow]
            if forbidden and not self.forbidden:
                self.forbidden = (
                    f"{finding.kind.replace('_', ' ')} was found, and nothing was changed: {' or '.join(forbidden)} "
                    "would fit, and may not be used (allow)."
                )
        return None

    def _is_left_out(self, finding: Finding, history: History) -> bool:
        """Whether it is about a batch that has left no trace, in a run that goes on: there is nothing to do then."""
        clipper = self._held.clipper if self._held is not None else None
        if clipper is None or finding.kind not in BROKEN or not _has_finite_weights(history) or not self.left_out[0]:
            return False
        since = self.actions[-1].step if self.actions else -1
        losses = of_steps_made(history.losses[history.loss_steps > since][-_NEWEST:])
        return bool(np.isfinite(losses).all()) and clipper.left_out_share() <= MAX_LEFT_OUT

    def _fitting(self, finding: Finding) -> tuple[str, ...]:
        fitting = remedies_for(finding.kind, finding.cause, has_learnt=self._ways.learnt)
        if self._held is None or not self._held.rollbacks:
            return fitting
        # to go back once more is the last resort
        return tuple(sorted(fitting, key=lambda remedy: remedy == "rollback"))

    def _may(self, remedy: str, finding: Finding, history: History, progress: float) -> bool:
        kind, cause = str(finding.kind), finding.cause
        # what had nothing to do for one cause may have for another one
        if remedy not in self._allow or {(kind, remedy), (kind, cause, remedy)} & self._tried:
            return False
        if remedy == "clip" and self._held is not None and self._held.clipper is not None:
            return False
        if remedy == "rollback" and self._ways.leads_nowhere(finding, history):
            return False
        if remedy in DESTRUCTIVE and progress > self._max_progress:
            return False
        is_untouched = (finding.kind, finding.cause) == UNTOUCHED
        if remedy == "scale_inputs" and self._is_late(history) and not is_untouched:
            return False
        # a loss that comes down from an absurd start has learnt nothing in the first steps; of one that stands still
        # with what it was born with the detector has asked how much it has learnt
        is_new = history.rows[-1].step < _FIRST_STEPS or not has_learnt(history, LEARNT)
        is_stuck = finding.kind in _STUCK and (finding.kind, finding.cause) in BY_BIRTH
        return remedy != "reinit" or is_new or is_stuck

    def _is_late(self, history: History) -> bool:
        """Whether to start anew costs much, and it is not known yet that to go back is no help."""
        rollbacks = self._held.rollbacks if self._held is not None else 0
        return self._ways.learnt and not rollbacks and not self._ways.is_young(history) and not inputs_jumped(history)

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
        self._ways.drop_newest()
        finite = is_finite(training.model, training.averaged)
        is_sound = finite and self._ways.learnt and has_learnt(training.history, LEARNT)
        ways, history = self._ways, training.history
        did_harm = "largest_step" in finding.evidence  # an earlier step than the newest
        is_sound &= not (did_harm or ways.came_before(finding, history) or ways.starts_anew(finding, history))
        if is_sound:
            self._ways.stand_by(now, training.history.rows[-1].step)
        for remedy in decision.remedies:
            for target, went_well in self._ways.targets(finding, remedy, training.history):
                has_past = went_well or is_sound
                goes_back = not is_sound and ("rollback" in self._allow | {remedy} or not finite)
                if goes_back and target is not None:
                    target.restore(training.model, training.optimizers)
                good_step = self._ways.good_step if has_past else -1
                done = treat(remedy, Patient(training, finding, self._held, has_past, good_step, self._allow))
                if done is not None:
                    back = now if finite else target
                    return self._begin(remedy, decision, done, held, training.history, back)
                now.restore(training.model, training.optimizers)  # also what it had begun
                self._held.load_state_dict(held)
            self._tried.add((str(finding.kind), finding.cause, remedy))
        return None

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
        reason = f"{finding.kind.replace('_', ' ')}, {finding.cause.replace('_', ' ')}"
        action = Action(
            step=step,
            kind=remedy,
            layers=done.layers,
            reason="; ".join(filter(None, (reason, done.note))),
            before={"loss": decision.loss, **done.before},
            after=dict(done.after),
        )
        # a run that broke is measured by what it had reached before, one that has learnt nothing by its start
        self._trial = Trial(len(self.actions), remedy, finding, step, decision.loss, held, back)
        self.actions.append(action)
        return action

    def _settle(self, decision: Decision, training: Training) -> Action | None:
        trial, self._trial = self._trial, None
        if trial is None or self._held is None:
            return None
        step = training.history.rows[-1].step
        is_kept = decision.what == "keep"
        left_out, _ = self.left_out
        if is_kept:  # nothing goes back behind what has helped
            self._ways.stay(training)
        else:
            back = trial.back or self._ways.good
            if back is not None:
                back.restore(training.model, training.optimizers)
            count, slowest = self._held.rollbacks, self._held.slowest
            self._held.load_state_dict(trial.held)
            self._held.rollbacks, self._held.slowest = count, slowest  # the next one has to be slower still
        if trial.remedy != "rollback":
            self._tried.add((str(trial.finding.kind), trial.remedy))
        self._pause_until = step + length(training.history) // 2
        action = self.actions[trial.index]
        found = {"steps_left_out": float(left_out)} if left_out else {}
        if is_kept and self._held.clipper is not None and math.isfinite(limit := max(self._held.clipper.limits())):
            found["clip_limit"] = limit
        self.actions[trial.index] = replace(
            action,
            after={**action.after, **found, "loss": decision.loss},
            outcome="kept" if is_kept else "rolled_back",
            decided_step=step,
        )
        return self.actions[trial.index]

    def keep_good(self, said: Sequence[Finding], training: Training) -> None:
        """Remembers the present weights of a run that is well; they count as good when the next sample is well too."""
        if self._trial is None and self._max_actions and len(self.actions) < self._max_actions:
            self._ways.keep(said, training)

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
            "tried": sorted(list(one) for one in self._tried),
            "pause_until": self._pause_until,
            "learnt": self._ways.learnt,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, actions: Sequence[Action]) -> None:
        """Continues from what `state_dict` gave, if anything, with the actions that were taken."""
        self.actions, self._trial = list(actions), None
        if state is None:
            return
        self._state = state["held"]
        self._tried = {tuple(one) for one in state["tried"]}
        self._pause_until, self._ways.learnt = state["pause_until"], state["learnt"]
        if state["trial"] is not None:
            index, remedy, finding, step, loss, held = state["trial"]
            self._trial = Trial(index, remedy, Finding.from_dict(finding), step, loss, held)


def _has_finite_weights(history: History) -> bool:
    """Whether the newest row was made with weights that are numbers, and its step left them so."""
    return not any(np.isposinf(history[name][-1]).any() for name in ("weight_norm", "update_norm"))
