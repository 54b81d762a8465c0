"""Softmaxes that choose one position each from the start: each condition from both sides."""

import math

import numpy as np
import pytest

from lightning_gradflow.detectors.loud_scores import LoudScores
from lightning_gradflow.history import History, Row
from tests.detectors.runs import verdict

nan = math.nan


def run(*rows, loss=2.3, classes=10.0):
    history = History()
    history.layer_axis.merge(["a", "b", "c", "fc"])
    for step, gaps in enumerate(rows):
        values = {"softmax_gap": np.array(gaps, dtype=float)}
        history.append(Row(step, values, {"score_classes": classes}, losses=np.array([loss])))
    return history


def judged(*rows, **kwargs):
    return verdict(LoudScores().judge(run(*rows, **kwargs)))


def sick(*layers):
    return [("warning", "score_scale", layers)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[10.1, nan, nan, nan]], sick("a")),
        ([[9.9, nan, nan, nan]], []),
        ([[nan, nan, nan, nan]], []),
        ([[20, 30, 40, nan]], sick("c", "b", "a")),
        ([[20, 30, 1, nan]], sick("b", "a")),
        ([[20, 1, nan, nan]], sick("a")),
        ([[20, 1, 1, nan]], []),  # most of them choose among many
        ([[math.inf, nan, nan, nan]], sick("a")),
        ([[20, nan, nan, nan], [nan, nan, nan, nan]], sick("a")),
        ([[20, nan, nan, nan], [0.4, nan, nan, nan]], []),
        ([[0.4, nan, nan, nan], [20, nan, nan, nan]], []),  # it was learnt
    ],
)
def test_the_table(rows, expected):
    assert judged(*rows) == expected


@pytest.mark.parametrize(
    ("size", "gap", "expected"),
    [
        (1.0, 20.0, []),
        (200.0, 20.0, [("warning", "unscaled_inputs", ("fc",))]),
        (200.0, 6.1, [("warning", "unscaled_inputs", ("fc",))]),
        (200.0, 5.9, []),
    ],
)
def test_a_softmax_behind_the_last_layer_may_be_sure_unless_the_inputs_make_it_so(size, gap, expected):
    history = run()
    history.add_features(2)
    values = {"output_gap": np.array([nan, nan, nan, gap]), "input_rms": np.array([1.0, size])}
    history.append(Row(0, {**values, "input_deviation": np.array([1.0, size])}, losses=np.array([2.3])))
    assert verdict(LoudScores().judge(history)) == expected


def test_a_run_that_learns_has_learnt_to_choose():
    history = run([20, nan, nan, nan], classes=nan)
    history.append(Row(60, losses=np.full(60, 2.3)))
    assert LoudScores().judge(history)
    history.append(Row(120, losses=np.full(60, 0.5)))
    assert not LoudScores().judge(history)


@pytest.mark.parametrize(("loss", "classes", "found"), [(1.83, 10.0, False), (1.85, 10.0, True), (0.1, nan, True)])
def test_what_is_better_than_chance_has_learnt_to_choose(loss, classes, found):
    assert bool(judged([20, nan, nan, nan], loss=loss, classes=classes)) is found


@pytest.mark.parametrize(("size", "cause"), [(1.0, "score_scale"), (200.0, "unscaled_inputs")])
def test_inputs_that_are_unscaled_make_scores_of_any_size(size, cause):
    history = run()
    history.add_features(2)
    values = {"softmax_gap": np.array([20.0, nan, nan, nan]), "input_rms": np.array([1.0, size])}
    history.append(Row(0, {**values, "input_deviation": np.array([1.0, size])}, losses=np.array([2.3])))
    assert verdict(LoudScores().judge(history)) == [("warning", cause, ("a",))]


def test_the_numbers_behind_it_are_told():
    (finding,) = LoudScores().judge(run([20, 30, nan, nan]))
    assert finding.evidence == {"softmax_gap": 25.0}


def test_no_rows_tell_nothing():
    assert LoudScores().judge(History()) == []


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, nan])
def test_a_limit_out_of_its_range_is_refused(limit):
    with pytest.raises(ValueError, match="max_gap must be in"):
        LoudScores(limit)


def test_the_limit_is_used():
    assert LoudScores(30.0).judge(run([20, nan, nan, nan])) == []
