import itertools

import pytest

from lightning_gradflow.detectors import consolidate as room
from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.findings import Finding, FindingKind, Severity

WARNING, CRITICAL, INFO = Severity.WARNING, Severity.CRITICAL, Severity.INFO
VANISHING, PLATEAU = FindingKind.VANISHING_GRADIENT, FindingKind.LOSS_PLATEAU
UPDATES, NONFINITE = FindingKind.UPDATE_RATIO, FindingKind.NONFINITE_GRADIENT


def finding(kind, cause, severity=WARNING, step=400):
    return Finding(kind, severity, step, cause=cause)


def severities(found, still_open=()):
    return [one.severity for one in consolidate(found, still_open)]


def test_what_follows_is_info_and_the_root_stays():
    plateau, root = finding(PLATEAU, "vanishing_gradient"), finding(VANISHING, "depth", CRITICAL)
    assert severities([plateau, root]) == [INFO, CRITICAL]
    assert severities([root, plateau]) == [CRITICAL, INFO]


def test_the_root_may_have_been_found_long_ago():
    assert severities([finding(PLATEAU, "vanishing_gradient")], [finding(VANISHING, "depth", step=0)]) == [INFO]


def test_what_is_info_itself_explains_no_alarm():
    assert severities([finding(PLATEAU, "vanishing_gradient"), finding(VANISHING, "depth", INFO)]) == [WARNING, INFO]
    assert severities([finding(PLATEAU, "vanishing_gradient")], [finding(VANISHING, "depth", INFO)]) == [WARNING]


def test_what_the_newest_row_says_counts_not_what_was_open():
    now = [finding(PLATEAU, "vanishing_gradient"), finding(VANISHING, "depth", INFO)]
    assert severities(now, [finding(VANISHING, "depth", CRITICAL, step=0)]) == [WARNING, INFO]


def test_another_cause_is_another_fault():
    assert severities([finding(PLATEAU, "no_signal_in_data"), finding(VANISHING, "depth")]) == [WARNING, WARNING]
    assert severities([finding(PLATEAU, "learning_rate_too_small"), finding(UPDATES, "learning_rate_too_large")]) == [
        WARNING,
        WARNING,
    ]


def test_beside_a_table_that_is_too_large_a_gradient_that_vanishes_is_a_consequence():
    table, lost = finding(PLATEAU, "weight_scale"), finding(VANISHING, "depth")
    assert severities([table, lost]) == [WARNING, INFO]
    assert severities([table, finding(VANISHING, "saturation")]) == [WARNING, WARNING]
    assert severities([table, finding(UPDATES, "learning_rate_too_large")]) == [INFO, WARNING]


def test_a_gradient_that_vanishes_since_the_weights_were_overwritten_follows_from_the_steps():
    steps = finding(UPDATES, "learning_rate_too_large")
    assert severities([finding(VANISHING, "learning_rate_too_large", CRITICAL)], [steps]) == [INFO]
    assert severities([finding(VANISHING, "depth", CRITICAL)], [steps]) == [CRITICAL]  # it was so before
    assert severities([finding(VANISHING, "learning_rate_too_large", CRITICAL)]) == [CRITICAL]


def test_nothing_but_the_severity_changes():
    (told, _) = consolidate([finding(PLATEAU, "vanishing_gradient"), finding(VANISHING, "depth")], [])
    assert told == Finding(PLATEAU, INFO, 400, cause="vanishing_gradient")


def test_nan_is_never_a_consequence():
    assert not [follows for follows, _ in room._FOLLOWS if NONFINITE in follows.kinds]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_alarms_that_explain_each_other_one_stays(count):
    """No circle: whatever comes together, at least one alarm is left."""
    ends = {(kind, cause) for row in room._FOLLOWS for some in row for kind in some.kinds for cause in some.causes}
    for chosen in itertools.combinations(sorted(ends), count):
        if len({kind for kind, _ in chosen}) == count:
            found = [finding(kind, cause) for kind, cause in chosen]
            assert any(severity.is_alarm for severity in severities(found)), chosen
