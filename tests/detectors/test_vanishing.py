import math

import numpy as np
import pytest

from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import measured, measured_too, stack, verdict

nan, inf = math.nan, math.inf


def profile(decades, points=9):
    return np.logspace(-decades, 0, points)


def lossy(layers, of_weights, of_activations):
    """Delta norms of a stack with activations: a factor for each step back through weights, and through activations."""
    factors = [of_weights if i % 2 == 0 else of_activations for i in range(2 * layers - 2)]
    return np.cumprod([1.0, *factors])[::-1]


# points, rows of delta norms -> verdict
TABLE = {
    "just inside the limit": (stack(9), [profile(2.99)], []),
    "just beyond the limit": (stack(9), [profile(3.01)], [("warning", "weight_scale", ("fc0", "fc1", "fc2"))]),
    "just inside the critical": (
        stack(9),
        [profile(7.9)],
        [("warning", "weight_scale", tuple(f"fc{i}" for i in range(6)))],
    ),
    "just beyond the critical": (
        stack(9),
        [profile(8.1)],
        [("critical", "weight_scale", tuple(f"fc{i}" for i in range(7)))],
    ),
    "growing": (stack(9), [profile(-9)], []),
    "flat": (stack(9), [profile(0)], []),
    "no row": (stack(9), [], []),
    "one odd batch": (stack(9), [profile(0), profile(9)], []),
    "recovered": (stack(9), [profile(9), profile(9), profile(0)], []),
    "nothing measured in the newest row": (stack(9), [profile(9), [nan] * 9], []),
    "a sample between that was not measured": (
        stack(3),
        [profile(5, 3), [nan] * 3, profile(5, 3)],
        [("warning", "weight_scale", ("fc0", "fc1"))],
    ),
    "two layers": (stack(2), [[1e-5, 1.0]], [("warning", "weight_scale", ("fc0",))]),
    "one layer": (stack(1), [[1e-5]], []),
    "a never-run layer between": (
        stack(4),
        [[1e-5, nan, 1e-2, 1.0]],
        [("warning", "weight_scale", ("fc0",))],
    ),
    "an overflowed layer between": (stack(4), [[1e-5, inf, 1e-2, 1.0]], [("warning", "weight_scale", ("fc0",))]),
    "all overflowed": (stack(4), [[inf] * 4], []),
    "all zero": (stack(4), [[0.0] * 4], []),
    "the first layer underflowed": (
        stack(4),
        [[0.0, 1e-8, 1e-4, 1.0]],
        [("critical", "weight_scale", ("fc0", "fc1", "fc2"))],
    ),
    "a branch with a zero init": (stack(4), [[1.0, 1.0, 0.0, 1.0]], []),
    "sigmoids": (
        stack(9, "sigmoid"),
        [lossy(9, 0.9, 0.2)],
        [("warning", "saturation", ("fc0", "fc1", "fc2", "fc3", "fc4", "fc5"))],
    ),
    "dead rectifiers": (
        stack(6, "relu"),
        [lossy(6, 0.9, 0.05)],
        [("warning", "dead_units", ("fc0", "fc1", "fc2", "fc3"))],
    ),
    "rectifiers that halve": (stack(20, "relu"), [lossy(20, 0.58, 0.7)], None),
    "a little at each of many layers": (stack(40, "relu"), [lossy(40, 1.18, 0.7)], None),
    "a section before a normalisation": (
        stack(41),
        [[*[1.0] * 30, *np.logspace(-6.1, 0, 8), 1.0, 1.0, 1.0]],
        [("warning", "weight_scale", ("fc30", "fc31", "fc32", "fc33", "fc34"))],
    ),
    "a section that loses less": (stack(41), [[*[1.0] * 30, *np.logspace(-5.9, 0, 8), 1.0, 1.0, 1.0]], []),
    "small weights": (stack(9, "tanh"), [lossy(9, 0.09, 0.99)], None),
}
CAUSES = {
    "rectifiers that halve": "weight_scale",
    "a little at each of many layers": "depth",
    "small weights": "weight_scale",
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    points, rows, expected = TABLE[case]
    found = verdict(VanishingGradient().judge(measured(points, "delta_norm", *rows)))
    if expected is None:
        assert [cause for _, cause, _ in found] == [CAUSES[case]]
    else:
        assert found == expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", TABLE)
def test_multiplying_the_loss_changes_no_verdict(case, scale):
    points, rows, _ = TABLE[case]
    scaled = [[scale * value for value in row] for row in rows]
    detector = VanishingGradient()
    plain = detector.judge(measured(points, "delta_norm", *rows))
    assert verdict(detector.judge(measured(points, "delta_norm", *scaled))) == verdict(plain)


@pytest.mark.parametrize("case", TABLE)
def test_points_that_never_run_change_no_verdict(case):
    points, rows, _ = TABLE[case]
    more = measured(points, "delta_norm", *rows)
    more.add_points([*points, *stack(99, "relu")[-5:]])
    plain = measured(points, "delta_norm", *rows)
    assert verdict(VanishingGradient().judge(more)) == verdict(VanishingGradient().judge(plain))


def test_healthy_layers_behind_the_last_one_do_not_hide_the_rest():
    deltas = [*profile(9), *[1.0] * 4]
    assert VanishingGradient().judge(measured(stack(13), "delta_norm", deltas))


def test_two_rows_on_end_are_enough_whatever_came_before():
    history = measured(stack(9), "delta_norm", profile(0), profile(0), profile(9), profile(9))
    assert VanishingGradient().judge(history)[0].step == 3


def test_the_evidence_is_the_span_and_the_gains():
    (found,) = VanishingGradient().judge(measured(stack(6, "tanh"), "delta_norm", lossy(6, 0.5, 0.1)))
    assert found.evidence["span"] == pytest.approx(5 * math.log10(0.05))
    assert found.evidence["weight_gain"] == pytest.approx(0.5)
    assert found.evidence["activation_gain"] == pytest.approx(0.1)


@pytest.mark.parametrize("limits", [{"max_decay": 0}, {"max_decay": 100}, {"critical_decay": 2.9}, {"max_decay": "4"}])
def test_a_limit_out_of_its_range_is_refused(limits):
    with pytest.raises(ValueError, match=rf"{next(iter(limits))} must be in .*, got {next(iter(limits.values()))!r}"):
        VanishingGradient(**limits)


ADAM, SGD = 1.0, 0.0


def run(decades, op=None, updates=ADAM, steps=(0,), losses=2.3):
    """The severities in a run with this decay, or with one decay a step: the newest of each row."""
    points = stack(9, op)
    history = History()
    history.add_points(points)
    found = []
    previous = -1
    for i, step in enumerate(steps):
        decay = decades[i] if isinstance(decades, list) else decades
        known = np.broadcast_to(losses, max(steps) + 1)[previous + 1 : step + 1]
        previous = step
        history.append(
            Row(
                step,
                {"delta_norm": profile(decay, len(points))},
                {} if updates is None else {"normalised_updates": updates},
                losses=known,
            )
        )
        found.append(next((str(f.severity) for f in VanishingGradient().judge(history)), ""))
    return found


@pytest.mark.parametrize(
    ("decades", "op", "updates", "expected"),
    [
        (5, "relu", SGD, "warning"),
        (5, "relu", ADAM, "info"),
        (5, "relu", None, "warning"),  # an optimizer that is not known may be plain
        (7.9, "relu", ADAM, "info"),
        (8.1, "relu", ADAM, "critical"),
        (8.1, "relu", SGD, "critical"),
    ],
)
def test_an_optimizer_that_scales_its_updates_is_given_time(decades, op, updates, expected):
    assert run(decades, op, updates) == [expected]


def test_what_does_not_heal_in_50_steps_is_a_warning():
    steps = (0, 1, 2, 4, 8, 16, 32, 50, 60)
    assert run(5, "relu", ADAM, steps) == [*["info"] * 7, "warning", "warning"]


def test_what_heals_was_never_an_alarm():
    assert run([5, 5, 5, 2, 2], "relu", ADAM, (0, 10, 20, 30, 60)) == ["info", "info", "info", "", ""]


def test_what_comes_back_has_50_steps_again():
    assert run([5, 2, 5, 5, 5, 5], "relu", ADAM, (0, 10, 20, 30, 60, 71))[2:] == ["", "info", "info", "warning"]


@pytest.mark.parametrize(("after", "expected"), [(2.6, "warning"), (2.3, "info"), (2.38, "info")])
def test_a_decay_that_came_with_a_rise_of_the_loss_is_told_at_once(after, expected):
    losses = np.array([2.3] * 11 + [after] * 20)
    assert run([0, 0, 5, 5], "relu", ADAM, (0, 10, 20, 30), losses) == ["", "", "", expected]


def test_a_decay_from_the_start_does_not_come_with_a_rise_of_the_loss():
    losses = np.array([2.3] * 11 + [2.6] * 20)
    assert run(5, "relu", ADAM, (0, 10, 20, 30), losses) == ["info"] * 4


def test_a_run_that_learns_gets_an_info():
    losses = np.linspace(2.3, 1.0, 101)
    assert run(5, "relu", SGD, (0, 50, 100), losses) == ["warning", "info", "info"]
    assert run(9, "relu", SGD, (0, 50, 100), losses) == ["critical", "warning", "warning"]


def test_bounded_activations_do_not_heal():
    sigmoids = lossy(9, 0.95, 0.2)  # 5.8 decades
    worse = lossy(9, 0.95, 0.18)  # 6.1 decades
    for deltas, expected in [(sigmoids, "info"), (worse, "warning")]:
        history = History()
        history.add_points(stack(9, "sigmoid"))
        history.append(Row(0, {"delta_norm": deltas}, {"normalised_updates": ADAM}))
        assert [str(finding.severity) for finding in VanishingGradient().judge(history)] == [expected]


@pytest.mark.parametrize(
    ("op", "at", "cause"),
    [("tanh", 3, "saturation"), ("relu", 3, "dead_units"), ("relu", 2, "weight_scale")],
)
def test_one_place_that_loses_most_is_the_cause(op, at, cause):
    # points fc0 act0 fc1 act1 fc2 ...: a point at `at` passes a millionth on, the layers lose a little each
    points = stack(4, op)
    deltas = np.cumprod([1.0, *[1e-6 if i == at else 0.4 for i in range(len(points) - 1, 0, -1)]])[::-1]
    history = History()
    history.add_points(points[:5])
    history.append(Row(0, {"delta_norm": deltas[:5]}))
    (finding,) = VanishingGradient().judge(history)
    assert finding.cause == cause


def test_one_layer_with_next_to_no_weights_is_named_first():
    points = stack(5)
    history = History()
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    deltas, norms = np.array([1e-6, 1e-6, 1.0, 1.0, 1.0]), np.array([1, 1, 1e-6, 1, 1])
    history.append(Row(0, {"delta_norm": deltas, "spectral_norm": norms}))
    assert verdict(VanishingGradient().judge(history)) == [("warning", "weight_scale", ("fc2", "fc0", "fc1"))]


def of_layers(ratios, steps=(0,), normalised=1.0, decades=5):
    points = stack(9)
    history = History()
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    for step in steps:
        values = {"delta_norm": profile(decades), "update_ratio": np.array(ratios)}
        history.append(Row(step, values, {"normalised_updates": normalised}))
    return history


@pytest.mark.parametrize(
    ("ratios", "normalised", "expected"),
    [
        ([1e-3] * 9, 1.0, "info"),
        ([1e-3] * 9, 0.0, "info"),  # what the step did counts, not the name of the optimizer
        ([1e-8] * 5 + [1e-3] * 4, 1.0, "warning"),  # Adam with an eps above the gradients
        ([1e-4] * 5 + [1e-3] * 4, 1.0, "info"),
        ([0.0] * 9, 1.0, "info"),  # a learning rate of 0: nothing is known but the name
        ([0.0] * 9, 0.0, "warning"),
        ([nan] * 9, 0.0, "warning"),
    ],
)
def test_what_the_optimizer_evens_out_is_given_time(ratios, normalised, expected):
    (finding,) = VanishingGradient().judge(of_layers(ratios, normalised=normalised))
    assert str(finding.severity) == expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [("fc1.out_proj", "warning"), ("fc7.out_proj", "info"), ("fc10", "info"), ("out_proj", "info")],
)
def test_a_layer_without_a_place_of_its_own_moves_with_the_one_that_it_is_a_part_of(part, expected):
    history = History()
    parts = [f"{part}.{i}" for i in range(4)]
    history.layer_axis.merge([*(point.name for point in stack(9)), *parts])
    history.add_points(stack(9))
    ratios = np.array([1e-5] * 6 + [1e-3] * 3 + [1e-5] * 4)
    history.append(Row(0, {"delta_norm": profile(5), "update_ratio": ratios}, {"normalised_updates": 1.0}))
    (finding,) = VanishingGradient().judge(history)
    assert str(finding.severity) == expected


@pytest.mark.parametrize(("decades", "expected"), [(3.5, "info"), (4.5, "warning")])
def test_with_less_than_4_decades_an_optimizer_that_evens_out_gets_there(decades, expected):
    (finding,) = VanishingGradient().judge(of_layers([1e-3] * 9, (0, 10, 20, 30, 40, 50, 60), decades=decades))
    assert str(finding.severity) == expected


def test_activations_that_nobody_saw_are_told_by_what_the_weights_would_pass_on():
    points = stack(9)
    history = History()
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    gain = 10 ** (-6 / 8)
    for norm, cause in [(2 * gain, "weight_scale"), (5 * gain, "saturation")]:
        history.append(Row(len(history), {"delta_norm": profile(6), "spectral_norm": np.full(9, norm)}))
        (finding,) = VanishingGradient().judge(history)
        assert finding.cause == cause
        assert finding.evidence["spectral_norm"] == norm


@pytest.mark.parametrize(("every", "cause"), [(3, "depth"), (8, "weight_scale")])
def test_where_layers_normalise_the_scale_of_the_weights_is_not_the_cause(every, cause):
    points = stack(24)
    history = History()
    history.layer_axis.merge([point.name for point in points])
    history.add_points(points)
    norms = np.where(np.arange(24) % every == 0, nan, 1.0)  # a normalisation has no matrix
    history.append(Row(0, {"delta_norm": profile(6, 24), "spectral_norm": norms}))
    assert [finding.cause for finding in VanishingGradient().judge(history)] == [cause]


@pytest.mark.parametrize(
    ("first", "ratios", "optimizers", "cause"),
    [
        (1.4, [0.1, 0.01, 0.01], 1.0, "learning_rate_too_large"),
        (1.6, [0.1, 0.01, 0.01], 1.0, "weight_scale"),  # a good part of it was lost from the start
        (1.4, [0.09, 0.09, 0.09], 1.0, "weight_scale"),  # no step was far too large for the weights
        (1.4, [0.01, 0.01, 1.0], 1.0, "weight_scale"),  # the newest step came after what is judged
        (1.4, [0.1, 0.01, 0.01], 2.0, "weight_scale"),
        (1.4, None, 1.0, "weight_scale"),
    ],
)
def test_steps_far_too_large_for_the_weights_are_the_cause_of_what_was_not_there_before(
    first, ratios, optimizers, cause
):
    history = measured(stack(9), "delta_norm", profile(first), profile(9), profile(9))
    history.layer_axis.merge([f"fc{i}" for i in range(9)])
    values = [{"update_ratio": [ratio] * 9, "weight_norm": [1.0] * 9} for ratio in ratios or ()]
    history = measured_too(history, *values or [{}], optimizers=optimizers)
    (finding,) = VanishingGradient().judge(history)
    assert (finding.severity.value, finding.cause) == ("critical", cause)


def test_bounded_activations_lose_the_gradient_whatever_the_steps_were():
    lost = lossy(9, 0.9, 0.05)
    history = measured(stack(9, "sigmoid"), "delta_norm", np.ones(17), lost, lost)
    history.layer_axis.merge([f"fc{i}" for i in range(9)])
    history = measured_too(history, {"update_ratio": [2.0] * 9, "weight_norm": [1.0] * 9}, optimizers=1.0)
    (finding,) = VanishingGradient().judge(history)
    assert finding.cause == "saturation"
