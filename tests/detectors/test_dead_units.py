import math

import numpy as np
import pytest

from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import measured, stack, verdict

nan = math.nan
POINTS = stack(4, "relu")  # fc0 act0 fc1 act1 fc2 act2 fc3


def row(*dead):
    """Dead fractions of the three activations."""
    values = np.full(7, nan)
    values[1:6:2] = dead
    return values


BORN, LATER = "initialisation", "learning_rate_too_large"
TABLE = {
    "none": ([row(0, 0, 0)], []),
    "just inside what is noted": ([row(0.49, 0, 0)], []),
    "what is noted": ([row(0, 0.5, 0)], [("info", BORN, ("act1",))]),
    "just inside the limit": ([row(0, 0.89, 0)], [("info", BORN, ("act1",))]),
    "the limit": ([row(0, 0.9, 0)], [("warning", BORN, ("act1",))]),
    "worst first": ([row(0.91, 0, 1.0)], [("warning", BORN, ("act2", "act0"))]),
    "an alarm names no noted ones": ([row(0.6, 0.95, 0)], [("warning", BORN, ("act1",))]),
    "died on the way": ([row(0, 0.1, 0), row(0, 0.95, 0)], [("warning", LATER, ("act1",))]),
    "came to life": ([row(0, 0.95, 0), row(0, 0.1, 0)], []),
    "not measured at first": ([row(nan, nan, nan), row(0.95, 0, 0)], [("warning", BORN, ("act0",))]),
    "not measured now": ([row(1, 1, 1), row(nan, nan, nan)], []),
    "no row": ([], []),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    rows, expected = TABLE[case]
    assert verdict(DeadUnits().judge(measured(POINTS, "dead_fraction", *rows, start=60))) == expected


@pytest.mark.parametrize("case", TABLE)
def test_healthy_activations_change_no_verdict(case):
    rows, expected = TABLE[case]
    more = [np.concatenate([values, [nan, 0.1, nan, 0.2]]) for values in rows]
    assert verdict(DeadUnits().judge(measured(stack(7, "relu")[:11], "dead_fraction", *more, start=60))) == expected


@pytest.mark.parametrize("case", TABLE)
def test_activations_that_never_run_change_no_verdict(case):
    rows, expected = TABLE[case]
    history = measured(POINTS, "dead_fraction", *rows, start=60)
    history.add_points([*POINTS[:2], Point("unused", "unused", "relu")])
    assert verdict(DeadUnits().judge(history)) == expected


def test_two_calls_of_a_module_name_it_once():
    points = [Point("relu", "relu", "relu"), Point("relu#2", "relu", "relu")]
    assert verdict(DeadUnits().judge(measured(points, "dead_fraction", [1.0, 1.0], start=60))) == [
        ("warning", BORN, ("relu",))
    ]


def test_a_history_without_points_is_well():
    assert DeadUnits().judge(History()) == []


def _run(dead, deltas, step=4, losses=()):
    history = History()
    history.add_points(POINTS)
    values = {"dead_fraction": row(*dead), "delta_norm": np.array(deltas, dtype=float)}
    history.append(Row(step, values, losses=np.array(losses, dtype=float)))
    return [finding.severity.value for finding in DeadUnits().judge(history)]


LIVE, CUT = [1.0] * 7, [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("dead", "deltas", "expected"),
    [
        ((0, 1, 0), CUT, "warning"),
        ((0, 1, 0), LIVE, "info"),  # a side branch: the gradient has another way
        ((0, 0.95, 0), LIVE, "info"),
        ((0, 1, 0), [nan, nan, 0, 1, 1, 1, 1], "warning"),  # what is frozen is not measured
        ((1, 0, 0), [nan, nan, nan, 1, 1, 1, 1], "info"),
        ((0, 0, 1), CUT, "info"),  # the cut is elsewhere
    ],
)
def test_dead_units_are_an_alarm_at_once_where_they_cut_the_network(dead, deltas, expected):
    assert _run(dead, deltas) == [expected]


@pytest.mark.parametrize(
    ("step", "losses", "expected"),
    [
        (49, np.full(49, 2.3), "info"),
        (50, np.full(50, 2.3), "warning"),
        (50, np.linspace(2.3, 1.3, 50), "info"),
    ],
)
def test_dead_units_are_an_alarm_where_there_was_time_to_learn_and_nothing_was_learnt(step, losses, expected):
    assert _run((0, 0.95, 0), LIVE, step, losses) == [expected]


@pytest.mark.parametrize(
    ("name", "value"), [("max_dead", 0), ("max_dead", 1.1), ("noted_dead", 0), ("noted_dead", 0.95)]
)
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in .*, got {value}"):
        DeadUnits(**{name: value})


def test_a_cut_must_last_three_samples_to_be_an_alarm():
    history = History()
    history.add_points(POINTS)
    found = []
    for step, deltas in enumerate([LIVE, CUT, CUT, CUT]):
        history.append(Row(step, {"dead_fraction": row(0, 1, 0), "delta_norm": np.array(deltas, dtype=float)}))
        found += [finding.severity.value for finding in DeadUnits().judge(history)]
    assert found == ["info", "info", "info", "warning"]
