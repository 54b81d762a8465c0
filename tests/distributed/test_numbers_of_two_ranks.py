"""Every number of a distributed run against plain autograd in one process on the batches of both ranks."""

import pytest
import torch

from .launcher import RANKS
from .reference import reference, silent_units
from .runs import REPLICATED, SHARDED, WINDOW
from .table import QUANTITIES, error, measured

RUNS = REPLICATED | SHARDED


def _group(name):
    return "replicated" if name in REPLICATED else "spread"


@pytest.fixture(scope="module")
def runs(launched):
    """Name -> what each rank measured, and the truth."""
    cache = {}

    def get(name):
        if name not in cache:
            answers = launched(_group(name))
            weights = torch.load(answers.folder / f"{name}.pt", weights_only=True)
            cache[name] = [measured(rank[name]) for rank in answers.ranks], reference(RUNS[name], weights)
        return cache[name]

    return get


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", RUNS)
def test_every_number_is_that_of_one_process_with_all_batches(runs, name, quantity):
    (first, _), truth = runs(name)
    assert error(quantity, first, truth) <= RUNS[name].bar


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_have_the_same_history_to_the_last_bit(launched, name):
    first, second = (rank[name] for rank in launched(_group(name)).ranks)
    assert _without_warnings(first) == _without_warnings(second)


def _without_warnings(answer):
    # as text, in which NaN is NaN
    return {key: str(value) for key, value in answer.items() if key != "told"}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_about_a_run_in_which_all_can_be_measured(launched, name):
    assert [rank[name]["told"] for rank in launched(_group(name)).ranks] == [[], []]


def test_a_unit_that_is_dead_for_one_rank_alone_is_not_dead(launched, runs):
    folder = launched("replicated").folder
    weights = torch.load(folder / "DDP.pt", weights_only=True)[0]
    silent = [silent_units(RUNS["DDP"], rank, weights) for rank in range(RANKS)]
    assert {1, 2} <= silent[0]
    assert {0, 2} <= silent[1]
    (first, _), _ = runs("DDP")
    assert 0 < first[-1]["dead_fraction"]["net.relu"] < min(len(units) for units in silent) / 7


@pytest.mark.parametrize("name", ["DDP", "FSDP2", "tensor parallel"])
def test_the_shares_of_the_reference_are_not_trivial(runs, name):
    _, truth = runs(name)
    for quantity in ("saturated_fraction", "dead_fraction"):
        assert any(0 < share < 1 for numbers in truth for share in numbers[quantity].values())
    assert all(not numbers["dead_fraction"] for numbers in truth[: WINDOW - 1])


@pytest.mark.parametrize("name", ["DDP, clipped", "FSDP2, clipped"])
def test_the_clipped_runs_were_clipped(runs, name):
    _, truth = runs(name)
    assert all(numbers["clip_factor"][""] < 0.9 for numbers in truth)


def test_a_branch_that_one_rank_takes_is_a_point_of_both(runs):
    histories, _ = runs("DDP, unused parameters")
    assert all("net.branch" in numbers["delta_norm"] for history in histories for numbers in history)


def test_a_layer_that_nobody_uses_is_missing_and_not_zero(runs):
    histories, _ = runs("DDP, unused parameters")
    assert all("net.never" not in numbers["grad_norm"] for history in histories for numbers in history)


def test_the_longer_sequence_decides_how_many_calls_there_are(runs):
    histories, _ = runs("DDP, sequences of two lengths")
    assert all(
        f"net.cell {call}" in numbers["call_delta"] for history in histories for numbers in history for call in range(4)
    )
