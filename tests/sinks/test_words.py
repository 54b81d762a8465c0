from dataclasses import replace

import numpy as np
import pytest

from lightning_gradflow.findings import Action, Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.sinks import summary
from lightning_gradflow.sinks.base import scalars
from lightning_gradflow.sinks.report import page
from lightning_gradflow.sinks.words import comes_of, effective_depth, has_alarmed, shown, to_do, untouched, verdict
from tests import made_up

PLATEAU, DEAD = FindingKind.LOSS_PLATEAU, FindingKind.DEAD_UNITS


def test_a_finding_that_went_over_into_a_worse_one_is_shown_once():
    early = Finding(PLATEAU, Severity.INFO, step=10, resolved_step=40)
    late = Finding(PLATEAU, Severity.WARNING, step=40)
    assert shown([early, late]) == [late]


def test_a_finding_that_was_over_is_shown_beside_a_later_one():
    early = Finding(PLATEAU, Severity.WARNING, step=10, resolved_step=30)
    late = Finding(PLATEAU, Severity.WARNING, step=40)
    assert shown([early, late]) == [late, early]


def test_findings_of_other_kinds_hide_nothing():
    early = Finding(PLATEAU, Severity.INFO, step=10, resolved_step=40)
    other = Finding(DEAD, Severity.INFO, step=40)
    assert shown([early, other]) == [other, early]


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


ALARM = Finding(DEAD, Severity.WARNING, step=10, resolved_step=40)


@pytest.mark.parametrize(
    ("action", "is_left"),
    [
        (Action(10, "clip", outcome="kept"), False),
        (Action(40, "clip"), False),  # on trial when the run ended
        (Action(20, "clip", outcome="rolled_back"), True),
        (Action(9, "clip", outcome="kept"), True),  # for something earlier
        (Action(41, "clip", outcome="kept"), True),
    ],
)
def test_an_alarm_in_whose_time_nothing_was_changed_for_good_is_untouched(action, is_left):
    assert untouched(made_up.view(findings=(ALARM,), actions=(action,))) == [ALARM] * is_left


def test_neither_what_is_open_nor_an_info_is_untouched():
    findings = (replace(ALARM, resolved_step=None), Finding(PLATEAU, Severity.INFO, step=10, resolved_step=40))
    assert untouched(made_up.view(findings=findings)) == []


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


def test_a_finding_was_an_alarm_if_one_that_went_over_into_it_was():
    info = Finding(DEAD, Severity.INFO, step=40, resolved_step=60)
    assert has_alarmed(info, [ALARM, info])
    assert not has_alarmed(info, [replace(ALARM, resolved_step=30), info])
    assert not has_alarmed(info, [replace(ALARM, kind=PLATEAU), info])
    at_once = Finding(DEAD, Severity.INFO, step=40, resolved_step=40)
    assert has_alarmed(info, [ALARM, at_once, info])


def test_there_is_something_to_do_as_long_as_it_lasts_and_after_an_alarm():
    info = Finding(DEAD, Severity.INFO, step=10)
    assert to_do(info, [info]) == to_do(replace(ALARM, resolved_step=None), []) == "What to do"
    assert to_do(ALARM, [ALARM]) == "For the next run"
    assert to_do(replace(info, resolved_step=40), []) == ""


@pytest.mark.parametrize(
    ("resolved", "root_resolved", "is_told"),
    [(None, None, True), (50, None, True), (50, 40, True), (None, 40, False)],  # the last one has outlasted it
)
def test_an_info_comes_of_an_alarm_as_long_as_that_lasts(resolved, root_resolved, is_told):
    plateau = Finding(PLATEAU, Severity.INFO, step=20, cause="dead_units", resolved_step=resolved)
    root = replace(ALARM, resolved_step=root_resolved)
    assert comes_of(plateau, [root, plateau]) == (root if is_told else None)
    assert comes_of(replace(plateau, severity=Severity.WARNING), [root, plateau]) is None
    assert comes_of(plateau, [replace(root, severity=Severity.INFO), plateau]) is None
    assert comes_of(replace(plateau, cause="no_signal_in_data"), [root, plateau]) is None


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
