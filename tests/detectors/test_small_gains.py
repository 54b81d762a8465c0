import math

import numpy as np
import pytest

from lightning_gradflow.detectors.small_gains import drawn_gains, small_gains
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import verdict

nan = math.nan
PLAIN = {"planned_steps": 1000.0, "lr": 0.01, "optimizers": 1.0}
NORMS = ("n1", "n2", "n3")


def _run(*, gain=0.02, mean=0.003, first=(), later=(), start=0.02, ratio=1e-3, rows=3, step=0, **scalars):
    """Three norm layers of 50 gains and 50 biases; `first` and `later` are other gains, from the first row or later."""
    history = History()
    history.layer_axis.merge(["fc", *NORMS])
    for row in range(rows):
        gains = np.array([nan, gain, gain, gain])
        gains[1 : 1 + len(first)] = first
        if row:
            gains[1 : 1 + len(later)] = later
        values = {
            "gain_rms": gains,
            "gain_mean": np.array([nan, mean, mean, mean]),
            "weight_norm": np.array([5.0, *[start * 10] * 3]),
            "grad_norm": np.ones(4),
            "grad_rms": np.full(4, 0.1),
            "update_ratio": np.array([0.01, ratio, ratio, ratio]),
        }
        known = {"planned_steps": 1000.0, "lr": 0.01, "loss": 1.0 - 0.1 * row, "optimizers": 1.0}
        history.append(Row(step + row, values, known | scalars))
    return history


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, NORMS),
        ({"gain": 0.09, "mean": 0.01, "start": 0.09}, NORMS),
        ({"gain": 0.11, "mean": 0.01, "start": 0.11}, ()),
        ({"gain": 0.0, "mean": 0.0}, ()),
        ({"mean": 0.009}, NORMS),
        ({"mean": 0.011}, ()),  # nearly all of one sign
        ({"mean": 0.02}, ()),  # a constant
        ({"first": (1.0,)}, ()),  # the stem has the usual ones
        ({"first": (nan,)}, NORMS[1:]),
        ({"first": (nan, nan)}, ()),  # one alone
        ({"start": 0.0}, ()),  # from zero, and moved by one step
        ({"start": 0.009}, ()),
        ({"start": 0.011}, NORMS),
        ({"step": 1}, ()),  # what was trained before
        ({"later": (0.3,)}, NORMS[1:]),
        ({"later": (nan,)}, NORMS[1:]),
        ({"rows": 1}, NORMS),
    ],
)
def test_gains_are_drawn_where_those_of_all_norms_are_small_and_spread_around_zero(made, found):
    assert drawn_gains(_run(**made)) == found


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"rows": 2}, False),
        ({"ratio": 4.9e-3}, True),  # times 1000 steps, times a size of 0.02
        ({"ratio": 5.1e-3}, False),
        ({"ratio": nan}, False),
        ({"later": (0.3,)}, True),
        ({"later": (0.3, 0.3)}, False),  # most have grown
        ({"mean": 0.02}, False),
        ({"lr_scheduled": 1.0}, False),  # a warm-up has not shown its rate yet
        ({"planned_steps": 20.0}, False),
    ],
)
def test_it_is_told_where_no_planned_step_makes_up_for_them(made, found):
    assert bool(small_gains(_run(**made))) == found


def test_the_finding():
    history = _run()
    (finding,) = VanishingGradient().judge(_with_signal(history))
    assert verdict([finding]) == [("warning", "weight_scale", NORMS)]
    assert finding.evidence["gain_rms"] == pytest.approx(0.02)
    assert finding.evidence["gain_reach"] == pytest.approx(0.02)


def _with_signal(history):
    """The same with a signal that comes back as it should."""
    from lightning_gradflow.history import Point

    history.add_points([Point(name, name) for name in ("fc", *NORMS)])
    row = history.rows[-1]
    history.append(
        Row(row.step + 1, dict(row.values) | {"delta_norm": np.ones(4)}, dict(row.scalars), losses=np.array([0.5]))
    )
    return history


@pytest.mark.parametrize(("end", "severity"), [(2.2, "warning"), (1.0, "info")])
def test_a_run_that_learns_with_them_is_only_told(end, severity):
    history = _run()
    history.append(Row(100, dict(history.rows[-1].values), PLAIN, losses=np.linspace(2.3, end, 98)))
    assert [finding.severity.value for finding in small_gains(history)] == [severity]


def test_nothing_is_known_without_rows():
    assert drawn_gains(History()) == ()
    assert small_gains(History()) == []
