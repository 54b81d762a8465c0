"""Tensors that are spread over two real ranks."""

import json
import math

import pytest
import torch

from lightning_gradflow.probes.shards import complete, copies, is_sharded, local

HERE = {
    "shard": ([0.0, 1.0], [2.0, 3.0]),
    "uneven": ([0.0, 1.0, 2.0], [3.0, 4.0]),
    "empty": ([1.0], []),
    "replicate": ([0.0, 1.0, 2.0, 3.0, 4.0],) * 2,
    "partial": (None, None),
    "replicate and shard": ([0.0, 1.0], [2.0, 3.0]),
    "plain": ([0.0, 1.0, 2.0, 3.0, 4.0],) * 2,
}
"""What each of the ranks holds."""


@pytest.mark.parametrize("kind", HERE)
def test_a_tensor_is_spread_unless_it_is_plain(answers, kind):
    assert answers[0]["shards"][kind]["is_sharded"] == (kind != "plain")


@pytest.mark.parametrize("kind", HERE)
def test_the_part_of_each_rank_is_what_it_holds(answers, kind):
    assert tuple(answer["shards"][kind]["local"] for answer in answers) == HERE[kind]


def test_parts_that_must_be_added_up_are(answers):
    assert [answer["shards"]["partial"]["complete"] for answer in answers] == [[3.0, 6.0]] * 2


@pytest.mark.parametrize("kind", sorted(set(HERE) - {"partial"}))
def test_what_needs_no_adding_up_is_left_as_it_is(answers, kind):
    assert tuple(answer["shards"][kind]["complete"] for answer in answers) == HERE[kind]


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("shard", 1),
        ("uneven", 1),
        ("empty", 1),
        ("replicate", 2),
        ("partial", 2),
        ("replicate and shard", 1),
        ("plain", 2),
    ],
)
def test_copies_are_the_ranks_that_hold_the_same_part(answers, kind, ranks):
    assert [answer["shards"][kind]["copies"] for answer in answers] == [ranks] * 2


def test_without_ranks_a_tensor_is_its_own_part():
    tensor = torch.ones(2)
    assert (local(tensor) is tensor, complete(tensor) is tensor, is_sharded(tensor)) == (True, True, False)


def test_a_plain_tensor_is_on_all_ranks():
    assert copies(torch.ones(2), 8) == 8


# -- gradients of parameters that are spread

LAYERS = ["even", "uneven", "empty", "replicated", "partial", "plain"]


def test_both_ranks_get_the_same_statistics(answers):
    assert json.dumps(answers[0]["gradients"]["spread"]) == json.dumps(answers[1]["gradients"]["spread"])


@pytest.mark.parametrize("layer", LAYERS)
def test_statistics_of_spread_parameters_are_those_of_whole_ones(answers, layer):
    found = answers[0]["gradients"]
    assert found["spread"]["found"][layer] == pytest.approx(found["whole"]["found"][layer], rel=1e-6)


def test_a_spread_parameter_without_gradient_is_missing_and_not_zero(answers):
    found = answers[0]["gradients"]["spread"]["found"]
    assert set(found) == {*LAYERS, "frozen"}
    assert found["frozen"] == {"grad_missing_fraction": 1.0}


def test_histograms_of_spread_parameters_are_those_of_whole_ones(answers):
    found = answers[0]["gradients"]
    assert found["spread"]["histograms"] == found["whole"]["histograms"]


@pytest.mark.parametrize("kind", ["spread", "whole"])
def test_the_clip_factor_is_known_where_one_parameter_has_no_gradient(answers, kind):
    assert answers[0]["gradients"][kind]["clip_factor"] == pytest.approx(0.5)


def test_layers_whose_parameters_are_spread_are_told(answers):
    assert answers[0]["gradients"]["spread"]["spread"] == ["even", "uneven", "empty", "replicated", "partial", "frozen"]


def test_other_parameters_may_be_trained_in_the_next_sample(answers):
    assert [answer["gradients"]["later"] for answer in answers] == [
        {"even": ["even"], "uneven": ["uneven", "empty"]}
    ] * 2


def test_a_number_that_is_not_finite_on_one_rank_is_known_to_both(answers):
    norms = [answer["nonfinite"]["grad_norm"] for answer in answers]
    assert norms == [math.inf, math.inf]


def test_a_number_that_is_not_finite_on_one_rank_is_counted_over_both(answers):
    assert [answer["nonfinite"]["grad_nonfinite_fraction"] for answer in answers] == [0.25, 0.25]


def test_a_step_skipped_for_the_gradients_of_another_rank_has_no_update(answers):
    assert ["update_norm" in answer["nonfinite"] for answer in answers] == [False, False]
