import math

import numpy as np
import pytest

from lightning_gradflow.detectors.not_optimized import NotOptimized
from lightning_gradflow.findings import FindingKind
from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.plan import remedies_for
from tests.detectors.runs import rows_of, verdict

nan = math.nan
FLAT, FALLS = np.full(80, 2.3), np.linspace(2.3, 1.5, 80)


def judge(*rows, losses=FLAT, **scalars):
    """The verdict on a run of which the last samples have these shares, and the others the first of them."""
    history = History()
    history.layer_axis.merge([f"fc{i}" for i in range(len(rows[0]))])
    made = list(rows_of(losses, interval=10, **scalars))
    table = [rows[0]] * (len(made) - len(rows)) + list(rows)
    for row, values in zip(made, table, strict=True):
        found = {} if values is None else {"not_optimized_fraction": np.array(values, float)}
        history.append(Row(row.step, found, row.scalars, losses=row.losses))
    return verdict(NotOptimized().judge(history))


INFO, WARNING = ("info", "not_optimized", ("fc0",)), ("warning", "not_optimized", ("fc0",))


@pytest.mark.parametrize(("losses", "found"), [(FLAT, WARNING), (FALLS, INFO), (FLAT[:50], INFO), (FLAT[:51], WARNING)])
def test_it_is_an_alarm_where_nothing_was_learnt_in_time(losses, found):
    assert judge([1.0, 0.0], losses=losses) == [found]


def test_with_several_optimizers_nobody_knows():
    assert judge([1.0, 0.0], optimizers=2.0) == [INFO]


def test_a_bias_is_no_layer():
    assert judge([0.5, 0.1]) == []
    assert judge([0.51, 0.1]) == [WARNING]


def test_two_samples_in_a_row_tell():
    assert judge([0.0, 0.0], [1.0, 0.0]) == []
    assert judge([0.0, 0.0], [1.0, 0.0], [1.0, 0.0]) == [WARNING]
    assert judge([1.0, 0.0], None) == []  # it was given to the optimizer meanwhile
    assert judge([1.0, 0.0], losses=FLAT[:1]) == []


def test_nothing_in_the_run_is_done_about_it():
    assert remedies_for(FindingKind.NO_GRADIENT, "not_optimized") == ()
