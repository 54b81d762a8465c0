import math

import numpy as np
import pytest

from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import measured, measured_too, stack, verdict

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


def test_a_smooth_rectifier_cuts_where_it_passes_less_than_a_hundredth():
    assert _run((0, 1, 0), [0.009, 0.009, 0.01, 1, 1, 1, 1]) == ["warning"]
    assert _run((0, 1, 0), [0.009, 0.009, 0.011, 1, 1, 1, 1]) == ["info"]


def test_dead_units_of_a_run_that_learns_are_no_alarm_even_where_they_cut():
    learnt = np.linspace(1.0, 0.01, 60)  # a hinge loss, whose margins are all kept by now
    assert _run((0, 0, 1), [0, 0, 0, 0, 0, 1, 0], 60, learnt) == ["info"]


def _history(*rows, weights=(), inputs=()):
    """Rows of (step, silent share of act1, losses), the deltas alive; the window of three is never full."""
    history = History()
    history.add_points(POINTS)
    history.layer_axis.merge([f"fc{i}" for i in range(4)])
    history.add_features(len(inputs))
    for i, (step, share, losses) in enumerate(rows):
        values = {"silent_fraction": row(0.1, share, 0.1), "dead_fraction": row(0, 0, 0)}
        values["weight_norm"] = np.array([1.0, weights[i] if weights else 1.0 + 0.1 * i, 1.0, 1.0])
        values["input_rms"] = np.array(inputs, dtype=float)
        history.append(Row(step, values, losses=np.array(losses, dtype=float)))
    return history


FALL, LOW, HIGH = [*np.linspace(2.3, 0.3, 25), *[0.3] * 25], [0.3] * 50, [2.3] * 50


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(49, 0.6, FALL), (99, 0.9, HIGH)], [("warning", LATER, ("act1",))]),
        ([(49, 0.6, FALL), (99, 0.89, HIGH)], []),
        ([(49, 0.61, FALL), (99, 0.9, HIGH)], []),  # it was half dead before
        ([(49, nan, FALL), (99, 0.9, HIGH)], []),  # too few inputs to tell
        ([(49, 0.6, FALL), (99, 0.9, LOW)], [("info", "unknown", ("act1",))]),
        ([(0, 0.5, [15.0]), (1, 1.0, [1.1])], [("warning", LATER, ("act1",))]),  # nothing had been learnt
        ([(9, 0.5, [2.3] * 10), (19, 1.0, [2.3] * 10)], [("info", "unknown", ("act1",))]),
    ],
)
def test_a_layer_that_dies_is_told_at_once(rows, expected):
    assert verdict(DeadUnits().judge(_history(*rows))) == expected


def test_it_is_told_until_the_window_is_full():
    rows = [(49, 0.5, FALL), (99, 1.0, HIGH), (149, 1.0, HIGH), (199, 1.0, HIGH), (249, 1.0, HIGH)]
    found = [len(DeadUnits().judge(_history(*rows[:n]))) for n in range(1, 6)]
    assert found == [0, 1, 1, 1, 0]  # from here on dead_fraction, which is 0 here, would tell


def test_a_layer_whose_weights_have_faded_did_not_die_of_a_large_step():
    rows = [(49, 0.5, FALL), (99, 1.0, HIGH)]
    causes = [DeadUnits().judge(_history(*rows, weights=(1, w)))[0].cause for w in (0.51, 0.49)]
    assert causes == [LATER, "unknown"]


@pytest.mark.parametrize(
    ("weight", "ratio", "rate", "cause"),
    [
        (1.09, 0.029, 1.5, "unknown"),  # a bias that somebody overwrote
        (1.11, 0.029, 1.5, LATER),
        (0.89, 0.029, 1.5, LATER),
        (1.09, 0.031, 1.5, LATER),
        (1.09, 0.029, 1.6, LATER),
        (1.09, nan, 1.0, "unknown"),
        (nan, nan, 1.0, LATER),  # nobody looked
    ],
)
def test_a_layer_that_was_not_moved_did_not_die_of_a_large_step(weight, ratio, rate, cause):
    history = _history((49, 0.5, FALL), (99, 1.0, HIGH), weights=(1, weight))
    history = measured_too(history, {"update_ratio": [nan, ratio, nan, nan]})
    for row, lr in zip(history.rows, (1.0, rate), strict=True):
        row.scalars["lr"] = lr
    (finding,) = DeadUnits().judge(history)
    assert finding.cause == cause


@pytest.mark.parametrize(
    ("samples", "last", "expected"), [(3, 1.0, ["warning"]), (2, 1.0, ["info"]), (3, 0.95, ["info"])]
)
def test_where_every_unit_of_every_activation_is_silent_no_way_is_left(samples, last, expected):
    history = History()
    history.add_points(POINTS)
    for step in range(samples):  # all weights are zero: nothing comes back either
        share = row(1.0, 1.0, last)
        history.append(Row(step, {"dead_fraction": share, "silent_fraction": share, "delta_norm": np.zeros(7)}))
    assert [str(finding.severity) for finding in DeadUnits().judge(history)] == expected


@pytest.mark.parametrize(("start", "cause"), [(0, "unscaled_inputs"), (49, "unscaled_inputs"), (50, LATER)])
def test_the_inputs_are_blamed_in_the_first_steps(start, cause):
    history = _history((start, 0.5, [0.3]), (start + 50, 1.0, HIGH), inputs=[1.0, 750.0])
    (finding,) = DeadUnits().judge(history)
    assert finding.cause == cause
    assert ("feature_1" in finding.evidence) == (cause == "unscaled_inputs")


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_loss_changes_no_verdict(scale):
    for after, severity in ((HIGH, "warning"), (LOW, "info")):
        rows = [(49, 0.6, scale * np.array(FALL)), (99, 0.9, scale * np.array(after))]
        assert [finding.severity.value for finding in DeadUnits().judge(_history(*rows))] == [severity]


def softplus_run(op="softplus", grad=0.5, rises=True):
    """A run that has learnt, and whose last activation falls silent while its loss is noisy."""
    history = History()
    history.add_points(
        [Point("fc0", "fc0"), Point("fc0/tanh", "fc0", "tanh"), Point("var", "var"), Point("var/act", "var", op)]
    )
    history.layer_axis.merge(["fc0", "var"])
    losses = np.linspace(1.5, -2.0, 200)
    for step in range(0, 200, 10):
        is_last = step == 190
        values = {
            "silent_fraction": np.array([nan, nan, nan, 1.0 if is_last else 0.0]),
            "dead_fraction": np.array([nan, nan, nan, 0.0]),
            "grad_norm": np.array([1.0, grad]),
        }
        some = losses[step - 9 if step else 0 : step + 1]
        history.append(Row(step, values, losses=some + 0.5 if is_last and rises else some))
    return history


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({}, "info"),  # a variance that was learnt: the loss is steep where the softplus is flat
        ({"grad": 0.004}, "warning"),
        ({"op": "relu"}, "warning"),  # nothing passes
        ({"rises": False}, "info"),
    ],
)
def test_a_smooth_rectifier_whose_layer_gets_a_gradient_is_no_dead_end(changes, severity):
    (finding,) = DeadUnits().judge(softplus_run(**changes))
    assert str(finding.severity) == severity


@pytest.mark.parametrize(("around", "severity"), [(0.0, "warning"), (0.002, "warning"), (0.2, "info")])
def test_branches_that_give_nothing_are_no_alarm_where_the_gradient_goes_around_them(around, severity):
    history = History()
    history.add_points([Point("first", "first"), *POINTS[:4], Point("head", "head")])
    dead = np.array([nan, nan, 1.0, nan, 1.0, nan])
    for step in (0, 1, 2):
        deltas = np.array([around, around, 0.3, around, 0.3, 0.3])
        history.append(Row(step, {"dead_fraction": dead, "silent_fraction": dead, "delta_norm": deltas}))
    (finding,) = DeadUnits().judge(history)
    assert str(finding.severity) == severity
