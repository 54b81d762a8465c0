from dataclasses import replace

import numpy as np
import pytest

from lightning_gradflow.findings import Action, Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.sinks import summary
from lightning_gradflow.sinks.base import scalars
from lightning_gradflow.sinks.lineage import untouched
from lightning_gradflow.sinks.report import page
from lightning_gradflow.sinks.words import effective_depth, to_do, verdict
from tests import made_up

PLATEAU, DEAD = FindingKind.LOSS_PLATEAU, FindingKind.DEAD_UNITS
ALARM = Finding(DEAD, Severity.WARNING, step=10, resolved_step=40)


@pytest.mark.parametrize(
    ("resolved_step", "said"),
    [(None, "half of the units are dead."), (50, "No sign of trouble in the gradients any more")],
)
def test_what_an_alarm_has_become_is_no_all_clear(resolved_step, said):
    alarm = Finding(DEAD, Severity.WARNING, step=10, resolved_step=40)
    left = Finding(
        DEAD, Severity.INFO, 40, resolved_step=resolved_step, message="half of the units are dead. So it is."
    )
    other = Finding(PLATEAU, Severity.INFO, step=40, message="the loss stands still.")
    assert verdict(replace(made_up.view(), findings=(alarm, left, other))).startswith(said)


@pytest.mark.parametrize(
    ("cause", "end"), [("learning_rate_too_large", " Cause: learning rate too large."), ("unknown", ""), ("", "")]
)
def test_the_cause_stands_in_the_first_line(cause, end):
    alarm = Finding(DEAD, Severity.WARNING, step=10, cause=cause, message="Half of the units are dead. So it is.")
    assert verdict(made_up.view(findings=(alarm,))) == f"Half of the units are dead.{end}"


def test_an_alarm_that_became_worse_was_treated_if_it_was_at_any_time():
    worse = Finding(DEAD, Severity.CRITICAL, step=40, resolved_step=60)
    view = made_up.view(findings=(ALARM, worse), actions=(Action(20, "recycle", outcome="kept"),))
    assert untouched(view) == []
    assert verdict(view) == "No sign of trouble in the gradients any more: 1 earlier finding resolved."


@pytest.mark.parametrize(
    ("actions", "end"),
    [
        ((), " Nothing was changed because of them, so their causes may still be there: see below."),
        (
            (Action(15, "clip", outcome="kept"),),
            " Nothing was changed because of 1 of them, so its cause may still be there: see below.",
        ),
        ((Action(30, "clip", outcome="kept"),), ""),
    ],
)
def test_the_verdict_says_of_how_many_the_cause_may_be_there(actions, end):
    other = Finding(PLATEAU, Severity.WARNING, step=20, resolved_step=50)
    said = "No sign of trouble in the gradients any more: 2 earlier findings resolved."
    assert verdict(made_up.view(findings=(ALARM, other), actions=actions)) == said + end


def test_there_is_something_to_do_as_long_as_it_lasts_and_after_an_alarm():
    info = Finding(DEAD, Severity.INFO, step=10)
    assert to_do(info, [info]) == to_do(replace(ALARM, resolved_step=None), []) == "What to do"
    assert to_do(ALARM, [ALARM]) == "For the next run"
    assert to_do(replace(info, resolved_step=40), []) == ""


def test_the_effective_depth_is_said_wherever_a_run_is_shown():
    view = made_up.view()  # a decade at each of seven points: the last two of four layers get a thousandth or more
    said = "Effective depth: 2 of 4 layers get a thousandth of the last layer's signal or more."
    assert effective_depth(view) == said
    assert said in " ".join(summary(view).split())
    assert said.replace("'", "&#x27;") in page(view, figures=False)
    assert scalars(view.history)["gradflow/effective_depth"] == 2


def test_without_a_signal_nothing_is_said_of_it():
    shown = History()
    shown.append(Row(0, scalars={"loss": 2.3}))
    assert effective_depth(made_up.view(shown)) == ""
    assert "gradflow/effective_depth" not in scalars(shown)


def test_a_sample_without_signal_does_not_hide_the_one_before():
    shown = made_up.history(rows=2)
    shown.append(Row(20, {"grad_norm": np.ones(4)}))
    assert effective_depth(made_up.view(shown)).startswith("Effective depth: 2 of 4 layers")
