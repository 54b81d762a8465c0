"""Each rule on a record whose answer is known: on either side of its limit, and at the step it starts to hold."""

import numpy as np
import pytest

from tests.benchmarks import published
from tests.benchmarks.alarms import Alarm, openings
from tests.benchmarks.published import DEAD, EXPLODING, PROBLEM, SATURATED, SUITES, UPDATES, VANISHING
from tests.benchmarks.record import Record

STEPS = 40
TENSORS = ("first.weight", "first.bias", "last.weight")


def made(steps=STEPS, **changes):
    """A training that no rule says anything of, with some of its tables changed."""
    ones = np.ones((steps, 3))
    record = Record(
        tensors=TENSORS,
        matrices=np.array([True, False, True]),
        recurrent=np.zeros(3, dtype=bool),
        size=np.array([100.0, 10.0, 100.0]),
        mean_abs=ones * 1e-3,
        norm=ones * 1e-2,
        zero=ones * 0.0,
        update=ones * 1e-3,
        relus=("relu",),
        relu_flat=ones[:, :1] * 0.5,
        relu_inactive=ones[:, :1] * 0.0,
        bounded=("tanh",),
        beyond_5=ones[:, :1] * 0.0,
        saturated=ones[:, :1] * 0.0,
        loss=2.0 * 0.99 ** np.arange(steps),
        accuracy=np.linspace(0.5, 1, steps),
        epoch=np.arange(steps) // 10.0,
        planned=steps,
    )
    for name, value in changes.items():
        table = getattr(record, name)
        if isinstance(value, tuple):
            at, number = value
            table[at] = number
        else:
            setattr(record, name, value)
    return record


def said(rule, **changes):
    return [(alarm.step, alarm.kinds, alarm.layers) for alarm in rule(made(**changes))]


@pytest.mark.parametrize("suite", SUITES)
def test_a_training_that_goes_well_gives_no_alarm(suite):
    assert published.judge(suite, made()) == []


@pytest.mark.parametrize("suite", SUITES)
def test_a_training_that_died_before_its_first_step_gives_no_alarm(suite):
    assert published.judge(suite, Record()) == []


@pytest.mark.parametrize("suite", SUITES)
def test_what_was_not_measured_gives_no_alarm(suite):
    record = made()
    for name in ("mean_abs", "norm", "zero", "update", "relu_flat", "relu_inactive", "beyond_5", "saturated"):
        setattr(record, name, np.full_like(getattr(record, name), np.nan))
    record.loss = np.full(STEPS, np.nan)
    assert published.judge(suite, record) == []


FIRST, BIAS, LAST = (np.s_[5:, i] for i in range(3))


@pytest.mark.parametrize(
    ("rule", "table", "at", "quiet", "loud", "kinds", "layer"),
    [
        (published.sagemaker_vanishing, "mean_abs", BIAS, 1.01e-7, 0.99e-7, VANISHING, ("first",)),
        (published.sagemaker_exploding, "norm", LAST, 1e30, np.inf, EXPLODING, ("last",)),
        (published.sagemaker_dead_relu, "relu_inactive", FIRST, 0.5, 0.51, DEAD, ("relu",)),
        (published.sagemaker_saturated, "saturated", FIRST, 0.5, 0.51, SATURATED, ("tanh",)),
        (published.sagemaker_update_ratio, "update", LAST, 9.9, 10.1, UPDATES, ("last",)),
        (published.sagemaker_update_ratio, "update", LAST, 1.1e-8, 0.9e-8, UPDATES, ("last",)),
        (published.autotrainer_ungated, "zero", np.s_[5:], 0.69, 0.7, DEAD, ()),
        (published.autotrainer_ungated, "norm", FIRST, 0.69, 0.71, EXPLODING, ()),
        (published.autotrainer_ungated, "norm", FIRST, 1.01e-5, 0.99e-5, VANISHING, ()),
        (published.autotrainer_ungated, "loss", np.s_[5:], 1e30, np.inf, EXPLODING, ()),
        (published.tutorial, "norm", np.s_[5:, ::2], [1e-6, 0.1], [0.99e-6, 0.1], VANISHING, ()),
        (published.tutorial, "norm", np.s_[5:, ::2], [0.99e-6, 0.099], [0.99e-6, 0.1], VANISHING, ()),
    ],
)
def test_a_rule_speaks_on_one_side_of_its_limit_and_not_on_the_other(rule, table, at, quiet, loud, kinds, layer):
    assert said(rule, **{table: (at, quiet)}) == []
    assert said(rule, **{table: (at, loud)}) == [(5, kinds, layer)]


def test_the_first_weight_may_be_small_beside_a_small_last_one():
    assert said(published.autotrainer_ungated, norm=(np.s_[:], 1e-9)) == []


def test_a_recurrent_weight_has_a_limit_of_its_own():
    recurrent = np.array([False, False, True])
    assert said(published.tutorial, recurrent=recurrent, norm=(LAST, 1.01e-7)) == []
    assert said(published.tutorial, recurrent=recurrent, norm=(LAST, 0.99e-7)) == [(5, VANISHING, ("last",))]


@pytest.mark.parametrize(
    ("table", "at", "number", "kinds"),
    [
        ("relu_flat", (slice(5, None), 0), 0.7, DEAD),
        ("beyond_5", (slice(5, None), 0), 0.51, SATURATED),
        ("mean_abs", (slice(5, None), 0), 0.99e-7, VANISHING),
    ],
)
def test_deepdiagnosis_waits_for_ten_checks(table, at, number, kinds):
    assert [(step, what) for step, what, _ in said(published.deepdiagnosis, **{table: (at, number)})] == [(14, kinds)]
    nine = (slice(5, 14), 0)
    assert said(published.deepdiagnosis, **{table: (nine, number)}) == []


def test_deepdiagnosis_tells_at_once_what_is_not_finite_and_after_five_checks_a_loss_that_is_the_same():
    assert said(published.deepdiagnosis, norm=(FIRST, np.inf)) == [(5, EXPLODING, ("first",))]
    assert said(published.deepdiagnosis, loss=(slice(5, 10), 1.9)) == [(9, PROBLEM, ())]
    assert said(published.deepdiagnosis, loss=(slice(5, 9), 1.9)) == []


def test_loss_not_decreasing_compares_with_ten_steps_before():
    falls = np.full(STEPS, 2.0)
    falls[10:], falls[20:], falls[30:] = 1.9979, 1.9, 1.5
    assert said(published.sagemaker_loss, loss=falls) == []
    falls[10:20] = 1.9981
    assert said(published.sagemaker_loss, loss=falls) == [(10, PROBLEM, ())]


def test_patience_counts_eleven_means_of_ten_that_are_no_better():
    loss = np.append(np.full(10, 2.0), np.full(110, 2.0 * (1 - 0.9e-4)))
    assert said(published.patience, steps=120, loss=loss) == [(119, PROBLEM, ())]
    loss[60:] = 2.0 * (1 - 2.5e-4)
    assert said(published.patience, steps=120, loss=loss) == []


VANISHES = {"norm": (np.s_[:, 0], 1e-6)}


class TestAutoTrainerGated:
    def test_says_nothing_of_a_training_that_learns(self):
        assert said(published.autotrainer_gated, **VANISHES) == []

    def test_speaks_from_30_percent_of_the_training_on(self):
        low = np.linspace(0.1, 0.5, STEPS)
        assert said(published.autotrainer_gated, accuracy=low, **VANISHES) == [(19, VANISHING, ())]

    def test_remembers_what_was_seen_before(self):
        low = np.linspace(0.1, 0.5, STEPS)
        assert said(published.autotrainer_gated, accuracy=low, norm=(np.s_[3, 0], 1e-6)) == [(19, VANISHING, ())]

    def test_calls_a_low_accuracy_that_stands_still_a_problem(self):
        assert said(published.autotrainer_gated, accuracy=np.full(STEPS, 0.1)) == [(19, PROBLEM, ())]

    def test_calls_a_high_accuracy_that_swings_a_problem(self):
        swings = np.repeat([0.8, 0.95, 0.8, 0.95, 0.8], 8)
        record = {"accuracy": swings, "epoch": np.arange(STEPS) // 8.0}
        assert said(published.autotrainer_gated, **record) == [(31, PROBLEM, ())]

    def test_tells_what_is_not_finite_at_the_end_of_the_epoch(self):
        assert said(published.autotrainer_gated, loss=(3, np.inf)) == [(9, EXPLODING, ())]

    def test_stands_open_where_there_is_no_accuracy(self):
        assert said(published.autotrainer_gated, accuracy=np.full(STEPS, np.nan), **VANISHES) == [(19, VANISHING, ())]


def test_an_alarm_is_raised_where_a_rule_starts_to_hold_and_not_while_it_does():
    holds = np.array([[0, 0], [1, 0], [1, 1], [0, 0], [0, 1]], dtype=bool)
    assert openings(holds, DEAD, "ab") == [Alarm(1, DEAD, ("a",)), Alarm(4, DEAD, ("b",))]


def test_it_must_hold_in_the_same_place():
    holds = np.array([[1, 0], [0, 1], [0, 1]], dtype=bool)
    assert openings(holds, DEAD, "ab", held=2) == [Alarm(2, DEAD, ("b",))]


def test_the_union_says_all_that_its_parts_say_but_for_the_loss():
    record = made(mean_abs=(FIRST, 0.0), loss=np.full(STEPS, 2.0))
    union = published.judge("all of them but LossNotDecreasing", record)
    parts = [alarm for name in SUITES if "LossNotDecreasing" not in name for alarm in published.judge(name, record)]
    assert {(a.step, a.kinds) for a in union} == {(a.step, a.kinds) for a in parts}
    assert [a.step for a in union] == sorted(a.step for a in union)
