from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.sinks.words import shown

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
