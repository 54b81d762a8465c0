import math

import numpy as np
import pytest

from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import measured, measured_too, stack, verdict

nan, inf = math.nan, math.inf


def profile(decades, points=9):
    return np.logspace(decades, 0, points)


DEPTH = {
    "just inside the limit": ([profile(2.99)], []),
    "just beyond the limit": ([profile(3.01)], [("warning", "weight_scale", ("fc0", "fc1", "fc2"))]),
    "slowly over many layers": ([profile(3.5, 41)], [("warning", "depth", tuple(f"fc{i}" for i in range(18)))]),
    "vanishing": ([profile(-9)], []),
    "no row": ([], []),
    "one odd batch": ([profile(0), profile(9)], []),
    "recovered": ([profile(9), profile(0)], []),
    "a never-run layer": ([[1e5, nan, 1e2, 1.0]], [("warning", "weight_scale", ("fc0",))]),
    "an overflowed layer": ([[inf, 1e8, 1e4, 1.0]], [("warning", "weight_scale", ("fc1", "fc2"))]),
    "all overflowed": ([[inf] * 4], []),
    "zeros": ([[0.0] * 4], []),
    "one layer": ([[1e9]], []),
}


def with_depth(rows, scale=1.0):
    return measured(stack(len(rows[0]) if rows else 4), "delta_norm", *[[scale * v for v in row] for row in rows])


@pytest.mark.parametrize("case", DEPTH)
def test_the_table_of_growth_with_depth(case):
    rows, expected = DEPTH[case]
    assert verdict(ExplodingGradient().judge(with_depth(rows))) == expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", DEPTH)
def test_multiplying_the_loss_changes_no_verdict_on_depth(case, scale):
    rows, expected = DEPTH[case]
    assert verdict(ExplodingGradient().judge(with_depth(rows, scale))) == expected


def in_time(totals, losses, scale=1.0, extra=()):
    history = History()
    history.layer_axis.merge(["fc0", "fc1", *extra])
    for step, (total, loss) in enumerate(zip(totals, losses, strict=True)):
        norms = np.array([0.9 * total * scale, 0.1 * total * scale, *[1e-3 * scale for _ in extra]])
        history.append(Row(step, {"grad_norm": norms}, {"grad_norm_total": scale * total, "loss": scale * loss}))
    return history


SICK = [("warning", "learning_rate_too_large", ("fc0", "fc1"))]
TIME = {
    "just inside the limit": ([1.0] * 8 + [999.0] * 2, [2.0] * 8 + [9.0] * 2, []),
    "just beyond the limit": ([1.0] * 8 + [1001.0] * 2, [2.0] * 8 + [9.0] * 2, SICK),
    "the loss still falls": ([1.0] * 8 + [1001.0] * 2, [2.0] * 8 + [1.9] * 2, []),
    "one wild step": ([1.0] * 9 + [1001.0], [2.0] * 9 + [9.0], []),
    "too short a past": ([1.0] * 7 + [1001.0] * 2, [2.0] * 7 + [9.0] * 2, []),
    "a past with a wild step": ([1.0] * 4 + [1e9] + [1.0] * 4 + [1001.0] * 2, [2.0] * 9 + [9.0] * 2, SICK),
    "a past of zeros": ([0.0] * 8 + [1001.0] * 2, [2.0] * 8 + [9.0] * 2, []),
    "skipped steps in the past": ([1.0, inf, nan] + [1.0] * 8 + [1001.0] * 2, [2.0] * 11 + [9.0] * 2, SICK),
    "infinite now": ([1.0] * 8 + [1001.0, inf], [2.0] * 8 + [9.0] * 2, []),
    "a NaN in the loss of old": ([1.0] * 8 + [1001.0] * 2, [2.0, inf, nan] + [2.0] * 5 + [9.0] * 2, SICK),
    "the loss is infinite": ([1.0] * 8 + [1001.0] * 2, [2.0] * 8 + [inf] * 2, SICK),
    "no loss known": ([1.0] * 8 + [1001.0] * 2, [nan] * 10, []),
}


@pytest.mark.parametrize("case", TIME)
def test_the_table_of_growth_in_time(case):
    totals, losses, expected = TIME[case]
    assert verdict(ExplodingGradient().judge(in_time(totals, losses))) == expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", TIME)
def test_multiplying_the_loss_changes_no_verdict_on_time(case, scale):
    totals, losses, expected = TIME[case]
    assert verdict(ExplodingGradient().judge(in_time(totals, losses, scale))) == expected


@pytest.mark.parametrize("case", TIME)
def test_healthy_layers_stand_behind_the_sick_ones(case):
    totals, losses, expected = TIME[case]
    found = verdict(ExplodingGradient().judge(in_time(totals, losses, extra=("fc2", "fc3"))))
    assert [layers[:2] for _, _, layers in found] == [layers for _, _, layers in expected]


def test_layers_that_never_run_change_no_verdict():
    history = in_time(*TIME["just beyond the limit"][:2])
    history.layer_axis.merge(["unused"])
    assert verdict(ExplodingGradient().judge(history)) == SICK


@pytest.mark.parametrize(
    ("name", "value"), [("max_growth", 0), ("max_growth", 100), ("max_jump", 1), ("max_jump", inf)]
)
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in .*, got {value}"):
        ExplodingGradient(**{name: value})


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([profile(9)], "weight_scale"),
        ([profile(1), profile(9), profile(9)], "learning_rate_too_large"),
        ([profile(3), profile(9), profile(9)], "weight_scale"),
    ],
)
def test_what_was_well_at_first_was_spoilt_by_the_steps(rows, cause):
    history = measured(stack(9), "delta_norm", *rows)
    assert [finding.cause for finding in ExplodingGradient().judge(history)] == [cause]


def test_a_skipped_step_of_a_scaler_is_no_growth_in_time():
    history = in_time([1.0] * 8, [2.0] * 8)
    for step in (8, 9):
        facts = {"grad_norm_total": 1e9, "loss": 9.0, "loss_scale": 65536.0, "step_skipped": 1.0}
        history.append(Row(step, {"grad_norm": np.full(2, 1e9)}, facts))
    assert ExplodingGradient().judge(history) == []


@pytest.mark.parametrize(("skipped", "found"), [(1.0, 0), (0.0, 1)])
def test_a_skipped_step_of_a_scaler_is_no_growth_with_depth(skipped, found):
    history = History()
    history.add_points(stack(9))
    for step in (0, 1):
        history.append(Row(step, {"delta_norm": profile(9)}, {"step_skipped": skipped}))
    assert len(ExplodingGradient().judge(history)) == found


def test_a_skipped_step_is_not_what_the_run_was_like_at_first():
    history = History()
    history.add_points(stack(9))
    for step, (decades, skipped) in enumerate([(0, 1.0), (9, 0.0), (9, 0.0)]):
        history.append(Row(step, {"delta_norm": profile(decades)}, {"step_skipped": skipped}))
    assert [finding.cause for finding in ExplodingGradient().judge(history)] == ["weight_scale"]


def of_layers(decades, ratios, losses=(2.3,)):
    points = stack(9)
    history = History()
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    history.append(Row(0, {"delta_norm": profile(decades), "update_ratio": np.array(ratios)}, losses=np.array(losses)))
    return [str(finding.severity) for finding in ExplodingGradient().judge(history)]


@pytest.mark.parametrize(
    ("decades", "ratios", "expected"),
    [
        (3.5, [1e-3] * 9, ["info"]),  # as with Adam
        (3.5, [1e0] * 3 + [1e-3] * 6, ["warning"]),  # as with SGD
        (4.5, [1e-3] * 9, ["warning"]),
    ],
)
def test_what_the_optimizer_evens_out_is_info_below_4_decades(decades, ratios, expected):
    assert of_layers(decades, ratios) == expected


def test_a_run_that_learns_gets_an_info():
    assert of_layers(5, [1e-3] * 9, np.linspace(2.3, 1.0, 100)) == ["info"]


def test_inputs_that_have_become_larger_are_the_cause_and_one_sample_is_enough():
    history = in_time([1.0] * 12, [0.5] * 12)
    history.add_features(2)
    history = measured_too(history, {"input_rms": [1.0, 1.0]})
    values = {"grad_norm": np.array([9e4, 1e4]), "input_rms": np.array([1.0, 255.0])}
    history.append(Row(12, values, {"grad_norm_total": 1e5, "loss": 50.0}))
    (finding,) = ExplodingGradient().judge(history)
    assert (finding.cause, finding.evidence["feature_1"]) == ("unscaled_inputs", 255.0)
    calm = in_time([1.0] * 12, [0.5] * 12)
    calm.append(Row(12, {"grad_norm": np.array([9e4, 1e4])}, {"grad_norm_total": 1e5, "loss": 50.0}))
    assert ExplodingGradient().judge(calm) == []


def at_start(outputs, inputs=(1.0,), rows=1, spread=None, frozen=()):
    """`outputs` are the rms of each layer's output, `spread` the shares of it by which samples differ."""
    points = stack(len(outputs))
    shares = [1.0] * len(outputs) if spread is None else spread
    history = measured(points, "delta_norm", *[[1.0] * len(outputs)] * rows, output_rms=outputs, output_spread=shares)
    history.layer_axis.merge([point.name for point in points])
    norms = np.array([nan if i in frozen else 1.0 for i in range(len(outputs))])
    history.add_features(len(inputs))
    return measured_too(history, {"grad_norm": norms, **({"input_rms": inputs} if inputs else {})})


LARGE = ("warning", "weight_scale", ("fc1", "fc2", "fc0"))
START = {
    "just below the limit": ({"outputs": [2.0, 6.0, 29.9]}, []),
    "just above the limit": ({"outputs": [1.5, 9.0, 30.1]}, [LARGE]),
    "no more than the inputs": ({"outputs": [5.0, 6.0, 90.0], "inputs": (8.0, 9.0)}, []),
    "unscaled inputs": ({"outputs": [900.0, 60.0, 90.0], "inputs": (500.0,)}, "unscaled_inputs"),
    "inputs that are made up for": ({"outputs": [1.0, 60.0, 90.0], "inputs": (500.0,)}, []),
    "tokens": ({"outputs": [1.5, 9.0, 46.0], "inputs": ()}, [("warning", "weight_scale", ("fc1", "fc2", "fc0"))]),
    "all of it an offset": ({"outputs": [1.0, 3.0, 300.0], "spread": [1.0, 1.0, 0.01]}, []),
    "a frozen layer that is to scale": ({"outputs": [1.0, 2.0, 640.0], "frozen": (2,)}, []),
    "only in between": ({"outputs": [1.0, 5000.0, 1.0]}, []),
    "one layer": ({"outputs": [5000.0]}, []),
    "not at the start any more": ({"outputs": [1.5, 9.0, 30.1], "rows": 4}, []),
}


@pytest.mark.parametrize("case", START)
def test_outputs_that_no_initialisation_is_meant_to_give_are_told_at_once(case):
    made, expected = START[case]
    found = verdict(ExplodingGradient().judge(at_start(**made)))
    assert found == expected or [cause for _, cause, _ in found] == [expected]


@pytest.mark.parametrize(
    ("outputs", "is_matrix", "is_found"),
    [
        ([30.0, 30.0, 30.1], False, True),  # an embedding is drawn with 1, whatever it gives
        ([30.0, 30.0, 29.9], False, False),
        ([30.0, 30.0, 40.0], True, False),  # of a matrix the inputs may be as large
        ([0.1, 1.0, 30.1], False, True),  # a small one does not make up for what comes behind
    ],
)
def test_an_embedding_that_comes_first_is_compared_with_a_usual_one(outputs, is_matrix, is_found):
    norms = {"spectral_norm": [1.0 if is_matrix else nan, 1.0, 1.0]}
    found = ExplodingGradient().judge(measured_too(at_start(outputs, inputs=()), norms))
    assert [finding.cause for finding in found] == ["weight_scale"] * is_found


def in_loss(losses, interval=5, growth=20.0, norms=(1.0, 2.0)):
    """`growth` is that of the gradient in the newest row."""
    history = History()
    history.layer_axis.merge(["fc0", "fc1"])
    for start in range(0, len(losses), interval):
        part = np.array(losses[start : start + interval], dtype=float)
        total = growth if start + interval >= len(losses) else 1.0
        scalars = {"grad_norm_total": total}
        history.append(Row(start + len(part) - 1, {"grad_norm": np.array(norms)}, scalars, losses=part))
    return history


FALLING = list(np.linspace(2.3, 0.3, 50))
LOSS = {
    "out of its range for good": ([*FALLING, *[25.0] * 5], [("warning", "unknown", ("fc1", "fc0"))]),
    "not by ten times": ([*FALLING, *[19.0] * 5], []),
    "two batches of five": ([*FALLING, 99.0, 0.3, 99.0, 0.3, 0.3], []),
    "three batches of five": ([*FALLING, 99.0, 0.3, 99.0, 99.0, 0.3], [("warning", "unknown", ("fc1", "fc0"))]),
    "out of its range at the step of a sample": (
        [*FALLING[:-1], *[25.0] * 6],
        [("warning", "unknown", ("fc1", "fc0"))],
    ),
    "two steps before a sample": ([*FALLING[:-2], *[25.0] * 7], [("warning", "unknown", ("fc1", "fc0"))]),
    "of old": ([*FALLING[:-3], *[25.0] * 8], []),  # told at the sample before
    "a young run": ([*FALLING[:30], *[99.0] * 5], []),
    "an offset": ([1000 + x for x in [*FALLING, *[19.0] * 5]], []),
    "below zero": ([x - 100 for x in [*FALLING, *[25.0] * 5]], [("warning", "unknown", ("fc1", "fc0"))]),
}


@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
@pytest.mark.parametrize("case", LOSS)
def test_a_loss_that_leaves_its_range_is_told_whatever_its_size(case, scale):
    losses, expected = LOSS[case]
    assert verdict(ExplodingGradient().judge(in_loss([scale * x for x in losses]))) == expected


def test_a_loss_that_was_changed_on_purpose_leaves_the_gradients_as_they_were():
    losses, _ = LOSS["out of its range for good"]
    assert ExplodingGradient().judge(in_loss(losses, growth=9.0)) == []


@pytest.mark.parametrize("missing", ["grad_norm", "output_spread", "output_rms", "input_rms"])
def test_where_something_was_not_measured_the_start_is_judged_by_the_rest(missing):
    history = measured_too(at_start([1.5, 9.0, 46.0]), {missing: None})
    known = missing in ("grad_norm", "input_rms")
    assert [finding.cause for finding in ExplodingGradient().judge(history)] == ["weight_scale"] * known
