"""Leave one family out: would a limit fitted without a family have judged that family the same?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.saturation import SaturatedActivation
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

from .runs import CASES, EVERY_N_STEPS, Run, default_detectors, rejudged
from .verdicts import verdict


@dataclass(frozen=True)
class Limit:
    """A limit that was fitted.

    Args:
        detector: the class that has it.
        attribute: its name there.
        grid: the values that it is tried at; the default is tried in any case.
    """

    detector: type[Any]
    attribute: str
    grid: tuple[float, ...]

    @property
    def name(self) -> str:
        """As in `VanishingGradient.max_decay`."""
        return f"{self.detector.__name__}.{self.attribute}"

    @property
    def default(self) -> float:
        """The value that users get."""
        value: float = getattr(next(d for d in default_detectors() if type(d) is self.detector), self.attribute)
        return value

    @property
    def values(self) -> tuple[float, ...]:
        """The grid with the default in it, in order."""
        return tuple(sorted({*self.grid, self.default}))


LIMITS: tuple[Limit, ...] = (
    Limit(VanishingGradient, "max_decay", (2.0, 4.0, 5.0, 6.0)),
    Limit(VanishingGradient, "critical_decay", (6.0, 7.0, 10.0)),
    Limit(VanishingGradient, "min_headroom", (-6.0, 0.0)),
    Limit(ExplodingGradient, "max_growth", (2.0, 4.0, 5.0)),
    Limit(ExplodingGradient, "max_jump", (30.0, 100.0, 300.0, 3000.0)),
    Limit(RecurrentGradient, "max_decay", (2.0, 3.0, 6.0)),
    Limit(RecurrentGradient, "max_growth", (2.0, 4.0, 5.0)),
    Limit(UpdateRatio, "min_reach", (0.001, 0.003, 0.03, 0.1)),
    Limit(UpdateRatio, "max_ratio", (0.1, 0.3, 3.0)),
    Limit(SaturatedActivation, "max_saturated", (0.5, 0.7, 0.8, 0.95)),
    Limit(SaturatedActivation, "min_gain", (0.03, 0.2, 0.3)),
    Limit(DeadUnits, "max_dead", (0.6, 0.7, 0.8, 0.95)),
    Limit(LossPlateau, "window", (100, 150, 300)),
    Limit(LossPlateau, "min_progress", (0.003, 0.03)),
    Limit(LossPlateau, "min_learnt", (0.02, 0.1)),
)
"""Every limit whose default was settled on trainings."""


class Remembered:
    """A detector that is asked once about each state of a run, and from then on repeats itself.

    A detector is pure, so the answers to the same rows are the same. Only for replays of one and the same run.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._answers: list[list[Finding]] = []
        self._asked = 0

    def rewind(self) -> None:
        """The run starts anew."""
        self._asked = 0

    def judge(self, history: History) -> list[Finding]:
        """What the detector says, or said, at this point of the run."""
        if self._asked == len(self._answers):
            self._answers.append(self.detector.judge(history))
        self._asked += 1
        return self._answers[self._asked - 1]


@dataclass(frozen=True)
class Tried:
    """One run under one value of a limit: whether it was judged right, and how many alarms a healthy one has."""

    case: str
    family: str
    seed: int
    is_sick: bool
    is_right: bool


Grid = dict[float, list[Tried]]


def try_limits(run: Run, limits: Iterable[Limit] = LIMITS) -> dict[str, dict[float, Tried]]:
    """Name of a limit -> value -> how the run is judged with it, all other limits at their defaults."""
    case = CASES[run.case]
    defaults = [Remembered(detector) for detector in default_detectors()]
    found: dict[str, dict[float, Tried]] = {}
    for limit in limits:
        for value in limit.values:
            for remembered in defaults:
                remembered.rewind()
            changed = rejudged(run, [_with(remembered, limit, value) for remembered in defaults])
            judged = verdict(case, run.seed, run.steps, changed.alarms, EVERY_N_STEPS)
            is_right = judged.outcome in ("right", "silent")
            tried = Tried(run.case, case.family, run.seed, judged.is_sick, is_right)
            found.setdefault(limit.name, {})[value] = tried
    return found


def _with(remembered: Remembered, limit: Limit, value: float) -> Detector:
    if type(remembered.detector) is not limit.detector or value == limit.default:
        return remembered
    original: Any = remembered.detector
    changed: Detector = replace(original, **{limit.attribute: value})
    return changed


def best(grid: Grid, default: float, without: str = "") -> float:
    """The value with the fewest false alarms, then the most sick runs found, then the nearest to the default.

    Args:
        grid: value -> one entry a run.
        default: the value that users get.
        without: a family whose runs are not looked at.
    """

    def rank(value: float) -> tuple[int, int, float]:
        kept = [tried for tried in grid[value] if tried.family != without]
        false = sum(not tried.is_right for tried in kept if not tried.is_sick)
        found = sum(tried.is_right for tried in kept if tried.is_sick)
        return false, -found, abs(value - default)

    return min(grid, key=rank)


def leave_one_out(limit: Limit, grid: Grid) -> dict[str, Any]:
    """For each family, the limit that is best on the others, and what it does to the family.

    Returns:
        Under `best` the value that is best on all families, under `chosen` value -> number of families whose absence
        leads to it, and under `changed` the runs whose verdict differs from that of the default.
    """
    default = {(tried.case, tried.seed): tried.is_right for tried in grid[limit.default]}
    chosen: dict[str, int] = {}
    changed: list[dict[str, Any]] = []
    for family in sorted({tried.family for tried in grid[limit.default]}):
        value = best(grid, limit.default, family)
        chosen[f"{value:g}"] = chosen.get(f"{value:g}", 0) + 1
        for tried in grid[value]:
            if tried.family == family and tried.is_right != default[tried.case, tried.seed]:
                run = {"family": family, "case": tried.case, "seed": tried.seed, "limit": value}
                changed.append({**run, "right_with_default": default[tried.case, tried.seed]})
    return {
        "limit": limit.name,
        "default": limit.default,
        "best": best(grid, limit.default),
        "chosen": chosen,
        "changed": changed,
    }


def merge(tried: Sequence[dict[str, dict[float, Tried]]]) -> dict[str, Grid]:
    """Name of a limit -> value -> one entry a run, from the entries of each run."""
    grids: dict[str, Grid] = {}
    for run in tried:
        for name, values in run.items():
            for value, entry in values.items():
                grids.setdefault(name, {}).setdefault(value, []).append(entry)
    return grids
