"""What an arm is worth: how much of the gap to the fault-free twin it closes, and what it does to healthy trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from .cure_runs import ARMS, TWIN, Course
from .shares import Share
from .zoo import Case
from .zoo.outcomes import is_sick

MIN_GAP_CLOSED = 0.8
"""What a cure must close of the gap: the rest is for the steps that were lost before it."""
MAX_WORSE = 0.1
"""What a healthy training may end worse, as a share of its own end."""


@dataclass(frozen=True)
class Trial:
    """A case and a seed in every arm that it was trained in.

    Args:
        case: the case.
        seed: the seed.
        courses: name of the arm -> what came of it; `TWIN` is always there.
    """

    case: Case
    seed: int
    courses: Mapping[str, Course] = field(default_factory=dict)

    @property
    def twin(self) -> Course:
        """The training without the fault; of a healthy case the training as it is."""
        return self.courses[TWIN]

    @cached_property
    def still_sick(self) -> bool:
        """Whether the label holds at this budget: a fault that heals by itself with more steps is none to cure."""
        return is_sick(self.courses["none"].ends, self.twin.ends)

    def gap_closed(self, arm: str) -> float:
        """(worst - end) / (worst - end of the twin): 1 for a training as good as its twin, below 0 for harm.

        The worst is the end without a cure, but no worse than where the twin began: a run that is led back from a
        billion to where it began is not cured. An end that is not finite has closed nothing: minus infinity.
        """
        none, end = self.courses["none"].end, self.courses[arm].end
        worst = min(none, self.twin.start) if math.isfinite(none) else self.twin.start
        return (worst - end) / (worst - self.twin.end) if math.isfinite(end) else -math.inf

    def is_cured(self, arm: str) -> bool:
        """Whether the arm has closed at least 80 % of the gap."""
        return self.gap_closed(arm) >= MIN_GAP_CLOSED

    def is_harmed(self, arm: str) -> bool:
        """Whether a healthy training ends more than 10 % worse than without anything in it."""
        end, plain = self.courses[arm].end, self.twin.end
        # turned round, so that an end that is not a number is harm
        return math.isfinite(plain) and not end <= plain + MAX_WORSE * abs(plain)

    def is_untouched(self, arm: str) -> bool:
        """Whether a healthy training is the same to the last bit as without anything in it."""
        return self.courses[arm].fingerprint == self.twin.fingerprint

    def delay(self, arm: str, outcome: str = "") -> int | None:
        """Steps from the onset to the first action (that ended as `outcome`); None without one."""
        steps = (deed.step for deed in self.courses[arm].deeds if deed.outcome == outcome or not outcome)
        return next((step - self.case.onset for step in steps if step >= self.case.onset), None)


@dataclass(frozen=True)
class Worth:
    """One arm over some sick trainings.

    Args:
        cured: share that it cured.
        gap: median of the gap that it closed; None out of nothing.
        taken: actions.
        kept: those that were kept.
        delay: median of the steps from the onset to the first action; None without any.
        delay_kept: median of the steps from the onset to the first action that was kept.
    """

    cured: Share
    gap: float | None
    taken: int
    kept: int
    delay: float | None
    delay_kept: float | None

    @classmethod
    def of(cls, trials: Sequence[Trial], arm: str) -> Worth:
        """What an arm is worth in these trainings."""
        deeds = [deed for trial in trials for deed in trial.courses[arm].deeds]
        return cls(
            cured=Share.of(trial.is_cured(arm) for trial in trials),
            gap=_middle(trial.gap_closed(arm) for trial in trials),
            taken=len(deeds),
            kept=sum(deed.outcome == "kept" for deed in deeds),
            delay=_middle(trial.delay(arm) for trial in trials),
            delay_kept=_middle(trial.delay(arm, "kept") for trial in trials),
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers for a file."""
        return {**vars(self), "cured": self.cured.to_json()}


def _middle(values: Iterable[float | None]) -> float | None:
    """The median of those that there are; a finite one, since a file can't hold infinity."""
    listed = [value for value in values if value is not None]
    middle = median(listed) if listed else None
    return round(middle, 3) if middle is not None and math.isfinite(middle) else None


def by_family(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Family -> its trainings."""
    families: dict[str, list[Trial]] = {}
    for trial in trials:
        families.setdefault(trial.case.family, []).append(trial)
    return families


def not_ahead(trials: Iterable[Trial], ours: str, others: Iterable[str]) -> list[dict[str, Any]]:
    """Where our arm does not cure more trainings of a family than another arm does."""
    rivals = tuple(others)
    found = []
    for family, listed in by_family(trials).items():
        cured = {arm: sum(trial.is_cured(arm) for trial in listed) for arm in (ours, *rivals)}
        found += [
            {"family": family, "arm": arm, "ours": cured[ours], "theirs": cured[arm], "runs": len(listed)}
            for arm in rivals
            if cured[arm] >= cured[ours]
        ]
    return found


def harm(trials: Sequence[Trial], arm: str) -> dict[str, Any]:
    """What an arm did to healthy trainings."""
    return {
        "harmed": Share.of(trial.is_harmed(arm) for trial in trials).to_json(),
        "untouched": Share.of(trial.is_untouched(arm) for trial in trials).to_json(),
        "actions": sum(len(trial.courses[arm].deeds) for trial in trials),
        "runs_harmed": _named(trials, lambda trial: trial.is_harmed(arm)),
        "runs_touched": _named(trials, lambda trial: not trial.is_untouched(arm)),
    }


def _named(trials: Iterable[Trial], holds: Callable[[Trial], bool]) -> list[str]:
    return [f"{trial.case.name}-{trial.seed}" for trial in trials if holds(trial)]


def scored(trials: Sequence[Trial], arms: Iterable[str]) -> dict[str, Any]:
    """All that is reported of one budget, as plain numbers and strings."""
    listed = [arm for arm in ARMS if arm in set(arms)]
    sick = [trial for trial in trials if trial.case.twin is not None]
    healthy = [trial for trial in trials if trial.case.twin is None]
    judged = [trial for trial in sick if trial.still_sick]
    rivals = [arm for arm in listed if arm not in ("auto", "none")]
    return {
        "runs": sum(len(trial.courses) for trial in trials),
        "minutes": round(sum(one.seconds for trial in trials for one in trial.courses.values()) / 60, 1),
        "cases": {"sick": len({t.case.name for t in judged}), "healthy": len({t.case.name for t in healthy})},
        "sick_runs": len(judged),
        "healthy_runs": len(healthy),
        "not_sick": [_left_out(trial) for trial in sick if not trial.still_sick],
        "arms": {arm: {**Worth.of(judged, arm).to_json(), "healthy": harm(healthy, arm)} for arm in listed},
        "families": {
            family: {"runs": len(own), **{arm: Worth.of(own, arm).to_json() for arm in listed}}
            for family, own in sorted(by_family(judged).items())
        },
        "not_ahead": not_ahead(judged, "auto", rivals) if "auto" in listed else [],
        "each": [_each(trial, listed) for trial in judged],
        "crashes": {
            f"{t.case.name}-{t.seed}-{arm}": one.crash for t in trials for arm, one in t.courses.items() if one.crash
        },
        "faults_of_the_monitor": {
            f"{t.case.name}-{t.seed}-{arm}": " | ".join(one.faults)
            for t in trials
            for arm, one in t.courses.items()
            if one.faults
        },
    }


def _left_out(trial: Trial) -> dict[str, Any]:
    none, twin = trial.courses["none"], trial.twin
    ends = {"start": twin.start, "none": none.end, TWIN: twin.end}
    return {"case": trial.case.name, "seed": trial.seed, **{name: _number(value) for name, value in ends.items()}}


def _each(trial: Trial, arms: Iterable[str]) -> dict[str, Any]:
    """One sick training: where its twin began and ended, and for each arm its end, the gap closed and what was done."""
    found: dict[str, Any] = {"case": trial.case.name, "family": trial.case.family, "seed": trial.seed}
    found |= {"start": _number(trial.twin.start), TWIN: _number(trial.twin.end)}
    for arm in arms:
        one = trial.courses[arm]
        found[arm] = {"end": _number(one.end), "gap": _number(trial.gap_closed(arm))}
        if arm != "none":  # whose trainings may be kept from before a change of the detectors
            found[arm]["alarms"] = list(one.alarms)
            found[arm]["deeds"] = [f"{deed.step} {deed.kind} {deed.outcome}" for deed in one.deeds]
    return found


def _number(value: float) -> float | None:
    """Four digits; None for what is not finite, which JSON does not know."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
