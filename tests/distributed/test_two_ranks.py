"""What two ranks say, what it costs them to agree, and what happens when one of them fails."""

import math

import numpy as np
import pytest

from .launcher import RANKS
from .program import JUDGEMENT, PLACES

OF_ITS_OWN = ("told", "files", "local", "mine", "weights")


def _both(launched, group, *keys):
    answers = launched(group).ranks
    for key in keys:
        answers = [answer[key] for answer in answers]
    assert not any("failed" in answer for answer in answers), answers[0]["failed"]
    return answers


def _as_text(answer):
    # as text, in which NaN is NaN; the rest is what each rank has of its own
    return {
        key: str(value) for key, value in answer.items() if key not in ("told", "files", "local", "mine", "weights")
    }


COUNTED = [
    ("replicated", "DDP"),
    *(("spread", name) for name in ("FSDP2", "tensor parallel", "tensor parallel, DTensors throughout")),
]


@pytest.mark.parametrize(("group", "name"), COUNTED)
def test_a_sample_costs_one_collective(launched, group, name):
    for answer in _both(launched, group, "collectives", name):
        first, *later = answer["steps"]
        assert first == 0
        assert [answer["ours"][step] for step in later] == [1] * len(later) == [1] * 4


@pytest.mark.parametrize(("group", "name"), COUNTED)
def test_between_samples_there_is_no_collective(launched, group, name):
    for answer in _both(launched, group, "collectives", name):
        others = [step for step in range(12) if step not in answer["steps"]]
        assert [answer["ours"][step] for step in others] == [0] * 7


@pytest.mark.parametrize(("group", "name"), [("replicated", "DDP"), ("spread", "FSDP2")])
def test_gradients_alone_are_those_of_whole_samples_on_both_ranks(launched, group, name):
    first, second = _both(launched, group, "gradients alone", name)
    assert str(first) == str(second)  # in which NaN is NaN
    assert first["alone"]["norms"] == first["everything"]["norms"]
    assert first["alone"]["losses"] == first["everything"]["losses"]
    assert len(first["alone"]["norms"]) == len(first["everything"]["whole"]) == 12
    assert first["alone"]["whole"] == [0, 1, 2, 4, 8]
    size = ["grad_missing_fraction", "grad_nonfinite_fraction", "grad_norm", "grad_rms"]
    assert first["alone"]["measured"] == [size] * 7
    assert {x for x in first["alone"]["clipped"] if not math.isnan(x)} == {1.0}


def test_the_losses_of_the_ranks_differ_and_their_mean_is_recorded(launched):
    first, second = _both(launched, "replicated", "sick")
    losses = np.array([first["local"], second["local"]])
    assert np.abs(losses[0] - losses[1]).mean() > 0.01
    np.testing.assert_allclose(list(first["losses"].values()), losses.mean(axis=0), rtol=1e-6)


def test_the_validation_loss_is_the_mean_over_the_ranks(launched):
    first, second = _both(launched, "replicated", "validated")
    assert first["mine"] != second["mine"]
    last = [loss for loss in first["scalars"]["val_loss"] if loss == loss][-1]
    assert last == pytest.approx(np.mean([first["mine"], second["mine"]]), rel=1e-6)


AGREEING = [
    ("replicated", "sick"),
    ("replicated", "validated"),
    ("replicated", "a loss is not a number"),
    ("replicated", "a branch that is taken late"),
    ("spread", "sharded in part"),
]


@pytest.mark.parametrize(("group", "name"), AGREEING)
def test_both_ranks_have_the_same_history_and_findings(launched, group, name):
    first, second = _both(launched, group, name)
    assert _as_text(first) == _as_text(second)


@pytest.mark.parametrize(("name", "kind"), [("sick", "vanishing"), ("a loss is not a number", "nonfinite")])
def test_there_is_something_to_find(launched, name, kind):
    first, _ = _both(launched, "replicated", name)
    assert f"{kind}_gradient" in {finding["kind"] for finding in first["findings"]}


def test_a_branch_that_is_taken_late_was_not_taken_before(launched):
    table = _both(launched, "replicated", "a branch that is taken late")[0]["metrics"]["delta_norm"]
    column = [row[table["names"].index("net.branch")] for row in table["rows"]]
    assert [math.isnan(value) for value in column] == [True] * 4 + [False] * 4


def test_only_the_first_rank_warns(launched):
    first, second = _both(launched, "replicated", "sick")
    alarms = [finding for finding in first["findings"] if finding["severity"] != "info"]
    assert len(first["told"]) == len(alarms) > 0
    assert second["told"] == []


def test_only_the_first_rank_writes_a_report(launched):
    first, second = _both(launched, "replicated", "sick")
    assert first["files"] == ["gradflow_report.html"]
    assert second["files"] == []


@pytest.mark.parametrize("group", ["replicated", "spread"])
def test_a_resumed_run_has_the_same_history_on_both_ranks(launched, group):
    first, second = _both(launched, group, "resumed", "resumed")
    assert _as_text(first) == _as_text(second)


@pytest.mark.parametrize("group", ["replicated", "spread"])
def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(launched, group):
    for answer in _both(launched, group, "resumed"):
        resumed, whole = answer["resumed"], answer["in one go"]
        assert resumed["steps"] == whole["steps"]
        for metric in ("grad_norm", "update_norm", "delta_norm", "dead_fraction"):
            np.testing.assert_allclose(resumed["metrics"][metric]["rows"], whole["metrics"][metric]["rows"], rtol=1e-6)


@pytest.mark.parametrize("group", ["replicated", "spread"])
def test_a_resumed_run_has_no_loss_of_one_rank_alone(launched, group):
    for answer in _both(launched, group, "resumed"):
        resumed, whole = answer["resumed"]["losses"], answer["in one go"]["losses"]
        assert len(resumed) > 6
        assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-6)


ERRORS = [f"{place} on rank {rank}" for place in PLACES for rank in range(RANKS)]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_ours_on_one_rank_ends_no_run(launched, error):
    assert [answer["done"] for answer in _both(launched, "troubled", "errors", error)] == [12, 12]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_ours_on_one_rank_changes_no_weight(launched, error):
    without = _both(launched, "troubled", "without us")
    for answer, other in zip(_both(launched, "troubled", "errors", error), without, strict=True):
        assert answer["weights"] == other["weights"]


@pytest.mark.parametrize("error", ERRORS)
def test_after_an_error_on_one_rank_both_are_switched_off(launched, error):
    for answer in _both(launched, "troubled", "errors", error):
        assert answer["steps"] in ([0, 1, 2], [0, 1, 2, 4])


@pytest.mark.parametrize("error", ERRORS)
def test_the_first_rank_says_once_that_we_are_switched_off(launched, error):
    told = _both(launched, "troubled", "errors", error)[0]["told"]
    assert len(told) == 1
    assert "the monitor is switched off" in told[0]


@pytest.mark.parametrize("error", ERRORS)
def test_the_rank_on_which_it_happened_says_what(launched, error):
    told = _both(launched, "troubled", "errors", error)[int(error[-1])]["told"]
    assert len(told) == 1
    assert "ZeroDivisionError: on purpose" in told[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_neither_the_first_nor_to_blame_says_nothing(launched, place):
    assert _both(launched, "troubled", "errors", f"{place} on rank 0")[1]["told"] == []


def test_weights_that_were_drawn_anew_are_the_same_on_both_ranks(launched):
    first, second = _both(launched, "troubled", "applied")
    assert [action["kind"] for action in first["actions"]] == ["reinit"]
    assert first["actions"] == second["actions"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("place", JUDGEMENT)
def test_an_error_in_the_judgement_of_one_rank_lets_no_weights_drift_apart(launched, place):
    first, second = _both(launched, "troubled", "decided", place)
    assert first["weights"] == second["weights"]


TREATED = [
    ("treated", "applied"),
    ("treated", "broken"),
    ("treated", "taken back"),
    ("treated shards", "applied"),
    ("treated shards", "broken"),
    ("treated shards", "clipped"),
    ("treated shards", "taken back"),
]
TROUBLE = ["decides otherwise", "failing remedy", "unlike remedies", "failing decision", "failing monitor"]


@pytest.mark.parametrize(("group", "name"), [*TREATED, *(("treated", name) for name in TROUBLE)])
def test_both_ranks_have_the_same_weights_after_every_step_of_a_treated_run(launched, group, name):
    first, second = _both(launched, group, name)
    assert len(first["sums"]) >= 24
    assert first["sums"] == second["sums"]
    assert first["hooks"] == second["hooks"] == 0


@pytest.mark.parametrize(("group", "name"), TREATED)
def test_both_ranks_take_the_same_actions(launched, group, name):
    first, second = _both(launched, group, name)
    assert len(first["actions"]) == 1
    assert _as_text({"actions": first["actions"]}) == _as_text({"actions": second["actions"]})


def _level(answer):
    return np.mean(list(answer["losses"].values())[-10:])


@pytest.mark.parametrize("group", ["treated", "treated shards"])
def test_a_network_that_did_not_learn_learns_on_two_ranks_too(launched, group):
    first, _ = _both(launched, group, "applied")
    untreated, _ = _both(launched, "treated", "suggested")
    assert [(action["kind"], action["outcome"]) for action in first["actions"]] == [("reinit", "kept")]
    assert _level(untreated) > 2.25
    assert _level(first) < 2.1


@pytest.mark.parametrize("group", ["treated", "treated shards"])
def test_weights_come_back_to_the_bit_on_two_ranks(launched, group):
    first, _ = _both(launched, group, "taken back")
    sums, (action,) = first["sums"], first["actions"]
    acted, decided = action["step"], action["decided_step"] + 2  # ranks act one sample later, when they have agreed
    assert action["outcome"] == "rolled_back"
    assert len(set(sums[:acted])) == 1
    assert sums[acted] != sums[0]
    assert sums[decided] == sums[0]


def test_a_row_from_before_the_action_does_not_decide_about_it(launched):
    """With several ranks it is recorded in the very sample in which they act."""
    for answer in _both(launched, "treated", "broken"):
        assert [action["outcome"] for action in answer["actions"]] == ["applied"]


@pytest.mark.parametrize("name", TROUBLE[:3])
def test_where_the_ranks_do_not_agree_nothing_is_done(launched, name):
    without, _ = _both(launched, "treated", "plain")
    for answer in _both(launched, "treated", name):
        assert answer["actions"] == []
        assert answer["sums"] == without["sums"]


@pytest.mark.parametrize("name", TROUBLE)
def test_the_first_rank_says_once_that_the_mitigator_or_all_of_us_is_off(launched, name):
    told = [text for text in _both(launched, "treated", name)[0]["told"] if "switched off" in text]
    assert len(told) == 1


@pytest.mark.parametrize("name", ["failing remedy", "failing decision", "failing monitor"])
def test_the_rank_on_which_the_mitigator_failed_says_why(launched, name):
    (told,) = _both(launched, "treated", name)[1]["told"]
    assert "ZeroDivisionError: on purpose" in told


def test_weights_that_are_cut_over_ranks_are_not_treated_and_this_is_said_once(launched):
    first, second = _both(launched, "treated shards", "cut")
    assert first["actions"] == second["actions"] == []
    assert len([text for text in first["told"] if "the mitigator is switched off" in text]) == 1
    assert second["told"] == []
