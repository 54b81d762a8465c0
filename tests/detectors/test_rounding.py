import math

import numpy as np
import pytest

from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.detectors.rounding import RoundedSteps, lost_share
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.plan import remedies_for
from tests.detectors.runs import rows_of, verdict

nan = math.nan
FLAT, FALLS = np.full(80, 2.3), np.linspace(2.3, 1.5, 80)


def run(shares, losses=FLAT, scale=1.0, **scalars):
    """A run in whose samples the layers lose these shares, the same in all or row by row."""
    history = History()
    rows = list(rows_of(scale * losses, interval=10, **scalars))
    table = shares if np.ndim(shares) == 2 else [shares] * len(rows)
    history.layer_axis.merge([f"fc{i}" for i in range(len(table[0]))])
    for row, values in zip(rows, table, strict=False):
        history.append(Row(row.step, {"unchanged_fraction": np.array(values, float)}, row.scalars, losses=row.losses))
    return history


def judge(*args, **kwargs):
    return verdict(RoundedSteps().judge(run(*args, **kwargs)))


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ([0.6, 0.9, 0.51], ("fc1", "fc0", "fc2")),
        ([0.4, 0.9, 0.51], ("fc1", "fc2")),
        ([0.4, 0.9, 0.49], None),  # the median layer moves
        ([nan, 0.9, nan], ("fc1",)),  # a part of the model is in 16 bits
        ([nan, nan, nan], None),
        ([0.5, 0.5, 0.5], None),
    ],
)
def test_the_median_layer_counts(shares, found):
    assert judge(shares) == ([] if found is None else [("warning", "rounding", found)])


def test_a_run_that_learns_has_lost_nothing_that_it_needs():
    assert judge([0.99, 0.99], losses=FALLS) == []


def test_it_takes_time_to_stand_still():
    assert judge([0.99], losses=FLAT[:50]) == []
    assert judge([0.99], losses=FLAT[:51])
    assert judge([0.99], losses=FLAT, planned_steps=1000.0) == []
    assert judge([0.99], losses=FLAT, optimizers=2.0) == []


def test_the_steps_of_a_warm_up_do_not_count():
    rates = np.where(np.arange(140) < 70, 1e-6, 1e-3)
    losses, early = np.full(140, 2.3), 12  # samples before the rate is up
    shares = [[0.99]] * early + [[0.1]] * 20
    assert judge(shares, losses=losses, lr=rates) == []
    assert judge([[0.1]] * early + [[0.99]] * 20, losses=losses, lr=rates)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_loss_says_nothing(scale):
    assert judge([0.9], scale=scale) == judge([0.9])
    assert judge([0.9], FALLS, scale=scale) == []


def test_the_share_is_the_median_of_the_samples():
    table = [[0.1, 0.3]] * 5 + [[0.9, 0.7]] * 6
    assert lost_share(run(table)) == pytest.approx(0.8)
    assert math.isnan(lost_share(History()))


@pytest.mark.parametrize("limit", [0, 1, -1, nan])
def test_a_limit_out_of_range_is_refused(limit):
    with pytest.raises(ValueError, match=r"max_lost must be in \(0, 1\)"):
        RoundedSteps(limit)


@pytest.mark.parametrize(
    ("lost", "cause"), [(0.9, "rounding"), (0.4, "learning_rate_too_small"), (nan, "learning_rate_too_small")]
)
def test_steps_that_do_not_show_are_not_called_too_small_where_the_format_swallows_them(lost, cause):
    history = History()
    history.layer_axis.merge(["fc"])
    scalars = {"lr": 1e-4, "lr_scheduled": 0.0, "planned_steps": 1000.0, "optimizers": 1.0, "loss": 2.3}
    one = {"weight_norm": 1.0, "update_norm": 0.0, "update_ratio": 0.0, "grad_norm": 1e-3, "unchanged_fraction": lost}
    for step in range(3):
        history.append(Row(step, {k: np.array([v]) for k, v in one.items()}, scalars, losses=np.array([2.3])))
    assert [finding.cause for finding in UpdateRatio().judge(history)] == [cause]


def test_nothing_in_the_run_is_done_about_it_and_what_follows_is_info():
    rounding = Finding(FindingKind.UPDATE_RATIO, Severity.WARNING, 60, cause="rounding")
    assert (
        remedies_for(rounding.kind, rounding.cause)
        == remedies_for(rounding.kind, rounding.cause, has_learnt=True)
        == ()
    )
    plateau = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 60, cause="learning_rate_too_small")
    assert [one.severity for one in consolidate([plateau, rounding], [])] == [Severity.INFO, Severity.WARNING]
    cut = Finding(FindingKind.NO_GRADIENT, Severity.WARNING, 60, cause="detached")
    assert [one.severity for one in consolidate([rounding, cut], [])] == [Severity.INFO, Severity.WARNING]
