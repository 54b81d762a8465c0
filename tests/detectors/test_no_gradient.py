import math

import numpy as np
import pytest

from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import measured_too, stack, verdict

nan = math.nan
CUT = {"missing": [1, 1, 0, 0], "graph": [1, 1, 1, 1], "detached": [0, 0, 1, 0], "delta": [nan, nan, 0.2, 0.3]}


def run(*rows, steps=None):
    """Rows of four layers: `missing`, and for their outputs `graph`, `detached` and `delta`."""
    history = History()
    history.layer_axis.merge([f"fc{i}" for i in range(4)])
    history.add_points(stack(4))
    names = {
        "missing": "grad_missing_fraction",
        "graph": "in_graph",
        "detached": "input_detached",
        "delta": "delta_norm",
        "norm": "grad_norm",
    }
    for step, row in zip(steps or range(len(rows)), rows, strict=True):
        history.append(Row(step, {names[key]: np.array(values, dtype=float) for key, values in row.items()}))
    return history


def judge(*rows, **kwargs):
    return verdict(NoGradient().judge(run(*rows, **kwargs)))


UNUSED = ("info", "unused", ("fc0", "fc1"))
TABLE = {
    "a trunk cut from the loss": ({}, ("warning", "detached", ("fc0", "fc1"))),
    "features extracted under no_grad": ({"graph": [0, 0, 1, 1]}, UNUSED),
    "in the graph or not, nobody knows": ({"graph": [nan, nan, 1, 1]}, UNUSED),
    "a head beside the trunk, run first": ({"detached": [0, 0, 0, 0]}, UNUSED),
    "of the inputs nothing is known": ({"detached": [nan, nan, nan, nan]}, UNUSED),
    "cut off behind the first layer that is reached": ({"detached": [0, 0, 0, 1]}, UNUSED),
    "a teacher that ran last": (
        {"missing": [0, 0, 1, 1], "detached": [0, 0, 1, 0], "delta": [0.1, 0.2, nan, nan]},
        ("info", "unused", ("fc2", "fc3")),
    ),
    "layers that never ran": (
        {"graph": [nan, nan, 1, 1], "detached": [nan, nan, 0, 0], "delta": [nan, nan, 0.1, 0.2]},
        UNUSED,
    ),
    "a part of a layer": ({"missing": [0.9, 0, 0, 0], "delta": [0.1] * 4, "detached": [0] * 4}, None),
    "frozen, or held by no optimizer": ({"missing": [nan, nan, 0, 0]}, None),
    "one of the layers before the cut is frozen": ({"missing": [nan, 1, 0, 0]}, ("warning", "detached", ("fc1",))),
    "all is well": ({"missing": [0] * 4, "delta": [0.1] * 4, "detached": [0] * 4}, None),
    "nothing is reached": ({"missing": [1, 1, nan, nan], "delta": [nan] * 4}, UNUSED),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    change, expected = TABLE[case]
    row = {**CUT, **change}
    assert judge(row, row) == ([] if expected is None else [expected])
    assert judge(row) == []


def test_what_had_a_gradient_once_is_no_longer_asked_for():
    assert judge(CUT, {**CUT, "missing": [0] * 4}, CUT, CUT) == []


def test_optimizers_that_take_turns_are_seen_in_their_own_samples():
    first, second = {"missing": [0, 0, nan, nan]}, {"missing": [nan, nan, 0, 0]}
    assert judge(first, second, first, second) == []
    assert judge({"missing": [1, 0, nan, nan]}, second) == []
    assert judge({"missing": [1, 0, nan, nan]}, second, {"missing": [1, 0, nan, nan]}) == [("info", "unused", ("fc0",))]


def test_thawed_layers_are_asked_for_from_then_on():
    frozen, thawed = {"missing": [nan, 0, 0, 0]}, {"missing": [0, 0, 0, 0]}
    assert judge(frozen, frozen, thawed) == []


@pytest.mark.parametrize(
    ("norms", "steps", "expected"),
    [
        ([[0, 1, 1, 1]] * 3, [0, 32, 50], [("info", "unused", ("fc0",))]),
        ([[0, 1, 1, 1]] * 3, [0, 32, 49], []),
        ([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], [0, 32, 50], []),
        ([[0, 0, 1, 1]] * 3, [0, 32, 50], []),  # so many that it is another fault
        ([[nan, 1, 1, 1]] * 3, [0, 32, 50], []),
    ],
)
def test_a_gradient_of_nothing_but_zeros_is_an_info_after_50_steps(norms, steps, expected):
    rows = [{"missing": [0] * 4, "norm": norm} for norm in norms]
    assert judge(*rows, steps=steps) == expected


def test_no_rows_and_rows_of_others_tell_nothing():
    assert NoGradient().judge(History()) == []
    assert judge({"delta": [0.1] * 4}, {"delta": [0.1] * 4}) == []


FLAT = {
    "missing": [0] * 4,
    "graph": [1] * 4,
    "detached": [0] * 4,
    "delta": [0.0, 0.0, 0.2, 0.3],
    "norm": [0.0, 0.0, 0.1, 0.1],
}
MOVED = [0.0, 0.0, 1e-3, 1e-3]


def flat(rows=3, moved=MOVED, floor=-149.0, **changes):
    return measured_too(run(*[{**FLAT, **changes}] * rows), {"update_norm": moved}, delta_floor=floor)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (flat(), [("warning", "detached", ("fc0", "fc1"))]),
        (flat(rows=2), []),  # a branch that starts at zero gets its gradient with the second step
        (flat(moved=[0.0] * 4), []),  # nothing behind it has moved yet: a learning rate of 0
        (flat(delta=[0.0, 0.1, 0.2, 0.3], norm=[0.1] * 4), []),
        (flat(delta=[0.1, 0.0, 0.0, 0.3], norm=[0.1, 0.0, 0.0, 0.1]), []),  # a branch
        (flat(delta=[nan] * 4, floor=nan), []),
        # a recurrence at its bounds takes nothing for its weights out of what comes to its output
        (flat(norm=[0.0, 0.0, 0.9e-5, 0.1]), []),
        (flat(norm=[0.0, 0.0, 1.1e-5, 0.1]), [("warning", "detached", ("fc0", "fc1"))]),
    ],
)
def test_a_trunk_that_gets_exact_zeros_is_detached(made, found):
    assert verdict(NoGradient().judge(made)) == found


@pytest.mark.parametrize("metric", ["dead_fraction", "saturated_fraction"])
def test_zeros_that_a_flat_activation_makes_are_left_to_it(metric):
    history = History()
    points = stack(3, "relu")
    history.layer_axis.merge(["fc0", "fc1", "fc2"])
    history.add_points(points)
    for step in range(3):
        history.append(
            Row(
                step,
                {
                    "grad_missing_fraction": np.zeros(3),
                    "delta_norm": np.array([0.0, 0.0, 0.0, 0.1, 0.1]),
                    "grad_norm": np.array([0.0, 0.0, 0.1]),
                    "update_norm": np.array([0.0, 0.0, 0.1]),
                    metric: np.array([nan, 0.0, nan, 1.0, nan]),
                },
                {"delta_floor": -149.0},
            )
        )
    assert NoGradient().judge(history) == []


@pytest.mark.parametrize(
    ("end", "expected"), [(2.3, ("warning", "detached", ("fc0", "fc1"))), (1.0, ("info", "unused", ("fc0", "fc1")))]
)
def test_features_without_which_nothing_is_learnt_were_not_meant_to_be_fixed(end, expected):
    row = {**CUT, "graph": [0, 0, 1, 1], "detached": [0, 0, 0, 0]}
    history = run(*[row] * 3, steps=(0, 25, 49))
    assert verdict(NoGradient().judge(history)) == [UNUSED]
    values = dict(history.rows[-1].values)
    history.append(Row(50, values, losses=np.linspace(2.3, end, 51)))
    assert verdict(NoGradient().judge(history)) == [expected]


@pytest.mark.parametrize(
    ("missing", "end", "expected"),
    [([1, 1, 1, 0], 2.3, "warning"), ([1, 1, 1, 0], 1.0, "info"), ([1, 1, 0, 0], 2.3, "info")],
)
def test_a_network_that_is_mostly_left_out_and_does_not_learn_is_an_alarm(missing, end, expected):
    row = {"missing": missing, "graph": [nan] * 4, "detached": [nan] * 4, "delta": [nan, nan, nan, 0.1]}
    history = run(*[row] * 3, steps=(0, 25, 49))
    history.append(Row(50, dict(history.rows[-1].values), losses=np.linspace(2.3, end, 51)))
    assert [str(finding.severity) for finding in NoGradient().judge(history)] == [expected]
