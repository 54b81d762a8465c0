"""Sums over two real ranks, and what the probes make of them."""

import json
import math
import random

import pytest
import torch

from lightning_gradflow.probes.ranks import RankSums, Topology
from tests.probes.naive_signals import drawn, expected


@pytest.mark.parametrize(("data", "model"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_all_ranks_are_those_of_every_copy_of_the_model(data, model):
    assert Topology(data, model).ranks == data * model


# -- sums


def test_both_ranks_get_the_sums(answers):
    shared = [{name: answer["sums"][name] for name in ("pieces", "counts", "numbers")} for answer in answers]
    assert shared == [{"pieces": [3.0, 30.0], "counts": [5.0], "numbers": [1.0, 1.0]}] * 2


def test_what_a_rank_keeps_to_itself_is_not_summed(answers):
    assert [answer["sums"]["own"] for answer in answers] == [[0.0], [1.0]]


def test_a_name_that_only_one_rank_has_stands_where_it_was_executed(answers):
    assert [answer["names"]["first"] for answer in answers] == [[["a", [2.0]], ["b", [5.0]], ["c", [2.0]]]] * 2


def test_who_lacks_a_name_adds_zeros(answers):
    assert [answer["names"]["again"] for answer in answers] == [[["a", [1.0]], ["b", [2.0]], ["c", [3.0]]]] * 2


def test_a_name_that_comes_late_on_one_rank_is_taken_in(answers):
    expected = [["a", [2.0]], ["late", [7.0]], ["b", [2.0]], ["c", [0.0]]]
    assert [answer["names"]["late"] for answer in answers] == [expected] * 2


def test_ranks_that_bring_nothing_get_zeros(answers):
    expected = [["a", [0.0]], ["late", [0.0]], ["b", [0.0]], ["c", [0.0]]]
    assert [answer["names"]["nothing"] for answer in answers] == [expected] * 2


NEGOTIATED = ["all_reduce", "all_gather_object", "all_reduce"]


@pytest.mark.parametrize(
    ("sample", "made"),
    [
        (0, NEGOTIATED),
        (1, ["all_reduce"]),
        (2, ["all_reduce"]),
        (3, NEGOTIATED),
        (4, ["all_reduce"]),
        (5, ["all_reduce"]),
    ],
    ids=["first", "as before", "nothing", "new on one rank", "without the new one", "with the new one on both"],
)
def test_a_fetch_is_one_collective_once_the_names_are_agreed_on(answers, sample, made):
    assert [answer["collectives"][sample] for answer in answers] == [made] * 2


def test_a_name_of_two_lengths_is_refused_on_both_ranks(answers):
    expected = ["ValueError", "length of a must be the same on all ranks, got 2, 1"]
    assert [answer["lengths"]["bad"] for answer in answers] == [expected] * 2


def test_after_a_refused_name_the_next_fetch_works(answers):
    assert [answer["lengths"]["after"] for answer in answers] == [[["b", [2.0]]]] * 2


@pytest.mark.parametrize("when", ["agreed", "first"])
def test_a_rank_that_failed_is_known_to_both_after_one_collective(answers, when):
    failures = [answer["failure"][when] for answer in answers]
    assert [(failure["error"], failure["made"]) for failure in failures] == [("RankFailedError", ["all_reduce"])] * 2


@pytest.mark.parametrize("when", ["agreed", "first"])
def test_after_a_failure_the_next_fetch_works(answers, when):
    assert [answer["failure"][when]["after"] for answer in answers] == [[["a", [4.0]]]] * 2


def test_the_message_tells_how_many_ranks_failed():
    with pytest.raises(RuntimeError, match="an error on 3 of the ranks"):
        RankSums(torch.device("cpu")).is_agreed(torch.tensor([0.0, 3.0]).numpy())


# -- signals of data parallelism


def test_drawn_samples_are_summed_as_a_naive_count_sums_them(answers):
    assert repr(answers[0]["drawn samples"]) == repr(answers[1]["drawn samples"])
    told = iter(answers[0]["drawn samples"])
    for seed in range(6):
        draws, silent = [random.Random(2 * seed + rank) for rank in range(2)], {}
        for i in range(3):
            samples = [drawn(draw, random.Random(100 * seed + i)) for draw in draws]
            passes = {k for sample in samples for seen in sample.values() for k in (*seen.deltas, *seen.times)}
            naive, calls = expected(samples, silent, 2, dict.fromkeys(passes, 0.5))
            found = next(told)
            for name in {*naive, *found["points"]}:
                assert found["points"][name] == pytest.approx(naive[name], rel=1e-12, nan_ok=True), name
            for name in {*calls, *found["calls"]}:
                assert found["calls"][name] == pytest.approx(calls[name], rel=1e-12, nan_ok=True), name


SIGNALS = [
    "halves of a batch",
    "loops of two lengths",
    "a branch of one rank",
    "an empty batch of one rank",
    "a split layer",
    "a layer on all parts",
]


@pytest.mark.parametrize("case", SIGNALS)
def test_both_ranks_get_the_same_numbers(answers, case):
    assert json.dumps(answers[0][case]) == json.dumps(answers[1][case])


def test_signals_of_two_halves_are_those_of_the_whole_batch(answers):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    hidden = (torch.tensor([[1.0, 0.0], [0.0, 3.0]]) @ weight.T).requires_grad_()
    output = hidden.relu()
    at_hidden, at_output = torch.autograd.grad(output.mean(), (hidden, output))
    found = answers[0]["halves of a batch"]["points"]
    for name, values, gradient in (("0", hidden, at_hidden), ("1", output, at_output)):
        assert found[name]["output_rms"] == pytest.approx(values.square().mean().sqrt().item())
        assert found[name]["delta_norm"] == pytest.approx(gradient.norm().item())


def test_headroom_of_two_halves_is_that_of_what_the_ranks_held(answers):
    held = 1 / 3  # at all outputs of the ReLU, on each rank of its own mean over three
    assert answers[0]["halves of a batch"]["points"]["1"]["delta_headroom"] == pytest.approx(math.log2(held) + 149)


def test_a_unit_is_dead_only_where_it_is_silent_on_every_rank(answers):
    assert answers[0]["halves of a batch"]["points"]["1"]["dead_fraction"] == pytest.approx(1 / 3)


def test_the_signals_of_a_sample_are_one_collective(answers):
    assert [answer["halves of a batch"]["made"] for answer in answers] == [["all_reduce"]] * 2


def test_loops_of_two_lengths_are_as_long_as_the_longer_one(answers):
    # at each call the joined delta is (1 or 2 ranks) / 2 data-parallel ranks, by their norms
    expected = [math.sqrt(2) / 2, 0.5, 0.5]
    assert answers[0]["loops of two lengths"]["calls"]["cell"] == pytest.approx(expected)


def test_the_longer_loop_tells_the_number_of_calls(answers):
    assert answers[0]["loops of two lengths"]["points"]["cell"]["calls"] == 3.0


def test_a_layer_that_one_rank_runs_has_the_numbers_of_that_rank(answers):
    rare = answers[0]["a branch of one rank"]["points"]["rare"]
    assert (rare["output_rms"], rare["delta_norm"]) == (3.0, 0.5)


def test_a_layer_that_one_rank_runs_stands_in_order_of_execution(answers):
    assert [answer["a branch of one rank"]["order"] for answer in answers] == [["first", "rare", "last"]] * 2


def test_an_empty_batch_of_one_rank_leaves_the_numbers_of_the_other(answers):
    expected = {"output_rms": 3.0, "dead_fraction": 0.0, "delta_norm": 0.5, "delta_headroom": 149.0}
    found = answers[0]["an empty batch of one rank"]["1"]
    assert {name: found[name] for name in expected} == expected


def test_an_error_of_one_rank_ends_the_sample_on_both(answers):
    assert [answer["an error of one rank"]["error"] for answer in answers] == ["TypeError", "RankFailedError"]


def test_after_an_error_no_rank_waits_for_the_other(answers):
    assert [answer["an error of one rank"]["after"] for answer in answers] == [[["a", [2.0]]]] * 2


# -- signals of a model that is split

WHOLE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [1.0, 1.0]])


def _on_one_rank(x, loss):
    """(output_rms, delta_norm) behind the layer and behind its ReLU."""
    hidden = (x @ WHOLE.T).requires_grad_()
    output = hidden.relu()
    gradients = torch.autograd.grad(loss(output), (hidden, output))
    return [
        pytest.approx((values.square().mean().sqrt().item(), gradient.norm().item()))
        for values, gradient in zip((hidden, output), gradients, strict=True)
    ]


def _signals(points):
    return [(points[name]["output_rms"], points[name]["delta_norm"]) for name in ("0", "1")]


def test_halves_of_a_split_layer_are_added(answers):
    expected = _on_one_rank(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), lambda output: output.square().sum())
    assert _signals(answers[0]["a split layer"]) == expected


def test_units_of_a_split_layer_are_joined(answers):
    assert answers[0]["a split layer"]["1"]["dead_fraction"] == 0.25


def test_units_of_a_layer_that_is_split_unevenly_are_joined(answers):
    assert answers[0]["an unevenly split layer"] == pytest.approx([math.nan, 0.25], nan_ok=True)


def test_what_all_parts_of_a_split_model_have_counts_once(answers):
    expected = _on_one_rank(torch.ones(2, 2), lambda output: output.mean())
    assert _signals(answers[0]["a layer on all parts"]) == expected
