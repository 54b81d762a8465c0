import math

import numpy as np
import pytest

from lightning_gradflow.detectors.saturation import SaturatedActivation
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import stack, verdict

nan, inf = math.nan, math.inf
POINTS = stack(3, "tanh")  # fc0 act0 fc1 act1 fc2
OPEN = [1.0, 1.0, 1.0, 1.0, 1.0]
BLOCKED = [1e-2, 1.0, 1e-2, 1.0, 1.0]  # both activations let a hundredth through


def run(*rows, points=POINTS, scale=1.0):
    """Rows of ((share of act0, share of act1), delta norms)."""
    history = History()
    history.add_points(points)
    for step, (shares, deltas) in enumerate(rows):
        saturated = np.full(len(deltas), nan)
        saturated[1 : 2 * len(shares) : 2] = shares
        values = {"saturated_fraction": saturated, "delta_norm": scale * np.array(deltas)}
        history.append(Row(step, values))
    return history


FULL = (0.95, 0.95)
TABLE = {
    "no row": ([], []),
    "two samples are too few": ([(FULL, BLOCKED)] * 2, []),
    "both signs line up": ([(FULL, BLOCKED)] * 3, [("warning", "weight_scale", ("act0", "act1"))]),
    "just inside the share": ([((0.89, 0.1), BLOCKED)] * 3, []),
    "just at the share": ([((0.9, 0.1), BLOCKED)] * 3, [("warning", "unscaled_inputs", ("act0",))]),
    "the gradient gets through": ([((0.95, 0.1), OPEN)] * 3, [("info", "unscaled_inputs", ("act0",))]),
    "just lets enough through": (
        [((0.95, 0), [0.11, 1, 1, 1, 1])] * 3,
        [("info", "unscaled_inputs", ("act0",))],
    ),
    "just lets too little through": (
        [((0.95, 0), [0.09, 1, 1, 1, 1])] * 3,
        [("warning", "unscaled_inputs", ("act0",))],
    ),
    "only the blocked one is named": (
        [(FULL, [1.0, 1.0, 1e-2, 1.0, 1.0])] * 3,
        [("warning", "weight_scale", ("act1",))],
    ),
    "worst first": ([((0.92, 0.99), BLOCKED)] * 3, [("warning", "weight_scale", ("act1", "act0"))]),
    "drifted there": (
        [((0.1, 0.1), OPEN), *[((0.95, 0.1), BLOCKED)] * 3],
        [("warning", "drift", ("act0",))],
    ),
    "flickers": ([(FULL, BLOCKED), ((0.1, 0.1), BLOCKED), (FULL, BLOCKED)], []),
    "not measured now": ([*[(FULL, BLOCKED)] * 3, ((nan, nan), BLOCKED)], []),
    "not measured between": (
        [(FULL, BLOCKED), ((nan, nan), BLOCKED), *[(FULL, BLOCKED)] * 2],
        [("warning", "weight_scale", ("act0", "act1"))],
    ),
    "one activation not measured": ([((0.95, nan), BLOCKED)] * 3, [("warning", "weight_scale", ("act0",))]),
    "no delta known": ([((0.95, 0), [nan] * 5)] * 3, [("info", "unscaled_inputs", ("act0",))]),
    "an exact zero comes through": (
        [((0.95, 0), [0.0, 1, 1, 1, 1])] * 3,
        [("warning", "unscaled_inputs", ("act0",))],
    ),
    "infinite deltas": ([((0.95, 0), [inf, inf, 1, 1, 1])] * 3, [("info", "unscaled_inputs", ("act0",))]),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    rows, expected = TABLE[case]
    assert verdict(SaturatedActivation().judge(run(*rows))) == expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", TABLE)
def test_multiplying_the_loss_changes_no_verdict(case, scale):
    rows, expected = TABLE[case]
    assert verdict(SaturatedActivation().judge(run(*rows, scale=scale))) == expected


# with them that sample has been measured, or the one activation is not alone
@pytest.mark.parametrize("case", sorted(set(TABLE) - {"not measured between", "one activation not measured"}))
def test_healthy_layers_change_no_verdict(case):
    rows, expected = TABLE[case]
    more = [((*shares, 0.2, 0.3), [*deltas, 1.0, 1.0, 1.0, 1.0]) for shares, deltas in rows]
    assert verdict(SaturatedActivation().judge(run(*more, points=stack(5, "tanh")))) == expected


@pytest.mark.parametrize("case", TABLE)
def test_points_that_never_run_change_no_verdict(case):
    rows, expected = TABLE[case]
    history = run(*rows)
    history.add_points([*POINTS, Point("unused", "unused", "tanh")])
    assert verdict(SaturatedActivation().judge(history)) == expected


def test_an_activation_behind_the_last_layer_is_left_out():
    history = run(*[((0.1, 0.95), [1.0, 1.0, 1e-2, 1.0])] * 3, points=POINTS[:4])
    assert SaturatedActivation().judge(history) == []


def _with(history, losses=(), inputs=(), weights=None, **metrics):
    """The same rows with more in them; `weights` are the norms of the layer before act0, row by row."""
    made = History()
    made.add_points(history.points)
    made.layer_axis.merge(["fc0", "fc1", "fc2"])
    made.add_features(len(inputs))
    for i, row in enumerate(history.rows):
        values = {**row.values, **{name: np.array(column, dtype=float) for name, column in metrics.items()}}
        if len(inputs):
            values["input_rms"] = np.array(inputs, dtype=float)
        if weights is not None:
            values["weight_norm"] = np.array([weights[i], 1.0, 1.0])
        made.append(Row(row.step, values, {"optimizers": 1.0}, losses=np.array(losses[i : i + 1], dtype=float)))
    return made


FIRST = ((0.95, 0.1), [1e-2, 1.0, 1.0, 1.0, 1.0])


WIDE, NARROW = ((0.7, 0.7), OPEN), ((0.69, 0.7), OPEN)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([WIDE] * 3, [("warning", "weight_scale", ("act0", "act1"))]),
        ([NARROW] * 3, []),
        ([((0.7, nan), OPEN)] * 3, []),  # one alone
        ([WIDE] * 2, []),
        ([NARROW, *[WIDE] * 3], []),  # not from the start
        ([*[WIDE] * 3, NARROW], []),
    ],
)
def test_less_is_enough_where_most_activations_have_it_from_the_start(rows, expected):
    assert verdict(SaturatedActivation().judge(run(*rows))) == expected


@pytest.mark.parametrize(
    ("share", "size", "spread", "expected"),
    [
        (0.5, 3.1, 1.0, [("warning", "weight_scale", ("act0",))]),
        (0.49, 3.1, 1.0, []),
        (0.5, 2.9, 1.0, []),
        (0.5, 31.0, 0.09, []),  # most of it is the same for every sample
        (0.5, nan, 1.0, []),
    ],
)
def test_half_of_one_activation_is_enough_where_the_last_layer_is_too_large_as_well(share, size, spread, expected):
    outputs = {"output_rms": [1.0, 1.0, 1.0, 1.0, size], "output_spread": [1.0, nan, 1.0, nan, spread]}
    history = _with(run(*[((share, 0.2), OPEN)] * 3), inputs=(1.0,), **outputs)
    assert verdict(SaturatedActivation().judge(history)) == expected


@pytest.mark.parametrize(
    ("steps", "losses", "expected"),
    [
        ((0, 10, 20, 30, 40, 50), [2.3] * 6, "warning"),
        ((0, 10, 20, 30, 40, 49), [2.3] * 6, "info"),
        ((0, 10, 20, 30, 40, 50), [2.3, 2.3, 1.9, 1.4, 1.0, 0.6], "info"),
    ],
)
def test_what_lets_the_gradient_through_is_an_alarm_once_it_has_lasted(steps, losses, expected):
    passing = ((0.95, 0.2), OPEN)
    history = _with(run(*[passing] * len(steps)), losses)
    made = History()
    made.add_points(history.points)
    for step, gap, row in zip(steps, np.diff(steps, prepend=-1), history.rows, strict=True):
        made.append(Row(step, row.values, row.scalars, losses=np.repeat(row.losses, gap)))
    assert [f.severity.value for f in SaturatedActivation().judge(made)] == [expected]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_gate_is_left_out(share):
    gates = [nan, share, nan, nan, nan]
    assert bool(SaturatedActivation().judge(_with(run(*[FIRST] * 3), gate_fraction=gates))) == (share == 0)


@pytest.mark.parametrize(
    ("inputs", "cause", "evidence"),
    [
        ([1.0, 1.0], "weight_scale", {}),
        ([1.0, 750.0], "unscaled_inputs", {"features": 1.0, "feature_1": 750.0}),
        ([], "unscaled_inputs", {}),  # not measured, and nothing else saturates
    ],
)
def test_the_inputs_are_blamed_behind_the_first_layer_if_they_are_too_large(inputs, cause, evidence):
    (finding,) = SaturatedActivation().judge(_with(run(*[FIRST] * 3), inputs=inputs))
    assert finding.cause == cause
    assert evidence.items() <= finding.evidence.items()
    assert len(finding.evidence) == 2 + len(evidence)


def test_the_inputs_are_not_blamed_behind_the_second_layer():
    second = ((0.1, 0.95), [1.0, 1.0, 1e-2, 1.0, 1.0])
    assert verdict(SaturatedActivation().judge(_with(run(*[second] * 3), inputs=[750.0]))) == [
        ("warning", "weight_scale", ("act1",))
    ]


@pytest.mark.parametrize(
    ("weights", "losses", "expected"),
    [
        ([1, 1.5], [0.3, 2.3], ["warning"]),
        ([1, 1.4], [0.3, 2.3], []),  # an odd batch
        ([1, 1.5], [0.3, 0.3], []),
        (None, [0.3, 2.3], []),
    ],
)
def test_one_sample_is_enough_where_a_step_closed_it(weights, losses, expected):
    history = _with(run(((0.4, 0.1), OPEN), FIRST), losses, weights=weights)
    found = SaturatedActivation().judge(history)
    assert [finding.severity.value for finding in found] == expected
    assert {finding.cause for finding in found} <= {"drift"}


LEARNT = np.linspace(2.3, 0.3, 100)


@pytest.mark.parametrize(
    ("after", "expected"), [(0.3, "info"), (2.5, "warning")], ids=["the loss stays low", "the loss rose with it"]
)
def test_a_drift_of_a_run_that_has_learnt_is_an_alarm_only_if_the_loss_rose(after, expected):
    history = History()
    history.add_points(POINTS)
    share, blocked = np.array([nan, 0.1, nan, 0.1, nan]), np.array([nan, 0.95, nan, 0.1, nan])
    history.append(Row(99, {"saturated_fraction": share, "delta_norm": np.ones(5)}, losses=LEARNT))
    for step in (119, 139, 159):
        values = {"saturated_fraction": blocked, "delta_norm": np.array(FIRST[1])}
        history.append(Row(step, values, losses=np.full(20, after)))
    assert verdict(SaturatedActivation().judge(history)) == [(expected, "drift", ("act0",))]


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_a_drift_among_several_optimizers_is_info(number):
    history = History()
    history.add_points(POINTS)
    for step, share in enumerate([0.1, 0.95, 0.95, 0.95]):
        values = {"saturated_fraction": np.array([nan, share, nan, 0.1, nan]), "delta_norm": np.array(FIRST[1])}
        history.append(Row(step, values, {"optimizers": number}))
    (finding,) = SaturatedActivation().judge(history)
    assert finding.severity.is_alarm == (number == 1)


@pytest.mark.parametrize(
    ("name", "value"), [("max_saturated", 0), ("max_saturated", 2), ("min_gain", 1), ("samples", 0)]
)
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*in .*, got {value}"):
        SaturatedActivation(**{name: value})


# -- a recurrence that stands first, and the share of its gates that the input shuts


def _recurrence(*shares, inputs=(300.0,), losses=()):
    history = History()
    history.add_points([Point("rnn", "rnn"), Point("out", "out")])
    history.add_features(len(inputs))
    for step, share in enumerate(shares):
        values = {"saturated_fraction": np.array([share, nan]), "delta_norm": np.ones(2), "input_rms": np.array(inputs)}
        history.append(Row(step, values, losses=np.array(losses[step : step + 1], dtype=float)))
    return history


@pytest.mark.parametrize(
    ("shares", "inputs", "expected"),
    [
        ([0.9] * 3, [300.0], [("warning", "unscaled_inputs", ("rnn",))]),
        ([0.89] * 3, [300.0], []),
        ([0.9] * 2, [300.0], []),
        ([0.9] * 3, [1.0], [("warning", "weight_scale", ("rnn",))]),
        ([0.1, 0.9, 0.9, 0.9], [300.0], [("warning", "drift", ("rnn",))]),
    ],
)
def test_gates_that_the_input_shuts_block_whatever_the_gradient_outside_of_them(shares, inputs, expected):
    assert verdict(SaturatedActivation().judge(_recurrence(*shares, inputs=inputs))) == expected


def test_gates_that_do_not_keep_the_run_from_learning_are_info():
    history = _recurrence(*[0.95] * 40, losses=np.linspace(2.0, 0.1, 40))
    assert [finding.severity for finding in SaturatedActivation().judge(history)] == ["info"]


def test_it_names_the_features():
    (finding,) = SaturatedActivation().judge(_recurrence(*[0.95] * 3, inputs=[1.0, 400.0]))
    assert finding.evidence["feature_1"] == 400.0


@pytest.mark.parametrize(
    ("shares", "output", "expected"),
    [
        ((0.95, 0.95), 3.1, [("warning", "weight_scale", ("act0", "act1"))]),
        ((0.95, 0.95), 2.9, []),  # large weights are not seen in what the network gives
        ((0.95, 0.84), 3.1, []),  # no more than half of them are shut: some are meant to be
        ((0.95, 0.86), 3.1, [("warning", "weight_scale", ("act0", "act1"))]),
    ],
)
def test_gates_count_where_most_of_them_are_shut_from_the_start_by_large_weights(shares, output, expected):
    nothing = [nan] * 5
    gates, sizes, spread = [nan, 1.0, nan, 1.0, nan], [9.0, nan, 9.0, nan, output], [1.0, nan, 1.0, nan, 1.0]
    history = _with(run(*[(shares, nothing)] * 3), gate_fraction=gates, output_rms=sizes, output_spread=spread)
    assert verdict(SaturatedActivation().judge(history)) == expected


def test_gates_that_shut_in_training_are_left_out():
    gates, sizes, spread = [nan, 1.0, nan, 1.0, nan], [9.0, nan, 9.0, nan, 9.0], [1.0, nan, 1.0, nan, 1.0]
    rows = [((0.1, 0.1), OPEN), *[(FULL, BLOCKED)] * 3]
    history = _with(run(*rows), gate_fraction=gates, output_rms=sizes, output_spread=spread)
    assert SaturatedActivation().judge(history) == []


def _output(*, share=1.0, gain=1e-8, ratio=1e-9, rows=3, opened=()):
    """A network whose last sigmoid is shut, and the ratio of the steps that come of it."""
    history = History()
    history.layer_axis.merge(["fc0", "out"])
    history.add_points([Point("fc0", "fc0"), Point("out", "out"), Point("out/sigmoid", "out", "sigmoid")])
    for step in range(rows):
        is_open = step in opened
        values = {
            "saturated_fraction": np.array([nan, nan, 0.2 if is_open else share]),
            "delta_norm": np.array([gain, gain, 1.0]),
            "update_ratio": np.full(2, ratio),
            "update_norm": np.full(2, ratio),
            "grad_norm": np.full(2, gain),
            "weight_norm": np.ones(2),
        }
        scalars = {"planned_steps": 300.0, "lr": 0.1, "loss": 0.3}
        history.append(Row(step, values, scalars, losses=np.array([0.3])))
    return history


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"gain": 0.01}, True),
        ({"gain": 0.011}, False),
        ({"share": 0.89}, False),
        ({"rows": 2}, False),
        ({"rows": 9, "opened": (1,)}, False),  # not shut from the start
        ({"rows": 9, "opened": (7,)}, False),
        ({"ratio": 1e-3}, False),  # a rare class, say: its samples give all the gradient it takes
    ],
)
def test_an_output_that_is_shut_from_the_start_is_found_where_no_step_gets_anywhere_for_it(made, found):
    expected = [("warning", "weight_scale", ("out",))] if found else []
    assert verdict(SaturatedActivation().judge(_output(**made))) == expected


@pytest.mark.parametrize(
    ("shares", "size", "expected"),
    [
        ((0.95, 0.0), 300.0, [("warning", "unscaled_inputs", ("act0",))]),
        ((0.95, 0.0), 1.0, []),
        ((0.89, 0.0), 300.0, []),
    ],
)
def test_gates_count_where_unscaled_inputs_shut_them_from_the_start(shares, size, expected):
    gates = [nan, 1.0, nan, 1.0, nan]
    history = _with(run(*[(shares, BLOCKED)] * 3), gate_fraction=gates, inputs=[size])
    assert verdict(SaturatedActivation().judge(history)) == expected


def test_gates_that_shut_behind_unscaled_inputs_in_training_are_left_out():
    rows = [((0.1, 0.1), OPEN), *[(FULL, BLOCKED)] * 3]
    history = _with(run(*rows), gate_fraction=[nan, 1.0, nan, 1.0, nan], inputs=[300.0])
    assert SaturatedActivation().judge(history) == []
