"""What the mitigator measures under FSDP2 is what one process would, on all ranks, and no rank waits for another."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .launcher import RankError, launch_once
from .program import HAS_FSDP2
from .unsharded import ACTED, CASES, FALLS_BACK, STEPS, UNDONE, case_answer

pytestmark = [
    pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 runs on the CPU from torch 2.7 on"),
    pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning"),
]


@dataclass(frozen=True)
class Launched:
    """What the two ranks answered, and the folder with their weights."""

    ranks: list[Any]
    folder: Path

    def weights(self, name, rank):
        return torch.load(self.folder / f"{name} {rank}.pt")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, worker_id):
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "unsharded"
    folder.mkdir(exist_ok=True)
    try:
        return Launched(launch_once(folder / "answer.json", "tests.distributed.unsharded", str(folder)), folder)
    except RankError as error:
        pytest.fail(str(error), pytrace=False)


alone = functools.cache(lambda name: case_answer(CASES[name]))


def _done(answer):
    return [(action["step"], action["kind"], tuple(action["layers"])) for action in answer["actions"]]


@pytest.mark.parametrize("name", CASES)
def test_the_new_weights_are_those_of_one_process_on_the_batch_of_the_first_rank(two_ranks, name):
    _, expected = alone(name)
    torch.manual_seed(1)
    before = dict(CASES[name].make().named_parameters())
    for rank in range(2):
        found = two_ranks.weights(name, rank)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-6)
    assert any((values - before[key.removeprefix("net.")]).abs().max() > 0.1 for key, values in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_do_the_same_and_measure_what_one_process_does(two_ranks, name):
    answer, _ = alone(name)
    first, second = (rank["cases"][name] for rank in two_ranks.ranks)
    assert _done(first) == _done(second) == _done(answer)
    assert [kind for _, kind, _ in _done(first)] == [CASES[name].remedy]
    assert _done(first)[0][0] == ACTED
    (mine,), (theirs,) = first["actions"], answer["actions"]
    own = {key: value for key, value in mine["before"].items() if key != "loss"}  # that is a mean over the ranks
    assert own  # by the book nothing is measured
    assert own == pytest.approx({key: theirs["before"][key] for key in own}, rel=1e-5)
    assert mine["after"] == pytest.approx(theirs["after"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["whole", "bf16", "offloaded", "grouped", "recurrence"])
def test_optimizers_forget_what_was_drawn_anew_and_nothing_else(two_ranks, name):
    answer, _ = alone(name)
    for rank in two_ranks.ranks:
        assert rank["cases"][name]["forgot"] == answer["forgot"] > 0


def test_a_parameter_in_parts_is_forgotten_as_a_whole(two_ranks):
    """Of which two of three are changed for a part of their units."""
    for rank in two_ranks.ranks:
        assert rank["cases"]["dead units"]["forgot"] == 3


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_a_network_that_does_not_learn_is_cured_from_data(two_ranks, name):
    first, second = (rank["cured"][name] for rank in two_ranks.ranks)
    (action,) = first["actions"]
    assert (action["kind"], action["outcome"]) == ("reinit", "kept")
    assert action["before"]["span"] < -5
    assert abs(action["after"]["span"]) < 0.3
    losses = list(first["losses"].values())
    assert np.mean(losses[-10:]) < 1.8 < 2.25 < losses[0]  # a guess costs ln 10 = 2.3
    assert len(first["sums"]) == 100
    assert first["sums"] == second["sums"]
    assert str(first["actions"]) == str(second["actions"])


def _told(answer):
    return [text for text in answer["told"] if text.startswith("GradFlowWarning")]


@pytest.mark.parametrize("name", FALLS_BACK)
def test_where_one_rank_cannot_measure_all_draw_by_the_book_and_that_is_said(two_ranks, name):
    first, second = (rank["fails"][name] for rank in two_ranks.ranks)
    assert _done(first) == _done(second)
    assert [kind for _, kind, _ in _done(first)] == ["reinit"]
    assert list(first["actions"][0]["before"]) == ["loss"]
    (told,) = _told(first)
    assert "the whole model can't be rehearsed (it failed on another rank), so layers are drawn by the textbook" in told
    assert _told(second) == []


@pytest.mark.parametrize("name", UNDONE)
def test_where_one_rank_fails_all_put_back_what_they_did_and_end(two_ranks, name):
    first, second = (rank["fails"][name] for rank in two_ranks.ranks)
    assert first["actions"] == second["actions"] == []
    assert len(set(first["sums"])) == 1
    assert "a remedy failed on another rank" in _told(first)[0]
    assert "ZeroDivisionError: on purpose" in _told(second)[0]


@pytest.mark.parametrize("name", [*FALLS_BACK, *UNDONE])
def test_after_a_failure_of_one_rank_both_go_on_with_the_same_weights(two_ranks, name):
    first, second = (rank["fails"][name] for rank in two_ranks.ranks)
    assert len(first["sums"]) == STEPS
    assert first["sums"] == second["sums"]


def test_what_a_validation_leaves_whole_is_gone_back_to_as_well(two_ranks):
    for rank in two_ranks.ranks:
        start, *after = rank["validated"]["sums"]
        assert [action["kind"] for action in rank["validated"]["actions"]] == ["rollback"]
        assert after[ACTED] == start
        assert start not in after[:ACTED]
