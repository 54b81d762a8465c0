"""Weights that something else than the optimizer has written to: each condition from both sides."""

import math

import numpy as np
import pytest

from lightning_gradflow.detectors.overwritten import not_by_steps, overwritten
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.history import History, Row
from tests.detectors.runs import verdict

nan = math.nan
LEARNT = np.linspace(2.3, 0.3, 101)
SICK = [("warning", "overwritten", ("fc1",))]


def run(factors=(1.0, 30.0), after=2.0, samples=1, update=0.01, interval=10, learnt=LEARNT, layers=2, **scalars):
    """A run that learns for 100 steps; then the norms of its weights are multiplied, and the loss is another one.

    The weights change right behind the sample of step 100; `samples` are taken after the first one that sees it.
    """
    history = History()
    history.layer_axis.merge([f"fc{i}" for i in range(layers)])
    end = len(learnt) - 1
    late = np.broadcast_to(np.asarray(after, dtype=float), (interval * (samples + 1),))
    losses, last = np.concatenate([learnt, late]), -1
    for step in range(0, len(losses), interval):
        norms = np.ones(layers) * (np.resize(factors, layers) if step > end else 1.0)
        values = {"weight_norm": norms, "update_norm": np.full(layers, update), "update_ratio": update / (norms + 1e-3)}
        history.append(Row(step, values, {"planned_steps": 300.0, **scalars}, losses=losses[last + 1 : step + 1]))
        last = step
    return history


def judged(**changes):
    return verdict(overwritten(run(**changes)))


def test_a_layer_that_was_overwritten_is_named_with_its_numbers():
    (finding,) = overwritten(run())
    assert (finding.kind, finding.step, finding.cause, finding.layers) == ("update_ratio", 120, "overwritten", ("fc1",))
    assert finding.evidence == {"weight_growth": 30.0, "loss": 2.0, "loss_before": pytest.approx(0.6, abs=0.05)}


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.0, 3.01), SICK),
        ((1.0, 2.99), []),
        ((1.0, 0.33), [("warning", "overwritten", ("fc1",))]),
        ((1.0, 0.34), []),
        ((1.0, 0.0), SICK),
        ((5.0, 0.001), [("warning", "overwritten", ("fc1", "fc0"))]),
        ((1.0, nan), []),
    ],
)
def test_the_norm_has_to_change_by_a_factor_of_three(factors, expected):
    # 10 steps of 0.001 come 0.01 far, and ten times that is not enough for any of these
    assert judged(factors=factors, update=1e-3) == expected


@pytest.mark.parametrize(("update", "expected"), [(0.289, SICK), (0.291, []), (nan, [])])
def test_what_steps_can_do_is_no_accident(update, expected):
    assert judged(update=update) == expected


def test_the_pace_is_that_of_the_faster_of_two_samples():
    norms, updates = np.array([[1.0], [5.0]]), np.array([[0.039], [nan]])
    assert not_by_steps(norms, updates, np.array([0, 10])).tolist() == [[True]]
    assert not_by_steps(norms, updates[::-1] + 2e-3, np.array([0, 10])).tolist() == [[False]]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (1.5, SICK),
        (1.3, []),  # half of what was gained is left
        (0.3, []),
        (np.concatenate([np.full(15, 2.0), np.full(5, 0.4)]), []),  # won back at once
        (np.concatenate([np.full(15, 0.4), np.full(5, 2.0)]), []),  # it comes later, from something else
        (nan, []),
    ],
)
def test_what_was_learnt_has_to_be_lost_for_good(after, expected):
    assert judged(after=after) == expected


def test_where_nothing_was_learnt_there_is_nothing_to_lose():
    assert judged(learnt=np.linspace(2.3, 2.2, 101), after=9.0) == []
    assert judged(learnt=np.linspace(2.3, 2.0, 101), after=9.0) == SICK


def test_a_noisy_loss_needs_a_clear_rise():
    noise = 0.5 * (-1.0) ** np.arange(101)
    assert judged(learnt=LEARNT + noise, after=2.0) == []
    assert judged(learnt=LEARNT + noise, after=9.0) == SICK


@pytest.mark.parametrize(("samples", "expected"), [(0, []), (1, SICK), (3, SICK), (4, [])])
def test_it_is_told_when_losses_have_come_behind_it_and_not_long_after(samples, expected):
    assert judged(samples=samples) == expected


def test_fewer_than_five_losses_do_not_tell():
    assert judged(interval=4, learnt=LEARNT) == []
    assert judged(interval=5, learnt=LEARNT) == SICK


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(factor):
    assert judged(learnt=LEARNT * factor, after=1.5 * factor) == SICK
    assert judged(learnt=LEARNT * factor, after=1.3 * factor) == []


def test_several_optimizers_are_not_judged():
    assert judged(optimizers=1.0) == SICK
    assert judged(optimizers=2.0) == []


def test_more_layers_that_nobody_touched_change_nothing():
    assert judged(factors=(1.0, 30.0, 1.0, 1.0), layers=4) == SICK


def test_nothing_is_said_of_nothing():
    assert overwritten(History()) == []


def test_the_detector_of_updates_tells_it():
    assert verdict(UpdateRatio().judge(run())) == SICK
