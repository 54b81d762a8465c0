import math

import numpy as np
import pytest

from lightning_gradflow.detectors.inputs import (
    contrast,
    feature_evidence,
    inputs_jumped,
    is_measured,
    offending_features,
)
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack

nan, inf = math.nan, math.inf


def run(*rows, output=None, shut=None, spread=None, weight=None):
    history = History()
    history.layer_axis.merge(["fc0", "fc1"])
    history.add_points(stack(2))
    history.add_features(max(map(len, rows), default=0))
    for step, values in enumerate(rows):
        metrics = {"input_rms": np.array(values, dtype=float)}
        if output is not None:
            metrics["output_rms"] = np.array([output, 1.0])
        if spread is not None:
            metrics["output_spread"] = np.array([spread, 0.9])
        if weight is not None:
            metrics["weight_norm"] = np.array([weight, 5.0])
        if shut is not None:
            metrics["saturated_fraction"] = np.array([shut, nan])
        history.append(Row(step, metrics))
    return history


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1.0, 1.0, 1.0], []),
        ([10.0, 10.0], []),
        ([10.1, 10.0], [0]),
        ([0.5, 800.0, 100.0, 7.9], [1, 2]),  # a hundredth of the largest is named from 10 on
        ([1e5, 999.0, 1001.0], [0, 2]),
        ([1e-3, 1e-3], []),
        ([nan, nan], []),
        ([nan, 300.0], [1]),
        ([1.0, inf, 50.0], [1, 2]),
        ([], []),
    ],
)
def test_the_table(sizes, expected):
    assert offending_features(run(sizes)) == expected


def test_one_large_feature_among_many_small_ones_does_not_count_until_it_outweighs_them():
    assert offending_features(run([99.0, *[0.0] * 99])) == []
    assert offending_features(run([101.0, *[0.0] * 99])) == [0]


@pytest.mark.parametrize(
    ("output", "expected"),
    [(1.0, []), (2.0, []), (2.1, [0]), (nan, [0]), (1e-9, []), (1e-10, [0]), (0.0, [])],
)
def test_a_first_layer_that_absorbs_the_size_makes_it_harmless(output, expected):
    assert offending_features(run([300.0], output=output)) == expected


@pytest.mark.parametrize(("spread", "expected"), [(0.5, []), (2e-6, []), (5e-7, [0]), (0.0, [0]), (nan, [])])
def test_an_output_that_is_the_same_for_all_samples_has_absorbed_nothing(spread, expected):
    assert offending_features(run([300.0], output=0.1, spread=spread)) == expected


@pytest.mark.parametrize(("weight", "expected"), [(0.0, []), (nan, []), (5.0, [0])])
def test_weights_that_are_not_zero_and_give_zeros_are_no_measure_for_such_inputs(weight, expected):
    assert offending_features(run([300.0], output=0.0, weight=weight)) == expected


@pytest.mark.parametrize(("shut", "expected"), [(0.5, []), (0.51, [0]), (nan, [])])
def test_a_recurrence_absorbs_the_size_where_its_gates_stay_open_however_small_its_output(shut, expected):
    assert offending_features(run([300.0], output=0.8, shut=shut)) == expected


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        ([0.0] * 4, [1.0] * 4, 4.0),
        ([0.25] * 4, [math.sqrt(3) / 4] * 4, 0.6),  # one-hot: (4 * 3 / 16) / (1 + 4 / 16)
        ([3.0, 0.0], [0.0, 1.0], 0.1),
        ([3.0, 0.0], [1e-9, 1.0], 0.1),
        ([3.0], [0.0], nan),
        ([nan, 0.0], [nan, 0.1], 0.01),
    ],
)
def test_the_contrast_by_hand(mean, deviation, expected):
    history = History()
    history.add_features(len(mean))
    mean, deviation = np.array(mean), np.array(deviation)
    history.append(Row(0, {"input_rms": np.hypot(mean, deviation), "input_deviation": deviation}))
    assert contrast(history, 0) == pytest.approx(expected, nan_ok=True)


def test_the_newest_sample_that_was_measured_tells():
    assert offending_features(run([1.0, 1.0], [1.0, 300.0], [nan, nan])) == [1]


def test_the_evidence_names_the_worst_five():
    assert feature_evidence(run([0.1, 30.0, 20.0, 60.0, 50.0, 40.0, 70.0])) == {
        "features": 6.0,
        "feature_6": 70.0,
        "feature_3": 60.0,
        "feature_4": 50.0,
        "feature_5": 40.0,
        "feature_1": 30.0,
    }
    assert feature_evidence(run([1.0])) == {}


def test_an_input_that_was_not_measured_is_known_to_be_so():
    assert [is_measured(run(sizes)) for sizes in ([1.0], [nan], [])] == [True, False, False]
    assert not is_measured(History())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1, 1, 1], False),
        ([1, 1, 1, 255], True),
        ([1, 255, 255, 255], True),
        ([1, 1, 1, 9.9], False),
        ([255, 255, 1], False),
        ([1, 1, 255, 1], False),  # one odd batch, and over
        ([255], False),
        ([1.0] * 4 + [255.0] * 12, False),  # so long ago that it is no news
    ],
)
def test_inputs_jump_when_they_are_ten_times_as_large_as_before(sizes, expected):
    history = History()
    history.add_features(1)
    for step, size in enumerate(sizes):
        history.append(Row(step, {"input_rms": np.array([float(size)])}))
    assert inputs_jumped(history) is expected
