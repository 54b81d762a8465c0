"""A first and a last layer that wait for each other."""

import math

import numpy as np
import pytest

from lightning_gradflow.detectors.saddle import saddle_of
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import verdict

nan = math.nan


def run(
    forward=2e-3, backward=2e-3, *, rows=1, ratio=1e-3, names=("inp", "down", "out"), norms=(1.0, 1.0, 1.0), **more
):
    """Inputs of size 1, layers between the first and the last that a residual connection leads around."""
    history = History()
    history.layer_axis.merge(names)
    history.add_points([Point(name, name) for name in names])
    history.add_features(1)
    values = {
        "delta_norm": np.array([backward] * (len(names) - 1) + [1.0]),
        "output_rms": np.full(len(names), forward),
        "spectral_norm": np.array(norms),
        "update_ratio": np.full(len(names), ratio),
        "input_rms": np.array([1.0]),
        **{name: np.array(found, dtype=float) for name, found in more.items()},
    }
    for step in range(rows):
        history.append(Row(step, values, {"optimizers": 1.0, "normalised_updates": 0.0}, losses=np.array([2.3])))
    return history


def test_the_wait_is_what_exponential_growth_at_the_pace_of_the_steps_takes():
    saddle = saddle_of(run(1e-2, 1e-4, ratio=0.01), 3.0)
    assert saddle.span == pytest.approx(-6)
    assert saddle.layers == ("inp", "out")
    # each of two layers of size 1e-3 in the mean grows by 1 % a step
    assert saddle.wait == pytest.approx(math.log(1e3) / 0.01)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"forward": 0.1, "backward": 0.0099}, True),
        ({"forward": 0.1, "backward": 0.0101}, False),  # less than three decades
        ({"forward": 0.11}, False),  # a head of next to nothing behind features that are well
        ({"forward": 1e-3, "backward": 0.11}, False),
        ({"backward": 0.0}, False),  # a head of zeros
        ({"forward": nan}, False),
        ({"ratio": 0.1}, True),  # 62 steps
        ({"ratio": 0.15}, False),  # 41 steps
        ({"ratio": nan}, False),
        ({"input_rms": [nan]}, False),
        ({"names": ("fc",), "norms": (1.0,)}, False),
    ],
)
def test_both_have_to_be_small_and_slow(made, found):
    expected = [("warning", "weight_scale", ("inp", "out"))] if found else []
    assert verdict(VanishingGradient().judge(run(**made))) == expected


def test_a_normalisation_in_front_brings_the_inputs_to_the_size_that_counts():
    large = {"input_rms": [1e4], "output_rms": [1.0, 0.5, 0.5]}
    assert saddle_of(run(norms=(nan, 1.0, 1.0), **large), 3.0) is None
    assert saddle_of(run(norms=(1.0, 1.0, 1.0), **large), 3.0) is not None


@pytest.mark.parametrize("root", ["(root)", "net"])
def test_a_module_that_holds_the_others_is_not_the_last_layer(root):
    history = run(names=("net.inp", "net.out", root), norms=(1.0, 1.0, 1.0), delta_norm=[2e-3, 1.0, 1.0])
    assert saddle_of(history, 3.0).layers == ("net.inp", "net.out")


def test_a_run_that_only_came_there_later_did_not_start_there():
    history = run(rows=2)
    later = History()
    later.load_state_dict(history.state_dict())
    assert saddle_of(later, 3.0) is not None
    well = run(0.5, 0.5)
    well.append(Row(1, dict(history.rows[1].values), {"optimizers": 1.0}))
    assert saddle_of(well, 3.0) is None


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_loss_makes_no_difference(scale):
    history = run(delta_norm=scale * np.array([2e-3, 2e-3, 1.0]))
    assert saddle_of(history, 3.0) == saddle_of(run(), 3.0)
