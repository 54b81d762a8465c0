import math

import numpy as np
import pytest

from lightning_gradflow.detectors.profile import depth_profile, recent_profiles
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import measured, stack

nan, inf = math.nan, math.inf


def span(deltas, **others):
    return depth_profile(measured(stack(len(deltas)), "delta_norm", deltas, **others)).span


@pytest.mark.parametrize("points", [2, 3, 4, 5, 30])
@pytest.mark.parametrize("decades", [-9.0, 0.0, 6.0])
def test_the_span_of_an_exponential_profile_is_its_ratio_in_decades(points, decades):
    # decades < 0: the first layer has the smallest norm
    assert span(np.logspace(decades, 0, points)) == pytest.approx(decades, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_span_does_not_depend_on_the_size_of_the_loss(scale):
    deltas = 10.0 ** np.random.default_rng(0).uniform(-5, 0, 9)
    assert span(scale * deltas) == pytest.approx(span(deltas))


@pytest.mark.parametrize("odd", [0.0, inf, nan])
def test_a_point_without_a_usable_norm_is_left_out(odd):
    deltas = list(np.logspace(-8, 0, 9))
    assert span([*deltas[:4], odd, *deltas[4:]]) == pytest.approx(-8)


@pytest.mark.parametrize("deltas", [[1.0], [0.0, 1.0], [0.0, 0.0, inf], [nan, 1.0]])
def test_with_less_than_two_usable_points_there_is_no_span(deltas):
    assert math.isnan(span(deltas))


@pytest.mark.parametrize("deltas", [[], [nan, nan]])
def test_a_row_without_a_norm_has_no_profile(deltas):
    assert depth_profile(measured(stack(len(deltas)), "delta_norm", deltas)) is None


def test_an_empty_history_has_no_profile():
    assert depth_profile(History()) is None


def test_the_backward_pass_with_the_most_points_is_taken():
    deltas, passes = [1e-6, 5.0, 1e-3, 7.0, 1.0], [1, 0, 1, 0, 1]
    profile = depth_profile(measured(stack(5), "delta_norm", deltas, backward_pass=passes))
    assert [point.name for point in profile.points] == ["fc0", "fc2", "fc4"]
    assert profile.span == pytest.approx(-6)


def test_the_order_of_execution_counts_not_that_of_the_columns():
    history = History()
    history.add_points([Point(name, name) for name in "ac"])
    history.add_points([Point(name, name) for name in "abc"])
    history.append(Row(0, {"delta_norm": np.array([1e-4, 1.0, 1e-2])}))  # a, c, b
    assert depth_profile(history).delta_norm.tolist() == [1e-4, 1e-2, 1.0]


def test_a_point_younger_than_the_row_is_left_out():
    history = measured(stack(4), "delta_norm", [1e-3, 1e-2, 1e-1, 1.0])
    history.add_points([*stack(4)[:2], Point("late", "late"), *stack(4)[2:]])
    assert depth_profile(history).span == pytest.approx(-3)


def test_a_gain_is_the_norm_before_a_point_over_the_norm_behind_it():
    profile = depth_profile(measured(stack(3, "tanh"), "delta_norm", [1.0, 2.0, 6.0, 24.0, 120.0]))
    np.testing.assert_allclose(profile.gains, [np.nan, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_what_was_not_measured_or_is_not_finite_has_no_gain():
    profile = depth_profile(measured(stack(5), "delta_norm", [1.0, 0.0, 6.0, np.inf, 120.0]))
    assert np.isnan(profile.gains).all()


@pytest.mark.parametrize(
    ("logs", "start", "stop", "span"),
    [
        ([-4, -3, -2, -1, 0], 0, 5, -4.0),
        ([0, 0, -6, -5.5, -5, -4.5, -4], 2, 7, -2.0),  # grows again before it: a normalisation
        ([0, -3, 0, -3, 0], 1, 3, -1.0),  # branches beside each other; a point counts one decade at most
        ([0, -1, -2, -3], 0, 1, 0.0),
        ([0, -0.5, 0, 0.5, 0.2, 1.0], 1, 6, -1.5),
    ],
)
def test_the_section_is_the_stretch_that_loses_most(logs, start, stop, span):
    section = depth_profile(measured(stack(len(logs)), "delta_norm", 10.0 ** np.array(logs))).section
    assert (section.start, section.stop) == (start, stop)
    assert section.span == pytest.approx(span)


def test_the_section_equals_that_of_all_stretches_tried():
    rng = np.random.default_rng(0)
    for _ in range(50):
        logs = np.cumsum(rng.uniform(-1, 1, 12))
        section = depth_profile(measured(stack(12), "delta_norm", 10.0**logs)).section
        assert -section.span == pytest.approx(max(logs[j] - logs[i] for i in range(12) for j in range(i, 12)))


def test_the_effective_depth_counts_layers_that_get_a_thousandth_or_more():
    points = stack(4, "relu")
    profile = depth_profile(measured(points, "delta_norm", [0.0, 1e-9, 0.9e-3, 1e-3, 1.1e-3, 1.0, 1.0]))
    assert profile.effective_depth == (2, 4)
    nothing = depth_profile(measured(points, "delta_norm", [0.0] * 7))
    assert nothing.effective_depth == (0, 4)


def test_modules_are_layers_smallest_norm_first():
    profile = depth_profile(measured(stack(3, "tanh"), "delta_norm", [3.0, 0.1, 1.0, 0.1, 2.0]))
    assert profile.modules(profile.delta_norm > 0) == ("fc1", "fc2", "fc0")


def test_recent_profiles_skip_rows_without_one_newest_first():
    history = measured(stack(2), "delta_norm", [1.0, 1.0], [nan, nan], [1.0, 1.0], [1.0, 1.0])
    assert [profile.step for profile in recent_profiles(history, 3)] == [3, 2, 0]
    assert [profile.step for profile in recent_profiles(history, 2)] == [3, 2]


def test_a_branch_beside_the_others_is_no_depth():
    history = measured(stack(9), "delta_norm", [1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert abs(depth_profile(history).span) < 0.1


def test_a_decay_in_equal_steps_keeps_all_of_them():
    assert depth_profile(measured(stack(9), "delta_norm", np.logspace(-8, 0, 9))).span == pytest.approx(-8)


def with_norms(deltas, norms):
    points = stack(len(norms), "relu")
    history = History()
    history.layer_axis.merge([point.name for point in points if point.is_layer])
    history.add_points(points)
    history.append(Row(0, {"delta_norm": np.array(deltas), "spectral_norm": np.array(norms)}))
    return depth_profile(history)


@pytest.mark.parametrize(
    ("deltas", "norms", "choke"),
    [
        ([1e-6, 1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0], [1, 1, 1e-6, 1], 4),
        ([1e-6, 1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0], [1, 1, 0.5, 1], None),  # it is not the weights of that layer
        ([1.0, 1.0, 1e-6, 1e-6, 1.0, 1.0, 1.0], [1, 1, 1e-6, 1], None),  # a branch: it is well again before it
        ([1e-2, 1e-2, 1e-2, 1e-2, 1.0, 1.0, 1.0], [1, 1, 1e-6, 1], None),
        ([1e-6, 1e-6, 1e-6, 1e-6, 1.0], [1, 1, 1e-6], None),  # the head itself: behind it is the loss
        ([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [1, 1, 0.0, 1], None),  # zeros heal in a step
        ([1e-6, 1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0], [math.nan] * 4, None),
    ],
)
def test_a_choke_is_the_one_layer_before_which_nothing_is_left(deltas, norms, choke):
    assert with_norms(deltas, norms).choke == choke
