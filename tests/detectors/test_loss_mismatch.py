from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.detectors.loss_mismatch import LossMismatch
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.plan import remedies_for


def judge(*rows):
    history = History()
    for step, scalars in enumerate(rows):
        history.append(Row(step, scalars=scalars))
    return [(f.step, f.severity.value, f.cause) for f in LossMismatch().judge(history)]


def test_nothing_is_said_without_a_sign():
    assert judge() == []
    assert judge({"loss": 2.3}) == []


def test_one_sample_is_enough():
    assert judge({"loss": 2.3, "broadcast": 1.0}) == [(0, "warning", "broadcast")]


def test_it_ends_with_the_sample_that_has_it_no_more():
    assert judge({"sigmoid_twice": 1.0}, {"loss": 0.7}) == []


def test_no_remedy_fits():
    assert all(remedies_for(FindingKind.LOSS_MISMATCH, cause) == () for cause in ("softmax_twice", "broadcast"))


def test_a_loss_that_falls_slowly_for_it_is_no_alarm_of_its_own():
    root = Finding(FindingKind.LOSS_MISMATCH, Severity.WARNING, 0, cause="softmax_twice")
    slow = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 200, cause="learning_rate_too_small")
    dead = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, 200, cause="initialisation")
    severities = [finding.severity.value for finding in consolidate([root, slow, dead], [])]
    assert severities == ["warning", "info", "warning"]
