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
    "both signs line up": ([(FULL, BLOCKED)] * 3, [("warning", "unscaled_inputs", ("act0", "act1"))]),
    "just inside the share": ([((0.89, 0.89), BLOCKED)] * 3, []),
    "just at the share": ([((0.9, 0.1), BLOCKED)] * 3, [("warning", "unscaled_inputs", ("act0",))]),
    "the gradient gets through": ([(FULL, OPEN)] * 3, [("info", "unscaled_inputs", ("act0", "act1"))]),
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
        [("warning", "unscaled_inputs", ("act0", "act1"))],
    ),
    "one activation not measured": ([((0.95, nan), BLOCKED)] * 3, [("warning", "unscaled_inputs", ("act0",))]),
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


@pytest.mark.parametrize("case", sorted(set(TABLE) - {"not measured between"}))  # then that sample has been measured
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


@pytest.mark.parametrize(
    ("name", "value"), [("max_saturated", 0), ("max_saturated", 2), ("min_gain", 1), ("samples", 0)]
)
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*in .*, got {value}"):
        SaturatedActivation(**{name: value})
