"""Weights that are zero and that no step can change."""

import math

import numpy as np
import pytest

from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.known import ROOT
from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.detectors.zero_weights import ZeroWeights, zero_weights
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
NONE = ZeroWeights()


def run(*rows, points=None, layers=None, lr=0.1, loss=2.3, steps=None, floor=-149.0):
    """Rows of three layers: `zero` weights, `out`puts, `delta`s, `norm`s of gradients, and `dead` units."""
    points = stack(3) if points is None else points
    names = {
        "zero": "zero_weights",
        "out": "output_rms",
        "delta": "delta_norm",
        "norm": "grad_norm",
        "dead": "dead_fraction",
        "missing": "grad_missing_fraction",
        "moved": "update_norm",
        "table": "embedding_rms",
        "spectral": "spectral_norm",
    }
    history = History()
    history.layer_axis.merge(layers or [point.module for point in points if point.is_layer])
    history.add_points(points)
    rates = lr if isinstance(lr, list) else [lr] * len(rows)
    for step, row, rate in zip(steps or range(len(rows)), rows, rates, strict=True):
        values = {names[key]: np.array(numbers, dtype=float) for key, numbers in row.items()}
        history.append(Row(step, values, {"lr": rate, "delta_floor": floor}, losses=np.array([loss])))
    return history


# the last two of three layers are zero: the last one gets a gradient and no input, the one before it no gradient
PAIR = {"zero": [0, 1, 1], "out": [0.5, 0, 0], "delta": [0, 0, 0.3], "norm": [0, 0, 0.1], "missing": [0] * 3}
LATER = {**PAIR, "zero": [nan, 1, 1]}
BOTH = ZeroWeights(("fc1", "fc2"), frozenset({"fc2"}))


def test_two_layers_that_wait_for_each_other_are_found_with_the_third_sample():
    assert zero_weights(run(PAIR, LATER)) == NONE
    assert zero_weights(run(PAIR, LATER, LATER)) == BOTH
    assert verdict(NoGradient().judge(run(PAIR, LATER, LATER))) == [("warning", "initialisation", ("fc1", "fc2"))]


@pytest.mark.parametrize("loss", [2.3e-6, 2.3e6])
def test_the_size_of_the_loss_makes_no_difference(loss):
    scaled = [{**row, "delta": np.array(row["delta"]) * loss, "norm": [0, 0, loss]} for row in (PAIR, LATER, LATER)]
    assert zero_weights(run(*scaled, loss=loss)) == BOTH


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"delta": [0, nan, 0.3]}, BOTH),  # a recurrence of which only the last state is used
        ({"delta": [0.1, 0.1, 0.3]}, NONE),  # a gradient comes past what is zero
        ({"out": [0.5, 0.1, 0.2]}, NONE),  # it has a bias: the next one gets an input
        ({"out": [0.5, 0, 0.2]}, BOTH),
        ({"delta": [0.3, 0, 0]}, NONE),  # two heads of losses that come later
        ({"zero": [nan, nan, 1]}, NONE),
        ({"zero": [nan, 1, nan]}, NONE),
    ],
)
def test_both_must_have_a_part_in_it(change, expected):
    assert zero_weights(run({**PAIR, **change}, *[{**LATER, **change}] * 2)) == expected


def test_steps_of_no_length_prove_nothing():
    rows = [PAIR, LATER, LATER, LATER]
    assert zero_weights(run(*rows, lr=[0.0, 0.0, 0.1, 0.1])) == NONE
    assert zero_weights(run(*rows, lr=[0.0, 0.1, 0.1, 0.1])) == BOTH
    assert zero_weights(run(*rows, lr=nan)) == BOTH


def test_a_chain_that_comes_free_is_given_time():
    free = {**PAIR, "zero": [nan, 1, 0]}
    assert zero_weights(run(PAIR, LATER, free)) == NONE
    rows = [{**PAIR, "zero": [1, 1, 1]}, {**LATER, "zero": [1, 1, 1]}, {**LATER, "zero": [0, 1, 1]}]
    assert zero_weights(run(*rows)) == NONE
    assert zero_weights(run(*rows, LATER)) == NONE
    assert zero_weights(run(*rows, LATER, LATER)) == BOTH


def test_what_was_not_zero_once_is_not_looked_at():
    assert zero_weights(run({**PAIR, "zero": [0, 0, 1]}, LATER, LATER, LATER)) == NONE


ADAPTER = {"zero": [0, 2, 0], "out": [1, 1, 1], "delta": [0.2, 0.2, 0.3], "norm": [0.1, 0, 0.1]}


@pytest.mark.parametrize(("count", "expected"), [(2, ZeroWeights(("fc1",))), (1, NONE)])
def test_a_layer_is_a_product_in_itself_if_it_has_two_of_them(count, expected):
    rows = [{**ADAPTER, "zero": [np.nan, count, np.nan]}] * 3
    assert zero_weights(run(*rows, steps=[0, 30, 60])) == expected


def test_two_weights_of_a_layer_may_wait_for_inputs_of_their_own_while_the_run_learns():
    rows = [{**ADAPTER, "zero": [nan, 2, nan]}] * 3
    assert zero_weights(run(*rows)) == NONE  # too young to tell
    learns = run(*rows, steps=[0, 30, 60])
    history = History()
    history.layer_axis.merge(learns.layers)
    history.add_points(learns.points)
    for row, losses in zip(learns.rows, np.split(np.linspace(2.3, 0.5, 61), [1, 31]), strict=True):
        history.append(Row(row.step, row.values, row.scalars, losses=losses))
    assert zero_weights(history) == NONE


def test_layers_that_are_used_without_a_call_belong_to_the_one_around_them():
    points = [Point("a", "a"), Point("attn", "attn")]
    row = {"zero": [nan, 1, 1], "out": [1, 0], "delta": [0.2, 0.3], "norm": [0.1, 0, 0]}
    layers = ["a", "attn", "attn.last"]
    late = {"points": points, "layers": layers, "steps": [0, 30, 60]}
    assert zero_weights(run(*[row] * 3, **late)).layers == ("attn", "attn.last")
    assert zero_weights(run(*[{**row, "delta": [0.2, 0]}] * 3, points=points, layers=layers)) == NONE


@pytest.mark.parametrize(
    ("names", "change", "found"),
    [
        (("attn", "attn.out_proj"), {}, ("attn", "attn.out_proj")),
        (("", "out_proj"), {}, ("(root)", "out_proj")),
        (("attn", "attn.out_proj"), {"delta": [0.2, 0]}, ()),
        (("attn", "attn.out_proj"), {"zero": [nan, 0, 1]}, ()),
        (("attn", "attn.out_proj"), {"zero": [nan, 1, 0]}, ()),
        (("attn", "attn.last"), {}, ()),
    ],
)
def test_attention_whose_inputs_and_output_are_zero_is_found_while_the_run_learns(names, change, found):
    """Torch's own hands the weight of its output projection on, and does not call it."""
    called, inner = (name or ROOT for name in names)
    row = {"zero": [nan, 1, 1], "out": [1, 0], "delta": [0.2, 0.3], "norm": [0.1, 0, 0], **change}
    points = [Point("a", "a"), Point(called, called)]
    assert zero_weights(run(*[row] * 3, points=points, layers=["a", called, inner])).layers == found


@pytest.mark.parametrize(
    ("op", "dead", "delta", "found"),
    [
        ("relu", 1.0, 0.3, ("fc0",)),
        ("relu", 0.9, 0.3, ()),  # something else goes into it too
        ("relu", 1.0, 0.0, ()),
        ("gelu", 1.0, 0.3, ()),  # its slope at 0 is 1 / 2
    ],
)
def test_zeros_before_a_relu_get_no_gradient_through_it(op, dead, delta, found):
    points = [Point("fc0", "fc0"), Point("act", "act", op), Point("fc1", "fc1")]
    row = {"zero": [1, nan], "out": [0, 0, 1], "delta": [0, delta, 0.3], "dead": [nan, dead, nan], "norm": [0, 0.1]}
    assert zero_weights(run(*[row] * 3, points=points)).layers == found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ("fc0", "fc1")),
        ({"out": [1, 1, 0, 0, 1]}, ("fc1",)),  # the first one gives something
        ({"zero": [nan, 1, nan]}, ("fc1",)),
        ({"delta": [0.1, 0, 0, 0.3, 0.3]}, ()),  # a gradient gets past to it, and the run is young
    ],
)
def test_before_such_a_relu_all_that_give_zeros_are_to_blame(change, found):
    acts = (Point("act0", "act0", "relu"), Point("act1", "act1", "relu"))
    points = [Point("fc0", "fc0"), acts[0], Point("fc1", "fc1"), acts[1], Point("fc2", "fc2")]
    row = {
        "zero": [1, 1, nan],
        "out": [0, 0, 0, 0, 1],
        "delta": [0, 0, 0, 0.3, 0.3],
        "dead": [nan, 1, nan, 1, nan],
        "norm": [0, 0, 0.1],
        **change,
    }
    assert zero_weights(run(*[row] * 3, points=points)).layers == found


# two tables of which the rows are multiplied, and three layers that learn
TABLES = {
    "zero": [1, 1, nan, nan, nan],
    "out": [0, 0, 0.1, 0.1, 0.1],
    "delta": [0, 0, 0.3, 0.3, 0.3],
    "norm": [0, 0, 0.1, 0.1, 0.1],
    "table": [0, 0, nan, nan, nan],
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ("fc0", "fc1")),
        ({"table": [0, nan, nan, nan, nan]}, ()),  # heads of losses that come later
        ({"table": [0, 0.1, nan, nan, nan]}, ()),
        ({"zero": [1, nan, nan, nan, nan]}, ()),
        ({"delta": [0.1, 0.1, 0.3, 0.3, 0.3]}, ()),
        ({"out": [0, 0.1, 0.1, 0.1, 0.1]}, ()),
        ({"spectral": [1, 1, nan, nan, nan]}, ()),  # matrices that something is multiplied by
    ],
)
def test_two_tables_of_zeros_that_are_multiplied_are_found_where_the_run_stands_still(change, found):
    rows = [{**TABLES, **change}] * 3
    assert zero_weights(run(*rows, points=stack(5))) == NONE
    history = run(*rows, points=stack(5), steps=[0, 30, 60])
    assert zero_weights(history).layers == found
    learns = History()
    learns.layer_axis.merge(history.layers)
    learns.add_points(history.points)
    for row, loss in zip(history.rows, (2.3, 1.2, 0.5), strict=True):  # by something else: these come later
        learns.append(Row(row.step, row.values, row.scalars, losses=np.full(20, loss)))
    assert zero_weights(learns) == NONE


TOWERS = {"zero": [nan, 1, 1], "out": [1, 0, 0], "delta": [0, 0, 0], "norm": [0, 0, 0]}


@pytest.mark.parametrize(
    ("change", "how", "found"),
    [
        ({}, {}, ("fc1", "fc2")),
        ({"zero": [nan, nan, 1]}, {}, ()),  # one factor alone is no reason
        ({"norm": [0, 0, 0.1]}, {}, ()),
        ({"norm": [nan, nan, nan]}, {}, ()),
        ({}, {"loss": 0.0}, ()),  # nothing is asked of it yet
        ({}, {"loss": nan}, ()),
    ],
)
def test_where_nothing_at_all_moves_two_factors_are_to_blame(change, how, found):
    assert zero_weights(run(*[{**TOWERS, **change}] * 3, **how)).layers == found


def test_where_nothing_at_all_moves_one_weight_is_to_blame_if_the_run_stands_still():
    row = {**TOWERS, "zero": [nan, nan, 1]}
    assert zero_weights(run(*[row] * 5, steps=[0, 1, 2, 40, 60])).layers == ("fc2",)
    assert zero_weights(run(*[row] * 4, steps=[0, 1, 2, 40])) == NONE
    moves = {**row, "norm": [0.1, 0.1, 0]}
    assert zero_weights(run(*[moves] * 5, steps=[0, 1, 2, 40, 60])) == NONE


def test_most_of_the_layers_are_to_blame_where_the_run_stands_still():
    row = {**TOWERS, "norm": [0.1, 0, 0], "delta": [0.1, 0, 0]}
    steps = [0, 1, 2, 40, 60]
    assert zero_weights(run(*[row] * 4, steps=steps[:4])) == NONE
    history = run(*[row] * 5, steps=steps)
    history.rows[0].scalars["optimizers"] = 1.0
    assert zero_weights(history).layers == ("fc1", "fc2")
    fewer = {**row, "zero": [nan, nan, 1], "norm": [0.1, 0.1, 0]}
    assert zero_weights(run(*[fewer] * 5, steps=steps)) == NONE


def test_nothing_is_known_without_the_count():
    assert zero_weights(History()) == NONE
    assert zero_weights(run(*[{key: PAIR[key] for key in ("out", "delta")}] * 3)) == NONE


# -- a cut graph is another thing

FLAT = {
    "missing": [0] * 3,
    "delta": [0, 0, 0.3],
    "norm": [0, 0, 0.1],
    "moved": [0, 0, 0.1],
    "out": [1, 1, 1],
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [("warning", "detached", ("fc0", "fc1"))]),
        ({"zero": [nan, 1, nan]}, []),
    ],
)
def test_exact_zeros_are_no_cut_where_weights_are_zero(change, expected):
    assert verdict(NoGradient().judge(run(*[{**FLAT, **change}] * 3))) == expected


# -- and a norm layer behind zeros divides by next to nothing


@pytest.mark.parametrize(("zero", "samples", "found"), [(0, 1, 1), (1, 1, 0), (1, 2, 0), (1, 3, 1)])
def test_an_explosion_behind_zeros_waits_until_it_is_known_whether_they_stay(zero, samples, found):
    points = stack(5)
    row = {"zero": [zero, nan, nan, nan, nan], "delta": [1e8, 1e6, 1e4, 1e2, 1.0]}
    assert len(ExplodingGradient().judge(run(*[row] * samples, points=points))) == found


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("exploding_gradient", "depth"),
        ("dead_units", "initialisation"),
        ("update_ratio", "learning_rate_too_small"),
        ("loss_plateau", "unknown"),
        ("vanishing_gradient", "unknown"),
        ("saturated_activation", "drift"),
    ],
)
def test_what_follows_from_zeros_is_no_alarm_of_its_own(kind, cause):
    zeros = Finding(FindingKind.NO_GRADIENT, Severity.WARNING, 2, ("fc1",), "initialisation")
    other = Finding(FindingKind(kind), Severity.WARNING, 2, ("fc0",), cause)
    assert [f.severity.value for f in consolidate([other, zeros], [])] == ["info", "warning"]
    blown = Finding(FindingKind.NONFINITE_GRADIENT, Severity.CRITICAL, 2)
    assert consolidate([blown, zeros], []) == [blown, zeros]
