import math

import numpy as np
import pytest

from lightning_gradflow.detectors.saturation import SaturatedActivation
from lightning_gradflow.detectors.shut_gates import gate_mask, shut_gates
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import verdict

nan = math.nan


def _highway(*, size=1e-9, gain=1e-9, gate=1.0, ratio=1e-6, others=1e-3, rows=3, opened=(), second=1e-9, **scalars):
    """Two blocks of a highway: inp, t0, its gate, h0, t1, its gate, h1, out; `second` is what gate 1 lets through."""
    history = History()
    history.layer_axis.merge(["inp", "t0", "h0", "t1", "h1", "out"])
    places = [("inp",), ("t0",), ("t0", "sigmoid"), ("h0",), ("t1",), ("t1", "sigmoid"), ("h1",), ("out",)]
    history.add_points([Point("/".join(p), p[0], *p[1:]) for p in places])
    for step in range(rows):
        is_open = step in opened
        sizes = [1.0, 20.0, 0.5 if is_open else size, 1.0, 20.0, 0.5 if is_open else second, 1.0, 1.0]
        values = {
            "output_rms": np.array(sizes),
            "saturated_fraction": np.array([nan, nan, 0.1 if is_open else 1.0, nan, nan, 1.0, nan, nan]),
            "gate_fraction": np.array([nan, nan, gate, nan, nan, gate, nan, nan]),
            "delta_norm": np.array([1.0, gain, 1.0, gain, gain, 1.0, gain, 1.0]),
            "update_ratio": np.array([others, ratio, others, ratio, others, others]),
            "weight_norm": np.ones(6),
        }
        known = {"planned_steps": 1000.0, "lr": 0.01, "loss": 1.0 - 0.1 * step, "optimizers": 1.0}
        history.append(Row(step, values, known | scalars, losses=np.array([1.0 - 0.1 * step])))
    return history


ALL = [("warning", "weight_scale", ("t0", "t1"))]


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"size": 0.01}, True),
        ({"size": 0.011}, False),
        ({"second": 0.5}, False),  # one that is open is enough
        ({"gain": 0.01}, True),
        ({"gain": 0.011}, False),
        ({"rows": 2}, False),
        ({"rows": 9, "opened": (1,)}, False),  # not shut from the start
        ({"rows": 9, "opened": (7,)}, False),
        ({"rows": 9, "opened": (4,)}, True),
        ({"ratio": 0.9e-5}, True),
        ({"ratio": 1.1e-5}, False),  # in all planned steps it may open
        ({"ratio": nan}, False),  # frozen: it is meant to be so
        ({"others": 0.9e-5}, False),  # nothing moves in this run
        ({"others": 1.1e-5}, True),
        ({"planned_steps": 49.0}, False),  # a trial of the code
        ({"lr_scheduled": 1.0}, False),  # a warm-up may be on
    ],
)
def test_gates_are_found_that_are_all_shut_from_the_start_and_that_no_step_can_open(made, found):
    assert verdict(SaturatedActivation().judge(_highway(**made))) == (ALL if found else [])


def test_what_is_no_gate_is_left_to_others():
    history = _highway(gate=0.0)
    assert shut_gates(history, 3, np.full((3, 8), 1e-9)) == []
    assert shut_gates(_highway(), 3, np.full((3, 8), 1e-9)) != []


def test_it_says_how_far_they_are_open():
    (finding,) = SaturatedActivation().judge(_highway(size=1e-3))
    assert finding.evidence["gate_opening"] == 1e-3
    assert finding.evidence["reach"] == pytest.approx(1e-3)


def test_a_gate_before_which_there_is_no_layer_is_left_out():
    history = History()
    history.layer_axis.merge(["out"])
    history.add_points([Point("out/sigmoid", "out", "sigmoid"), Point("out", "out")])
    for step in range(3):
        values = {"output_rms": np.array([1e-9, 1.0]), "delta_norm": np.array([1.0, 1.0])}
        values |= {"saturated_fraction": np.array([1.0, nan]), "gate_fraction": np.array([1.0, nan])}
        history.append(Row(step, values | {"update_ratio": np.array([1e-9])}, {"planned_steps": 1000.0}))
    assert gate_mask(history).tolist() == [True, False]
    assert SaturatedActivation().judge(history) == []
