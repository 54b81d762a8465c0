"""Has a remedy helped? What is asked of the losses, and what is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import Floats, History
from lightning_gradflow.remedies.snapshot import Snapshot

_SHARE = 0.1  # of the planned steps that a trial lasts
_SHORTEST, _LONGEST = 16, 200  # steps of a trial: one that is judged on few losses is judged on noise
_LONGER = 3  # times as long, while the fault is gone and the loss still falls
_UNKNOWN_LENGTH = 50  # steps of a trial where nobody knows how long the run will be
TOLERATED = 0.1  # share of the loss by which it may be higher after a trial that took the fault away
_FAR = 9.0  # share of the loss by which a trial that is not over yet has failed, if it does not fall from there
_FEWEST = 5  # losses, to say so
_ALIVE, _DEAD = 0.5, 0.9  # share of the units of an activation that are dead
_BY_CHANCE = 2  # losses that are not finite, as the first ones
_CLEAR = 2.0  # standard deviations of a difference that is no chance
MAX_LEFT_OUT = 0.5
"""Share of the steps: a run that leaves out more of them does not go on."""
BROKEN = (FindingKind.NONFINITE_GRADIENT,)


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
class Trial:
    """A remedy that is on trial.

    Args:
        index: of its action.
        remedy: which it is.
        finding: what it is to cure.
        step: when it acted.
        loss: where the loss stood before.
        held: the remedies that were in force before.
        back: what is put back if it does not help.
    """

    index: int
    remedy: str
    finding: Finding
    step: int
    loss: float
    held: Mapping[str, Any]
    back: Snapshot | None = None


def verdict(trial: Trial, alarms: Sequence[Finding], history: History, *, leaves_out: bool = False) -> Decision | None:
    """Whether a remedy has helped: kept or rolled back; None where that is not known yet.

    Args:
        trial: of the remedy.
        alarms: what is wrong now.
        history: what was measured.
        leaves_out: whether steps that are not finite are left out, so that their losses say nothing of the weights.
    """
    losses = history.losses[history.loss_steps > trial.step]
    losses = of_steps_made(losses) if leaves_out else losses
    row = history.rows[-1]
    if row.step <= trial.step:
        return None
    before = trial.loss
    now = level(losses[-max(3, len(losses) // 3) :]) if losses.size else math.nan
    noise = _noise(losses)
    is_known = losses.size > 0
    margin = _CLEAR * 1.25 * noise / math.sqrt(max(1, len(losses) // 3))
    if any(f.kind in BROKEN for f in alarms) or (is_known and not math.isfinite(now)):
        return Decision("roll_back", loss=now)
    third = max(1, len(losses) // 3)
    is_falling = is_known and level(losses[:third]) - now > margin
    if len(losses) >= _FEWEST and now > before + _FAR * abs(before) and not is_falling:
        return Decision("roll_back", loss=now)
    if row.step - trial.step < length(history):
        return None
    if trial.remedy == "rollback" and _have_died(history, trial.step) and not _still_falls(losses, noise):
        return Decision("roll_back", loss=now)
    is_gone = all(f.kind is not trial.finding.kind for f in alarms)
    # a loss that is known from a single batch is no more certain than a batch is
    chance = math.hypot(margin, _CLEAR * 1.25 * noise / math.sqrt(_losses_behind(history, trial.step)))
    has_fallen = is_known and not now >= before - chance  # also where it was not finite
    is_higher = is_known and now > before + TOLERATED * abs(before) + chance
    # of what is told at the start of a run alone it says nothing that it is not told any more
    is_plateau = trial.finding.kind is FindingKind.LOSS_PLATEAU
    is_gone &= "output_growth" not in trial.finding.evidence and not is_plateau
    # what gets worse and worse has not got there yet
    is_rising = is_known and now > max(before + chance, level(losses[:third]) + math.sqrt(2) * margin)
    helped = (is_gone and not is_higher and not is_rising) or has_fallen
    # new weights may start above what a constant gives, which is where a blocked network stood
    if not helped and (is_gone or is_plateau) and is_falling and row.step - trial.step < _LONGER * length(history):
        return None
    return Decision("keep" if helped else "roll_back", loss=now)


def _have_died(history: History, since: int) -> bool:
    """Whether most units of an activation were alive after a step, and all but a tenth of them are dead now."""
    dead = history["dead_fraction"][history.steps > since]
    known = dead[np.isfinite(dead).any(axis=1)]
    if not len(known):
        return False
    with np.errstate(invalid="ignore"):
        return bool(((known[0] <= _ALIVE) & (known[-1] >= _DEAD)).any())


def _still_falls(losses: Floats, noise: float) -> bool:
    """Whether they do so in the second half: units that a code leaves silent are no loss to it."""
    late = losses[len(losses) // 2 :]
    half = len(late) // 2
    margin = _CLEAR * 1.25 * math.sqrt(2) * noise / math.sqrt(max(1, half))
    return half > 0 and level(late[:half]) - level(late[half:]) > margin


def of_steps_made(losses: Floats) -> Floats:
    """The finite ones: the other steps were left out. All of them where more than two, and more than half, are not.

    Example:
        >>> of_steps_made(np.array([0.5, np.nan, 0.4]))
        array([0.5, 0.4])
    """
    finite: Floats = losses[np.isfinite(losses)]
    most = max(_BY_CHANCE, MAX_LEFT_OUT * len(losses))
    return finite if len(losses) - len(finite) <= most else losses


def loss_at(history: History, step: int) -> float:
    """Where the loss stood when `step` was over."""
    losses = history.losses[history.loss_steps <= step]
    losses = losses[np.isfinite(losses)]
    if step < 0 or not losses.size:
        losses = history.losses[np.isfinite(history.losses)]
        first = level(losses[: max(3, min(10, len(losses) // 10))])
        diverged = losses.size > 0 and first > losses[0] + _CLEAR * _noise(losses) and first > 2 * abs(losses[0])
        return float(losses[0]) if diverged else first
    return level(losses[-max(3, min(20, len(losses) // 3)) :])


def _losses_behind(history: History, step: int) -> int:
    """How many losses `loss_at` goes by."""
    count = int(np.isfinite(history.losses[history.loss_steps <= step]).sum())
    return max(1, min(count, max(3, min(20, count // 3))))


def level(losses: Floats) -> float:
    """The median; not finite where one of them is not."""
    return float(np.median(losses)) if losses.size and np.isfinite(losses).all() else math.nan


def _noise(losses: Floats) -> float:
    finite = losses[np.isfinite(losses)]
    return float(np.median(np.abs(np.diff(finite)))) if len(finite) > 1 else 0.0


def length(history: History) -> int:
    """Steps that a trial lasts: a tenth of the planned ones, 16 to 200."""
    planned = history.rows[-1].scalars.get("planned_steps", math.nan)
    if not math.isfinite(planned):
        return _UNKNOWN_LENGTH
    return int(min(max(_SHORTEST, _SHARE * planned), _LONGEST))
