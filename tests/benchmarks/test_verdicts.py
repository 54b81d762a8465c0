"""Alarms on made-up runs, held against made-up labels."""

from dataclasses import replace

import pytest

from tests.benchmarks.alarms import Alarm
from tests.benchmarks.shares import Share
from tests.benchmarks.verdicts import confusion, summary, verdict
from tests.benchmarks.zoo.case import Case

VANISHING, DEAD, PROBLEM = frozenset({"vanishing_gradient"}), frozenset({"dead_units"}), frozenset()

HEALTHY = Case("well", build=None, data=None, max_steps=100, family="wells")
SICK = Case(
    "ill",
    build=None,
    data=None,
    max_steps=100,
    twin=lambda seed: None,
    family="ills",
    kinds=VANISHING,
    causes=frozenset({"depth", "saturation"}),
    layers=("net.0", "net.2"),
)
LATE = replace(SICK, name="late", onset=50)


def judged(case, *alarms, seed=0):
    return verdict(case, seed, 100, list(alarms), interval=10)


@pytest.mark.parametrize(
    ("case", "alarms", "outcome"),
    [
        (HEALTHY, [], "silent"),
        (HEALTHY, [Alarm(3, DEAD)], "false alarm"),
        (HEALTHY, [Alarm(3, PROBLEM)], "false alarm"),
        (SICK, [], "missed"),
        (SICK, [Alarm(3, DEAD)], "wrong kind"),
        (SICK, [Alarm(3, DEAD), Alarm(9, VANISHING)], "right"),
        (SICK, [Alarm(3, PROBLEM)], "right"),
        (SICK, [Alarm(3, VANISHING | DEAD)], "right"),
        (LATE, [Alarm(49, VANISHING)], "missed"),
        (LATE, [Alarm(49, DEAD), Alarm(50, DEAD)], "wrong kind"),
        (LATE, [Alarm(49, DEAD), Alarm(50, VANISHING)], "right"),
    ],
)
def test_the_outcome(case, alarms, outcome):
    assert judged(case, *alarms).outcome == outcome


def test_what_was_told_before_the_onset_is_early():
    assert judged(LATE, Alarm(10, DEAD), Alarm(49, VANISHING), Alarm(55, VANISHING)).early == 2
    assert judged(HEALTHY, Alarm(10, DEAD), Alarm(49, VANISHING)).early == 2
    assert judged(SICK, Alarm(0, DEAD)).early == 0


@pytest.mark.parametrize(
    ("case", "step", "delay", "in_time"),
    [(SICK, 3, 3, True), (SICK, 4, 4, False), (LATE, 60, 10, True), (LATE, 61, 11, False)],
)
def test_the_delay_counts_from_the_onset_to_the_first_right_alarm(case, step, delay, in_time):
    found = judged(case, Alarm(step, VANISHING), Alarm(step + 5, VANISHING))
    assert (found.delay, found.in_time) == (delay, in_time)


@pytest.mark.parametrize(("cause", "is_right"), [("depth", True), ("weight_scale", False), ("", None)])
def test_the_cause_is_that_of_the_first_right_alarm(cause, is_right):
    found = judged(SICK, Alarm(0, DEAD, cause="depth"), Alarm(1, VANISHING, cause=cause))
    assert (found.cause, found.cause_is_right) == (cause, is_right)


@pytest.mark.parametrize(("layers", "is_right"), [(("net.2", "net.4"), True), (("net.4", "net.2"), False), ((), None)])
def test_the_layer_is_the_first_one_named(layers, is_right):
    assert judged(SICK, Alarm(0, VANISHING, layers)).layer_is_right is is_right


def test_without_a_label_neither_cause_nor_layer_is_judged():
    bare = replace(SICK, causes=frozenset(), layers=())
    found = judged(bare, Alarm(0, VANISHING, ("net.0",), "depth"))
    assert (found.cause_is_right, found.layer_is_right) == (None, None)


def test_the_summary_counts_runs_and_families():
    other = replace(SICK, name="other", family="others")
    verdicts = [
        judged(SICK, Alarm(0, VANISHING, ("net.0",), "depth")),
        judged(SICK, Alarm(8, VANISHING, ("head",), "recurrence"), seed=1),
        judged(other, Alarm(2, VANISHING, cause="depth")),
        judged(other, Alarm(2, DEAD), seed=1),
        judged(LATE, Alarm(20, DEAD)),
        judged(HEALTHY),
        judged(HEALTHY, Alarm(1, DEAD), Alarm(5, VANISHING), seed=1),
    ]
    found = summary(verdicts, lambda name: 50 if name == "late" else 0)
    assert (found.recall, found.wrong_kind, found.missed) == (Share(3, 5), Share(1, 5), Share(1, 5))
    # the late case is of the family of the first, and was missed
    assert (found.recall_families, found.false_alarm_families) == (Share(0, 2), Share(1, 1))
    assert (found.false_alarms, found.false_alarms_per_1000_steps) == (Share(1, 2), 10.0)
    assert (found.early, found.right_cause, found.right_layer) == (Share(1, 1), Share(2, 3), Share(1, 2))
    assert (found.in_time_at_start, found.in_time_late) == (Share(2, 4), Share(0, 1))
    assert (found.median_delay, found.max_delay) == (2, 8)
    assert found.to_json()["recall"] == {"hits": 3, "total": 5, "low": 0.2307, "high": 0.8824}


def test_nothing_gives_a_summary_of_nothing():
    found = summary([], lambda name: 0)
    assert (found.recall, found.false_alarms_per_1000_steps, found.median_delay) == (Share(0, 0), 0.0, None)


def test_the_confusion_has_a_row_for_each_label_and_a_column_for_each_cause_told():
    verdicts = [judged(SICK, Alarm(0, VANISHING, cause=cause)) for cause in ("depth", "depth", "recurrence", "")]
    assert confusion(verdicts, lambda name: SICK.causes) == {"depth|saturation": {"depth": 2, "recurrence": 1}}
