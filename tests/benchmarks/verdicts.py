"""What alarms are worth, given the label of the case: found or not, in time, with the right words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from .alarms import Alarm
from .shares import Share
from .zoo import Case

Outcome = Literal["right", "wrong kind", "missed", "false alarm", "silent"]

STEPS_IN_TIME = 3
"""Steps after which a fault that is there at initialisation should be told."""


@dataclass(frozen=True)
class Verdict:
    """One run, judged by one judge.

    Args:
        case: its name.
        family: what it is a variant of.
        seed: its seed.
        is_sick: its label.
        steps: steps that it made.
        outcome: of a sick run `right` where an alarm of an accepted kind was told at or after the onset, `wrong kind`
            where others were, else `missed`; of a healthy one `false alarm` or `silent`.
        early: alarms before the onset; of a healthy run all of them.
        delay: steps from the onset to the first right alarm.
        in_time: whether that is at most 3 steps for a fault of the first step, else one sampling interval.
        cause: the cause that alarm names.
        cause_is_right: whether it is an accepted one; None where no cause is told or none is labelled.
        layer_is_right: whether its first layer is an accepted one; None where it names none or none is labelled.
        kinds: what was told, in order, without repetition.
    """

    case: str
    family: str
    seed: int
    is_sick: bool
    steps: int
    outcome: Outcome
    early: int = 0
    delay: int | None = None
    in_time: bool | None = None
    cause: str = ""
    cause_is_right: bool | None = None
    layer_is_right: bool | None = None
    kinds: tuple[str, ...] = ()


def verdict(case: Case, seed: int, steps: int, alarms: Sequence[Alarm], interval: int) -> Verdict:
    """Holds the alarms of a run, in order of time, against the label of its case.

    Args:
        case: the case; a sick one has a twin without the fault.
        seed: the seed of the run.
        steps: steps that it made.
        alarms: what was told.
        interval: steps between two samples.
    """
    kinds = tuple(dict.fromkeys("|".join(sorted(alarm.kinds)) or "problem" for alarm in alarms))
    is_sick = case.twin is not None
    early = [alarm for alarm in alarms if not is_sick or alarm.step < case.onset]
    told: Outcome = "false alarm" if alarms else "silent"
    bare = Verdict(case.name, case.family, seed, is_sick, steps, told, early=len(early), kinds=kinds)
    if not is_sick:
        return bare
    later = alarms[len(early) :]
    right = next((alarm for alarm in later if alarm.says(case.kinds)), None)
    if right is None:
        return replace(bare, outcome="wrong kind" if later else "missed")
    delay = right.step - case.onset
    return replace(
        bare,
        outcome="right",
        delay=delay,
        in_time=delay <= (interval if case.onset else STEPS_IN_TIME),
        cause=right.cause,
        cause_is_right=right.cause in case.causes if right.cause and case.causes else None,
        layer_is_right=right.layers[0] in case.layers if right.layers and case.layers else None,
    )


@dataclass(frozen=True)
class Summary:
    """All verdicts of one judge in numbers: shares of runs, and of families.

    A family counts as found where each of its runs is, and as alarmed where any of them is.
    """

    recall: Share
    recall_families: Share
    wrong_kind: Share
    missed: Share
    false_alarms: Share
    false_alarm_families: Share
    false_alarms_per_1000_steps: float
    early: Share
    right_cause: Share
    right_layer: Share
    in_time_at_start: Share
    in_time_late: Share
    median_delay: float | None
    max_delay: int | None

    def to_json(self) -> dict[str, Any]:
        """Numbers for a file."""
        return {k: v.to_json() if isinstance(v, Share) else v for k, v in vars(self).items()}


def summary(verdicts: Iterable[Verdict], onset: Callable[[str], int]) -> Summary:
    """The numbers of one judge.

    Args:
        verdicts: one a run.
        onset: name of a case -> the step at which its fault sets in.
    """
    listed = list(verdicts)
    sick, healthy = [v for v in listed if v.is_sick], [v for v in listed if not v.is_sick]
    found = [v for v in sick if v.outcome == "right"]
    delays = [v.delay for v in found if v.delay is not None]
    steps = sum(v.steps for v in healthy)
    return Summary(
        recall=Share.of(v.outcome == "right" for v in sick),
        recall_families=_families(sick, lambda v: v.outcome == "right"),
        wrong_kind=Share.of(v.outcome == "wrong kind" for v in sick),
        missed=Share.of(v.outcome == "missed" for v in sick),
        false_alarms=Share.of(v.outcome == "false alarm" for v in healthy),
        false_alarm_families=_any_family(healthy, lambda v: v.outcome == "false alarm"),
        false_alarms_per_1000_steps=round(1000 * sum(v.early for v in healthy) / steps, 3) if steps else 0.0,
        early=Share.of(v.early > 0 for v in sick if onset(v.case)),
        right_cause=Share.of(v.cause_is_right for v in found if v.cause_is_right is not None),
        right_layer=Share.of(v.layer_is_right for v in found if v.layer_is_right is not None),
        in_time_at_start=Share.of(bool(v.in_time) for v in sick if not onset(v.case)),
        in_time_late=Share.of(bool(v.in_time) for v in sick if onset(v.case)),
        median_delay=median(delays) if delays else None,
        max_delay=max(delays, default=None),
    )


def _by_family(verdicts: Iterable[Verdict], holds: Callable[[Verdict], bool]) -> list[list[bool]]:
    families: dict[str, list[bool]] = defaultdict(list)
    for v in verdicts:
        families[v.family].append(holds(v))
    return list(families.values())


def _families(verdicts: Iterable[Verdict], holds: Callable[[Verdict], bool]) -> Share:
    return Share.of(all(runs) for runs in _by_family(verdicts, holds))


def _any_family(verdicts: Iterable[Verdict], holds: Callable[[Verdict], bool]) -> Share:
    return Share.of(any(runs) for runs in _by_family(verdicts, holds))


def confusion(verdicts: Iterable[Verdict], accepted: Callable[[str], frozenset[str]]) -> dict[str, dict[str, int]]:
    """Accepted causes of the label -> cause told by the first right alarm -> runs.

    Args:
        verdicts: one a run.
        accepted: name of a case -> its causes.
    """
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for v in verdicts:
        if v.cause_is_right is not None:
            table["|".join(sorted(accepted(v.case)))][v.cause] += 1
    return {row: dict(sorted(table[row].items())) for row in sorted(table)}
