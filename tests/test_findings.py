import io
import math

import pytest
import torch

from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.findings import (
    WARNINGS,
    Action,
    Finding,
    FindingKind,
    GradFlowWarning,
    Ledger,
    Severity,
)
from tests import made_up

INFO, WARNING, CRITICAL = Severity.INFO, Severity.WARNING, Severity.CRITICAL
PLATEAU, DEAD = FindingKind.LOSS_PLATEAU, FindingKind.DEAD_UNITS


def through_a_checkpoint(state):
    """What comes back of a state that was saved, and loaded as untrusted."""
    file = io.BytesIO()
    torch.save(to_checkpoint(state), file)
    file.seek(0)
    return from_checkpoint(torch.load(file, weights_only=True))


WAYS = {"as it is": lambda state: state, "through a checkpoint": through_a_checkpoint}


def found(severity=WARNING, kind=PLATEAU, step=0):
    return Finding(kind, severity, step)


def replayed(*samples, patience=3):
    """A ledger after samples at steps 0, 1, 2, ..., each a list of findings; and what each of them opened."""
    ledger = Ledger(patience)
    return ledger, [ledger.update(step, sample) for step, sample in enumerate(samples)]


# -- vocabulary


@pytest.mark.parametrize("member", [*FindingKind, *Severity])
def test_a_member_is_its_string(member):
    assert member == member.value == str(member) == f"{member}"


def test_info_is_no_alarm():
    assert [severity.is_alarm for severity in (INFO, WARNING, CRITICAL)] == [False, True, True]


def test_severities_are_ranked():
    assert INFO.rank < WARNING.rank < CRITICAL.rank


def test_every_kind_has_a_warning_of_its_own_below_the_common_one():
    assert set(WARNINGS) == set(FindingKind)
    assert len(set(WARNINGS.values())) == len(FindingKind)
    assert all(issubclass(category, GradFlowWarning) for category in WARNINGS.values())


def test_suggestions_are_no_part_of_equality():
    bare = Finding.from_dict({**made_up.finding().to_dict(), "suggestions": []})
    assert bare == made_up.finding()


# -- round trips


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("resolved", [None, 30])
def test_a_finding_comes_back_as_it_was(way, resolved):
    finding = made_up.finding(resolved_step=resolved)
    back = Finding.from_dict(WAYS[way](finding.to_dict()))
    assert back == finding
    assert back.suggestions == finding.suggestions
    assert isinstance(back.kind, FindingKind)
    assert isinstance(back.severity, Severity)


def test_a_finding_comes_back_with_numbers_that_are_not_finite():
    back = Finding.from_dict(through_a_checkpoint(Finding(PLATEAU, INFO, 0, evidence={"loss": math.nan}).to_dict()))
    assert math.isnan(back.evidence["loss"])


@pytest.mark.parametrize("way", WAYS)
def test_an_action_comes_back_as_it_was(way):
    action = Action(3, "clip", ("net.0",), "it grew", {"total": 9.0}, {"total": 1.0}, "kept", 25)
    assert Action.from_dict(WAYS[way](action.to_dict())) == action


def test_an_action_of_a_state_that_knew_no_end_of_a_trial_is_read():
    state = Action(3, "clip").to_dict()
    del state["decided_step"]
    assert Action.from_dict(state) == Action(3, "clip")


# -- ledger


def test_a_finding_that_is_repeated_is_opened_once():
    ledger, opened = replayed(*[[found()]] * 5)
    assert [len(new) for new in opened] == [1, 0, 0, 0, 0]
    assert len(ledger.findings) == len(ledger.open) == 1


def test_kinds_are_opened_apart_most_severe_first():
    _, opened = replayed([found(INFO), found(CRITICAL, DEAD)])
    assert [finding.kind for finding in opened[0]] == [DEAD, PLATEAU]


def test_of_several_findings_of_a_kind_the_most_severe_counts():
    ledger, _ = replayed([found(INFO), found(CRITICAL), found(WARNING)])
    assert [finding.severity for finding in ledger.findings] == [CRITICAL]


def test_a_more_severe_finding_closes_the_milder_one_and_is_opened_anew():
    ledger, opened = replayed([found(INFO)], [found(WARNING)], [found(CRITICAL)])
    assert [len(new) for new in opened] == [1, 1, 1]
    assert [finding.resolved_step for finding in ledger.findings] == [1, 2, None]
    assert [finding.severity for finding in ledger.open] == [CRITICAL]


def test_an_alarm_that_has_become_milder_steps_down_after_patience():
    ledger, opened = replayed([found(CRITICAL)], *[[found(INFO)]] * 5, patience=3)
    assert [len(new) for new in opened] == [1, 0, 0, 0, 1, 0]
    assert [finding.severity for finding in ledger.open] == [INFO]
    assert ledger.findings[0].resolved_step is not None


def test_an_alarm_that_is_milder_for_once_stays():
    ledger, _ = replayed([found(CRITICAL)], [found(INFO)], [found(INFO)], [found(CRITICAL)], [found(INFO)], patience=3)
    assert [finding.severity for finding in ledger.findings] == [CRITICAL]


def test_what_was_not_measured_is_not_missed():
    ledger = Ledger(patience=1)
    ledger.update(0, [found(CRITICAL)])
    ledger.update(1, [], is_sample=False)
    assert ledger.open


def test_a_finding_can_stand_in_a_set():
    assert len({found(CRITICAL), found(CRITICAL)}) == 1


@pytest.mark.parametrize("patience", [1, 3])
def test_a_finding_is_resolved_after_as_many_samples_as_patience_says(patience):
    ledger, _ = replayed([found()], *[[]] * (patience - 1), patience=patience)
    assert ledger.open
    ledger.update(99, [])
    assert ledger.findings[0].resolved_step == 99
    assert not ledger.open


def test_a_finding_that_flickers_stays_open():
    ledger, opened = replayed(*[[found()], [], []] * 4)
    assert sum(len(new) for new in opened) == 1
    assert ledger.open


def test_a_resolved_finding_can_be_opened_again():
    ledger, opened = replayed([found()], [], [found()], patience=1)
    assert [len(new) for new in opened] == [1, 0, 1]
    assert [finding.resolved_step for finding in ledger.findings] == [1, None]


@pytest.mark.parametrize(
    ("severity", "news"), [(INFO, False), (WARNING, False), (CRITICAL, True)], ids=["milder", "as severe", "worse"]
)
def test_news_is_what_would_be_opened(severity, news):
    ledger, _ = replayed([found(WARNING)])
    assert ledger.is_news(found(severity)) is news
    assert bool(ledger.update(1, [found(severity)])) is news


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_ledger_goes_on_as_the_one_that_was_saved(way):
    saved, _ = replayed([found(), found(INFO, DEAD)], [found()], [])
    loaded = Ledger()
    loaded.load_state_dict(WAYS[way](saved.state_dict()))
    for ledger in (saved, loaded):
        ledger.update(3, [])  # the third sample without dead units, the second without the plateau
        assert ledger.update(4, [found(CRITICAL)])
    assert loaded.findings == saved.findings
    assert [finding.resolved_step for finding in loaded.findings] == [4, 3, None]


@pytest.mark.parametrize("patience", [0, -1])
def test_a_patience_below_one_is_refused(patience):
    with pytest.raises(ValueError, match=rf"patience must be in \[1, inf\), got {patience}"):
        Ledger(patience)
