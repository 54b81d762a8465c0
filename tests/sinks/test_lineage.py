from dataclasses import replace

import pytest

from lightning_gradflow.findings import Action, Finding, FindingKind, Severity
from lightning_gradflow.sinks.lineage import comes_of, has_alarmed, shown, untouched
from tests import made_up

PLATEAU, DEAD = FindingKind.LOSS_PLATEAU, FindingKind.DEAD_UNITS
ALARM = Finding(DEAD, Severity.WARNING, step=10, resolved_step=40)


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


def test_a_finding_was_an_alarm_if_one_that_went_over_into_it_was():
    info = Finding(DEAD, Severity.INFO, step=40, resolved_step=60)
    assert has_alarmed(info, [ALARM, info])
    assert not has_alarmed(info, [replace(ALARM, resolved_step=30), info])
    assert not has_alarmed(info, [replace(ALARM, kind=PLATEAU), info])
    at_once = Finding(DEAD, Severity.INFO, step=40, resolved_step=40)
    assert has_alarmed(info, [ALARM, at_once, info])


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
