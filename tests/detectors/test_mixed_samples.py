import numpy as np

from lightning_gradflow.detectors.consolidate import consolidate
from lightning_gradflow.detectors.mixed_samples import MixedSamples
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.plan import remedies_for

NAN = np.nan
MIXED = {"values": {"steps_as_samples": np.array([NAN, 50.0, 50.0])}, "scalars": {"samples_as_steps": 64.0}}


def judge(*rows):
    history = History()
    history.layer_axis.merge(["embed", "encoder.0", "encoder.1"])
    for step, row in enumerate(rows):
        history.append(Row(step, **row))
    return MixedSamples().judge(history)


def test_nothing_is_said_without_a_sign():
    assert judge() == []
    assert judge({"scalars": {"loss": 2.3}}) == []


def test_one_sample_is_enough_and_all_layers_are_named():
    (finding,) = judge(MIXED)
    assert (finding.kind, finding.severity, finding.cause) == ("mixed_samples", "warning", "batch_first")
    assert (finding.step, finding.layers) == (0, ("encoder.0", "encoder.1"))
    assert finding.evidence == {"batch_size": 64.0, "time_steps": 50.0}


def test_it_ends_with_the_sample_that_has_it_no_more():
    assert judge(MIXED, {"scalars": {"loss": 0.7}}) == []
    assert judge({"scalars": {"loss": 0.7}}, MIXED) != []


def test_a_row_of_gradients_alone_neither_ends_it_nor_begins_it():
    alone = {"scalars": {"loss": 0.7}, "gradients_only": True}
    assert [finding.step for finding in judge(MIXED, alone, alone)] == [2]
    assert judge(alone) == []
    assert judge({}, alone) == []


def test_no_remedy_fits():
    for cause in ("batch_first", "unknown"):
        for has_learnt in (False, True):
            assert remedies_for(FindingKind.MIXED_SAMPLES, cause, has_learnt=has_learnt) == ()


def test_what_is_slow_or_lost_through_the_samples_is_no_alarm_of_its_own():
    (root,) = judge(MIXED)
    others = [
        Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 200, cause="no_signal_in_data"),
        Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 200, cause="recurrence"),
        Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 200, cause="saturation"),
        Finding(FindingKind.DEAD_UNITS, Severity.WARNING, 200, cause="initialisation"),
    ]
    severities = [finding.severity.value for finding in consolidate([root, *others], [])]
    assert severities == ["warning", "info", "info", "warning", "warning"]
    for cause in ("learning_rate_too_small", "vanishing_gradient", "unknown", "learning_rate_too_large"):
        plateau = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 200, cause=cause)
        (found,) = consolidate([plateau], [root])
        assert found.severity.is_alarm == (cause == "learning_rate_too_large")
