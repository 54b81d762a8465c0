import math

import numpy as np
import pytest

from lightning_gradflow.detectors.onset import loss_rose, weight_growth
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack

nan = math.nan


def run(before, after):
    history = History()
    for step, losses in ((len(before) - 1, before), (len(before) + len(after) - 1, after)):
        history.append(Row(step, losses=np.array(losses, dtype=float)))
    return history


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0] * 9, [1.06] * 5, True),
        ([1.0] * 9, [1.04] * 5, False),
        ([1.0] * 9, [0.5] * 5, False),
        ([0.9, 1.1] * 9, [1.2] * 5, False),  # within the noise
        ([0.9, 1.1] * 9, [1.3] * 5, True),
        ([-1.0] * 9, [-0.9] * 5, True),
        ([1.0] * 9, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], True),
        ([1.0] * 9, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0], False),  # and fell again
        ([1.0] * 9, [1.0, nan], True),
        ([nan], [1.0], False),
    ],
)
def test_the_table(before, after, expected):
    assert loss_rose(run(before, after), 0) == expected


def test_nothing_is_known_of_a_single_row():
    history = History()
    history.append(Row(0, losses=np.ones(1)))
    assert not loss_rose(history, 0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_loss_does_not_matter(scale):
    assert loss_rose(run(scale * np.ones(9), scale * np.full(5, 1.06)), 0)
    assert not loss_rose(run(scale * np.ones(9), scale * np.full(5, 1.04)), 0)


def test_weights_grow_by_the_ratio_of_their_norms_and_are_those_of_the_layer_before():
    history = History()
    history.add_points(stack(2, "relu"))
    history.layer_axis.merge(["fc0", "fc1"])
    for step, norms in enumerate([(2.0, 1.0), (3.0, 1.0)]):
        history.append(Row(step, {"weight_norm": np.array(norms)}))
    assert [weight_growth(history, i, 0) for i in range(3)] == [1.5, 1.5, 1.0]


def test_without_norms_the_growth_is_not_known():
    history = History()
    history.add_points(stack(2, "relu"))
    history.append(Row(0))
    assert math.isnan(weight_growth(history, 1, 0))


@pytest.mark.parametrize("norms", [(np.inf, np.inf), (1.0, np.inf), (0.0, 1.0), (nan, 1.0)])
def test_weights_that_are_not_finite_or_zero_have_no_growth(norms):
    history = History()
    history.layer_axis.merge(["fc0"])
    history.add_points(stack(1))
    for step, norm in enumerate(norms):
        history.append(Row(step, {"weight_norm": np.array([norm])}))
    assert math.isnan(weight_growth(history, 0, 0))
