"""Inputs that a first layer cannot tell apart: each condition from both sides."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_gradflow.advice import explain
from lightning_gradflow.detectors.unscaled import UnscaledInputs, taken_up
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import stack, verdict

nan, inf = math.nan, math.inf

STILL = np.full(200, 2.3)
SICK = [("warning", "unscaled_inputs", ("fc0",))]


def run(
    mean=(0.0, 0.0),
    deviation=(1e-4, 1e-4),
    spreads=(1e-3, 1e-3),
    sizes=(0.5, 0.5),
    losses=STILL,
    interval=10,
    lr=None,
    points=None,
    first_deviation=None,
    **scalars,
):
    """A run that stands still with inputs of 1e-4, unless something else is asked for."""
    history = History()
    history.add_points(points or stack(2))
    history.add_features(len(deviation))
    mean, deviation = np.array(mean), np.array(deviation)
    last = -1
    for step in range(0, len(losses), interval):
        s = np.array(first_deviation) if step == 0 and first_deviation is not None else deviation
        values = {
            "input_rms": np.sqrt(mean**2 + s**2),
            "input_deviation": s,
            "output_spread": np.array(spreads),
            "output_rms": np.array(sizes),
        }
        rates = {} if lr is None else {"lr": lr(step)}
        history.append(Row(step, values, {**scalars, **rates}, losses=np.array(losses[last + 1 : step + 1])))
        last = step
    return history


def judged(**changes):
    return verdict(UnscaledInputs().judge(run(**changes)))


def test_a_run_that_stands_still_with_tiny_inputs_is_found_with_its_numbers():
    (finding,) = UnscaledInputs().judge(run(mean=(3e-4, 0.0), deviation=(1e-4, 7e-4)))
    assert (finding.kind, finding.step) == ("loss_plateau", 190)
    assert finding.evidence == {
        "steps": 190.0,
        "loss": 2.3,
        "input_deviation": pytest.approx(5e-4),
        "input_mean": pytest.approx(math.sqrt(4.5e-8)),
    }


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        ([0.0], [0.0099], SICK),
        ([0.0], [0.0101], []),
        ([101.0], [1.0], SICK),
        ([99.0], [1.0], []),
        ([0.0] * 100, [0.00099] * 100, SICK),  # the features add up
        ([0.0] * 100, [0.00101] * 100, []),
        ([0.0, 0.0], [1e-4, 1.0], []),  # one feature that tells is enough
        ([1e5, 0.0], [0.1, 1.0], SICK),  # unless another one outweighs it
        ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], []),  # constant features
        ([0.001] * 500, [math.sqrt(0.001 - 1e-6)] * 500, []),  # one-hot vectors
        ([0.13] * 500, [0.31] * 500, []),  # pixels in [0, 1]
        ([3.0], [0.0], []),  # nothing in them that could be scaled
        ([1e3], [0.9e-3], []),  # nor here, but rounding
        ([1e3], [1.1e-3], SICK),
        ([nan], [nan], []),
        ([inf, 0.0], [inf, 1e-4], SICK),
    ],
)
def test_the_contrast_decides(mean, deviation, expected):
    assert judged(mean=mean, deviation=deviation) == expected


def test_inputs_that_became_so_later_are_another_matter():
    assert judged(first_deviation=[1.0, 1.0]) == []
    assert judged(first_deviation=[2e-4, 2e-4]) == SICK


@pytest.mark.parametrize(
    ("spreads", "sizes", "expected"),
    [
        ([0.029, 0.01], [1.0, 1.0], SICK),
        ([0.031, 0.01], [1.0, 1.0], []),
        ([0.01, 0.031], [1.0, 1.0], []),  # a normalisation further back
        ([1.0, 1.0], [0.029, 1e-3], SICK),  # all of it differs, and there is little of it
        ([1.0, 1.0], [0.031, 1e-3], []),
        ([1e-3, 1e-3], [500.0, 500.0], SICK),  # a large offset is no size
        ([nan, 1e-3], [1.0, 1.0], SICK),
        ([nan, nan], [1.0, 1.0], []),  # not known
    ],
)
def test_a_layer_that_takes_the_inputs_up_makes_them_harmless(spreads, sizes, expected):
    assert judged(spreads=spreads, sizes=sizes) == expected


@pytest.mark.parametrize(
    ("left", "spreads", "expected"),
    [(0.51, [0.01, 0.5], SICK), (0.49, [0.01, 0.5], []), (0.51, [0.062, 0.5], []), (nan, [0.01, 0.5], [])],
)
def test_a_last_layer_that_has_found_a_constant_takes_nothing_up(left, spreads, expected):
    history = run(spreads=spreads)
    again = History()
    again.add_points(history.points)
    again.add_features(2)
    for i, row in enumerate(history.rows):
        again.append(replace(row, values={**row.values, "delta_norm": np.full(2, left if i else 1.0)}))
    assert verdict(UnscaledInputs().judge(again)) == expected


@pytest.mark.parametrize(
    ("at", "spreads", "losses", "expected"),
    [
        (None, [0.01, 0.5], STILL, []),
        ("fc1", [0.01, 0.5], STILL, SICK),  # dropout makes them differ
        ("fc1", [0.062, 0.5], STILL, []),
        ("fc0", [0.01, 0.01], STILL, []),  # nothing is known
        ("gone", [0.01, 0.5], STILL, []),
        ("fc1", [0.01, 0.5], np.repeat([2.3, 1.0], 100), []),  # weights that have learnt do so too
        ("fc1", [0.01, 0.01], np.repeat([2.3, 1.0], [60, 140]), SICK),
    ],
)
def test_what_differs_behind_dropout_is_no_sign_while_nothing_is_learnt(at, spreads, losses, expected):
    layers = ["fc0", "fc1", "gone"]
    history = run(spreads=spreads, losses=losses, **({"dropped_at": float(layers.index(at))} if at else {}))
    history.layer_axis.merge(layers)
    assert history.dropped_at == at
    assert verdict(UnscaledInputs().judge(history)) == expected


def test_what_an_activation_gives_is_not_asked():
    points = [Point("fc0", "fc0"), Point("act0", "act0", "tanh"), Point("fc1", "fc1")]
    assert taken_up(run(points=points, spreads=[0.1, 1.0, 0.2], sizes=[0.5, 1.0, 0.5])) == pytest.approx(0.1)


def test_without_outputs_nothing_is_known():
    history = History()
    history.add_points(stack(2))
    history.add_features(1)
    values = {"input_rms": np.array([1e-4]), "input_deviation": np.array([1e-4])}
    for step in range(0, 200, 10):
        history.append(Row(step, values, losses=np.full(10, 2.3)))
    assert math.isnan(taken_up(history))
    assert UnscaledInputs().judge(history) == []


def test_an_input_that_was_never_measured_is_not_judged():
    history = History()
    history.append(Row(190, losses=STILL))
    assert UnscaledInputs().judge(history) == []
    assert UnscaledInputs().judge(History()) == []


@pytest.mark.parametrize(
    ("length", "planned", "expected"),
    [
        (41, nan, []),
        (51, nan, SICK),
        (51, 250.0, SICK),
        (51, 300.0, []),
        (61, 300.0, SICK),
        (291, 1e6, []),
        (301, 1e6, SICK),
    ],
)
def test_a_run_has_time_to_learn(length, planned, expected):
    assert judged(losses=np.full(length, 2.3), planned_steps=planned) == expected


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (lambda step: 0.1, SICK),
        (lambda step: 0.001 * (step + 1), []),  # it rises still
        (lambda step: 0.001 * min(step, 140), SICK),
        (lambda step: 0.001 * min(step, 150), []),  # 40 steps since
        (lambda step: 0.1 if step < 190 else 0.009, []),  # the tail of a schedule
        (lambda step: 0.1 if step < 190 else 0.011, SICK),
    ],
)
def test_steps_count_from_where_the_learning_rate_is_what_it_is_going_to_be(lr, expected):
    assert judged(lr=lr) == expected


def _steps(*levels):
    return np.repeat(levels, 200 // len(levels)).astype(float)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.linspace(2.3, 2.25, 200), SICK),
        (np.linspace(2.3, 1.3, 200), []),
        (_steps(30.0, 1.0, 1.0, 1.0), SICK),  # the best constant was found, and no more
        (_steps(30.0, 1.0, 1.0, 0.97), []),  # it goes on
        (_steps(30.0, 1.0, 1.0, 0.985), SICK),
        (1 + 0.3 * np.sin(np.arange(200)), SICK),
        (np.full(200, nan), []),
    ],
)
def test_a_run_that_learns_is_left_alone(losses, expected):
    assert judged(losses=losses) == expected


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(factor):
    for losses in (_steps(30.0, 1.0, 1.0, 0.97), _steps(30.0, 1.0, 1.0, 0.985), STILL):
        assert judged(losses=losses * factor) == judged(losses=losses)


def test_inputs_that_are_only_too_large_are_the_business_of_others():
    """A network that has little left to learn stands still as well."""
    # of standard deviation 3: the first layer can tell them apart
    large = {"mean": [30.0, 0.0], "deviation": [3.0, 3.0], "sizes": [50.0, 0.5]}
    assert judged(**large, spreads=[0.3, 0.5], losses=STILL[:101]) == []


@pytest.mark.parametrize(
    ("sizes", "spreads", "expected"),
    [
        ((4e-23, 1e-2), (0.9, 1e-7), SICK),  # bumps that all stand elsewhere
        ((50.0, 0.5), (1e-7, 1e-3), SICK),  # a first layer of which only the offset comes through
        ((4e-23, 0.5), (0.9, 0.5), []),  # something behind it finds out what differs: a normalisation
        ((0.0, 1e-2), (0.0, 1e-7), []),  # zero weights hide any inputs
        ((1e-8, 1e-2), (0.9, 1e-7), []),  # weights that are made for such inputs
    ],
)
def test_large_inputs_of_which_nothing_comes_through_are_found(sizes, spreads, expected):
    large = {"deviation": [2000.0, 30.0]}
    assert judged(**large, sizes=sizes, spreads=spreads) == expected


def test_large_inputs_of_a_run_that_learns_are_left_alone():
    large = {"deviation": [2000.0, 30.0], "sizes": [4e-23, 1e-2], "spreads": [0.9, 1e-3]}
    assert judged(**large, losses=np.linspace(2.3, 0.5, 401)) == []
    assert judged(**large, losses=np.concatenate([np.linspace(2.3, 0.5, 200), np.full(201, 0.5)])) == []


def test_several_optimizers_are_not_judged():
    assert judged(optimizers=1.0) == SICK
    assert judged(optimizers=2.0) == []


def test_more_layers_that_are_as_blind_change_nothing():
    assert judged(points=stack(4), spreads=[1e-3] * 4, sizes=[0.5] * 4) == SICK


# -- inputs so large that the first steps have overwritten the weights


def overgrown(
    size=100.0,
    first_size=None,
    output=30.0,
    step=0.5,
    growth=(10.0, 10.0, 10.0),
    gains=(1.0, 1.0, 1.0),
    residual=0.7,
    losses=STILL,
    **scalars,
):
    """A run on inputs of 100, whose weights have become ten times as large, and that stands still since."""
    history = History()
    history.layer_axis.merge(["fc0", "fc1", "fc2"])
    history.add_points(stack(3))
    history.add_features(2)
    last = -1
    for at in range(0, len(losses), 10):
        is_first = at == 0
        values = {
            "input_rms": np.full(2, first_size if is_first and first_size is not None else size),
            "output_rms": np.full(3, output),
            "spectral_norm": np.array(gains),
            "weight_norm": np.ones(3) if is_first else np.array(growth),
            "update_ratio": np.full(3, step if is_first else 1e-4),
            "delta_norm": np.array([3.0, 2.0, 1.0]) if is_first else np.array([1e-3, 1e-3, residual]),
        }
        history.append(Row(at, values, scalars, losses=np.array(losses[last + 1 : at + 1])))
        last = at
    return history


def overgrown_judged(**changes):
    return verdict(UnscaledInputs().judge(overgrown(**changes)))


def test_overwritten_weights_are_found_with_the_features_that_did_it():
    (finding,) = UnscaledInputs().judge(overgrown())
    assert (finding.kind, finding.step, finding.layers) == ("loss_plateau", 190, ("fc0",))
    assert finding.evidence == {"steps": 190.0, "loss": 2.3, "features": 2.0, "feature_0": 100.0, "feature_1": 100.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 10.1}, SICK),
        ({"size": 9.9}, []),
        ({"output": 2.1}, SICK),
        ({"output": 1.9}, []),  # weights made for such inputs, or a normalisation
        ({"first_size": 5.0}, []),  # they have become so: that is another fault
        ({"step": 0.11}, SICK),
        ({"step": 0.09}, []),
        ({"growth": (3.1, 3.1, 1.0)}, SICK),
        ({"growth": (2.9, 2.9, 50.0)}, []),
        ({"growth": (1.0, nan, 3.1)}, []),
        ({"gains": (0.51, 0.51, 0.51)}, SICK),
        ({"gains": (0.49, 0.49, 0.49)}, []),  # they started too small, and to grow is the way out
        ({"residual": 0.51}, SICK),
        ({"residual": 0.49}, []),  # something was learnt
        ({"residual": nan}, []),
        ({"losses": STILL[:41]}, []),
        ({"losses": STILL[:51]}, SICK),
        ({"losses": _steps(14.0, 2.3, 2.3, 2.3)}, SICK),  # a start that is as absurd as the inputs
        ({"losses": _steps(14.0, 2.3, 2.3, 2.2)}, []),  # it goes on
        ({"losses": _steps(14.0, 2.3, 2.3, 2.29)}, SICK),
        ({"optimizers": 2.0}, []),
    ],
)
def test_each_sign_of_overwritten_weights_is_needed(changes, expected):
    assert overgrown_judged(**changes) == expected


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter_to_overwritten_weights(factor):
    for losses in (_steps(14.0, 2.3, 2.3, 2.3), _steps(14.0, 2.3, 2.3, 2.2)):
        assert overgrown_judged(losses=losses * factor) == overgrown_judged(losses=losses)


def test_without_gradients_nothing_is_known_of_overwritten_weights():
    history = overgrown()
    bare = History()
    bare.layer_axis.merge(history.layers)
    bare.add_points(history.points)
    bare.add_features(2)
    for row in history.rows:
        left = {name: x for name, x in row.values.items() if name != "delta_norm"}
        bare.append(Row(row.step, left, row.scalars, losses=np.full(10, 2.3)))
    assert UnscaledInputs().judge(bare) == []


@pytest.mark.parametrize(
    ("argument", "value"), [("min_contrast", 1.0), ("min_contrast", -0.1), ("patience", 0), ("patience", 1.5)]
)
def test_limits_have_ranges(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        replace(UnscaledInputs(), **{argument: value})


# -- inputs so large that the outputs of a regression start far beyond the targets


def beyond(
    size=50.0, first=33.0, errors=(33.0, 2.0), deviation=1.0, length=101, planned_steps=500.0, output=75.0, **said
):
    """A loss that falls all the time, with the first and the later errors of the samples."""
    history = History()
    history.add_points(stack(2))
    history.add_features(2)
    losses = np.geomspace(1000.0, 4.0, length)
    for step in range(0, length, 10):
        values = {"input_rms": [size] * 2, "input_deviation": [size] * 2, "output_rms": [output, 3.0]}
        sizes = {"compared_rms": first if step == 0 else 2.0, "residual_rms": errors[min(step, 1)]}
        scalars = {"target_deviation": deviation, "planned_steps": planned_steps, **sizes, **said}
        row = {name: np.array(value) for name, value in values.items()} | {"output_spread": np.array([0.9, 0.9])}
        history.append(Row(step, row, scalars, losses=losses[max(0, step - 9) : step + 1]))
    return UnscaledInputs().judge(history)


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({"first": 10.1}, {"first": 9.9}),
        ({"size": 10.1}, {"size": 9.9}),
        ({"output": 2.1}, {"output": 1.9}),  # the first layer is made for them
        ({"errors": (33.0, 1.01)}, {"errors": (33.0, 0.99)}),  # better than a constant
        ({"errors": (10.1, 2.0)}, {"errors": (9.9, 2.0)}),  # the targets are as large as the outputs
        ({"deviation": 1.9}, {"deviation": 0.0}),
        ({}, {"deviation": nan}),
        ({}, {"first": nan}),  # no regression
        ({"planned_steps": 500.0}, {"planned_steps": 510.0}),
        ({"planned_steps": nan, "length": 301}, {"planned_steps": nan, "length": 291}),
        ({"planned_steps": 100.0, "length": 51}, {"planned_steps": 100.0, "length": 41}),
        ({"optimizers": 1.0}, {"optimizers": 2.0}),
    ],
)
def test_a_regression_that_is_on_the_way_back_from_its_inputs_from_both_sides(sick, well):
    assert verdict(beyond(**sick)) == SICK
    assert beyond(**well) == []


def test_one_sample_that_came_near_is_enough_to_say_nothing():
    history = History()
    history.add_points(stack(2))
    history.add_features(1)
    for step, error in ((0, 33.0), (50, 0.9), (100, 2.0)):
        values = {"input_rms": np.array([50.0]), "output_rms": np.array([75.0, 3.0])}
        said = {"compared_rms": 33.0, "residual_rms": error, "target_deviation": 1.0, "planned_steps": 500.0}
        history.append(Row(step, values, said, losses=np.full(20, 9.0)))
    assert UnscaledInputs().judge(history) == []


def test_the_outputs_and_the_targets_are_in_the_words():
    (finding,) = beyond()
    assert finding.evidence["output_rms"] == 33.0
    words = explain(finding)
    assert "Little or nothing is learnt" in words
    assert "the first outputs were 33 (rms), and the targets differ by 1" in words
    assert "the worst, by index: 0 (rms 50), 1 (rms 50)" in words
