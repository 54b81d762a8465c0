"""Networks in which neither the inputs get through to the last layers nor the gradient back to the first ones."""

import math

import numpy as np
import pytest

from lightning_gradflow.detectors.decay import was_cut_off
from lightning_gradflow.detectors.smothered import best_share, is_smothered, was_smothered
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
POOR = (0.9, 0.05, 0.004, 0.5)  # spreads of four layers


def run(spreads=POOR, deltas=(0.004, 0.02, 0.1, 1.0), *, steps=80, losses=2.3, planned=300.0, ratios=1e-4, first=None):
    """A stack of four layers, sampled every tenth step; `first` are the spreads of the first row, where they differ."""
    history = History()
    points = stack(len(spreads))
    history.layer_axis.merge([point.module for point in points])
    history.add_points(points)
    for step in range(0, steps + 1, 10):
        values = {
            "delta_norm": np.array(deltas, dtype=float) if first is None or step else np.ones(len(points)),
            "output_spread": np.array(spreads if first is None or step else first, dtype=float),
            "update_ratio": np.full(len(points), ratios if np.isscalar(ratios) else ratios[min(step // 10, 1)]),
            "weight_norm": np.full(len(points), 1.0 if step == 0 else 2.0),
            "update_norm": np.full(len(points), 1.0),
            "spectral_norm": np.full(len(points), 0.5),
        }
        scalars = {"optimizers": 1.0, "planned_steps": planned, "normalised_updates": 0.0}
        count = 10 if step else 1
        history.append(
            Row(step, values, scalars, losses=np.full(count, losses) if np.isscalar(losses) else losses(step))
        )
    return history


def test_the_best_share_is_that_of_the_layer_that_gets_most_of_both():
    # 1 * 0.004, 0.9 * 0.02, 0.05 * 0.1, 0.004 * 1
    assert best_share(run(), 0) == pytest.approx(0.018)


@pytest.mark.parametrize(
    ("made", "share"),
    [
        ({"deltas": (0.5, 0.02, 0.1, 1.0)}, 0.5),  # the gradient arrives
        ({"spreads": (0.9, 0.5, 0.4, 0.5)}, 0.4),  # the inputs arrive
        ({"deltas": (0.004, 0.02, 0.1, 0.0)}, 0.18),  # what gets no gradient is no last layer
        ({"spreads": (0.9, nan, 0.004, 0.5)}, nan),
        ({"spreads": (0.9, 0.5), "deltas": (0.1, 1.0)}, nan),  # too few layers to lose anything in
    ],
)
def test_one_of_both_is_enough_to_learn_by(made, share):
    assert best_share(run(**made), 0) == pytest.approx(share, nan_ok=True)


def test_a_loss_of_another_scale_has_the_same_share():
    deltas = np.array([0.004, 0.02, 0.1, 1.0])
    assert best_share(run(deltas=1e-6 * deltas), 0) == pytest.approx(best_share(run(deltas=deltas), 0))


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"planned": 310.0}, False),  # 0.018 = 1 / sqrt(10 * 308)
        ({"steps": 50}, False),  # 60 steps are a fifth of the run
        ({"steps": 60}, True),
        ({"losses": lambda step: np.full(10 if step else 1, 2.3 * 0.99**step)}, False),
        ({"spreads": (0.9, 0.5, 0.4, 0.5)}, False),
        ({"first": (0.9, 0.8, 0.7, 0.5)}, False),  # not what it started with
    ],
)
def test_a_stack_is_smothered_that_stands_still_and_cannot_get_out_in_the_planned_steps(made, found):
    history = run(**made)
    assert is_smothered(history) is found
    sick = [("warning", "weight_scale")]
    assert [one[:2] for one in verdict(VanishingGradient().judge(history))] == (sick if found else [])


def test_the_first_layers_are_named_and_the_share_is_told():
    (finding,) = VanishingGradient().judge(run())
    assert finding.layers == ("fc0",)
    assert finding.evidence["best_share"] == pytest.approx(0.018)
    assert finding.evidence["span"] > -3


def test_steps_after_which_no_layer_can_tell_the_samples_apart_were_too_large():
    history = run(first=(0.9, 0.8, 0.7, 0.6), ratios=(0.3, 0.001))
    assert was_smothered(history, 0)
    ((severity, cause, _),) = verdict(UpdateRatio().judge(history))
    assert (severity, cause) == ("warning", "learning_rate_too_large")


@pytest.mark.parametrize(
    "made",
    [
        {"ratios": (0.05, 0.001)},  # no large step
        {"spreads": (0.9, 0.8, 0.7, 0.6)},  # the samples are told apart
        {"losses": lambda step: np.full(10 if step else 1, 2.3 if step < 10 else 1.9)},  # it has learnt something
    ],
)
def test_weights_that_only_double_are_no_finding_without_a_collapse(made):
    history = run(**{"first": (0.9, 0.8, 0.7, 0.6), "ratios": (0.3, 0.001), **made})
    assert UpdateRatio().judge(history) == []


WELL = (0.9, 0.8, 0.7, 0.6)
LOST = (5e-5, 1e-3, 0.03, 1.0)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"deltas": (3e-4, 5e-3, 0.08, 1.0)}, False),  # less than four decades
        ({"first": None}, False),  # it was so from the start
        ({"ratios": (0.09, 0.001)}, False),  # no large step
        ({"steps": 40}, False),  # too young
        ({"losses": lambda step: np.full(10 if step else 1, 2.3 if step < 10 else 1.9)}, False),
    ],
)
def test_steps_after_which_no_gradient_comes_back_were_too_large(made, found):
    history = run(**{"spreads": WELL, "first": WELL, "deltas": LOST, "ratios": (0.11, 0.001), **made})
    told = [one[:2] for one in verdict(UpdateRatio().judge(history))]
    assert told == ([("warning", "learning_rate_too_large")] if found else [])


def test_a_single_batch_is_not_enough_to_say_that_no_gradient_comes_back():
    cut, young = (run(WELL, LOST, first=WELL, steps=steps) for steps in (30, 20))
    assert was_cut_off(cut, 0)
    assert not was_cut_off(young, 0)
