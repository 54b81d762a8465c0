"""Which remedies are tried for what."""

import pytest

from lightning_gradflow.findings import FindingKind
from lightning_gradflow.remedies.plan import DESTRUCTIVE, NOT_FOR, PLAN, REMEDIES, UNTOUCHED, remedies_for

ROWS = pytest.mark.parametrize("row", PLAN, ids=lambda row: f"{row[0]}-{row[1]}")


@ROWS
def test_a_row_of_the_plan_names_remedies_that_there_are_each_once(row):
    assert PLAN[row]
    assert set(PLAN[row]) <= set(REMEDIES)
    assert len(set(PLAN[row])) == len(PLAN[row])


@ROWS
def test_a_cause_that_only_the_user_can_cure_has_no_row(row):
    assert row[1] not in NOT_FOR


def test_every_remedy_is_in_the_plan():
    assert {remedy for remedies in PLAN.values() for remedy in remedies} == set(REMEDIES)


def test_weights_are_overwritten_by_known_remedies():
    assert set(REMEDIES) > DESTRUCTIVE
    assert "clip" not in DESTRUCTIVE
    assert "rollback" not in DESTRUCTIVE


_BY_HAND = {FindingKind.NO_GRADIENT, FindingKind.MIXED_SAMPLES}


@pytest.mark.parametrize("kind", [kind for kind in FindingKind if kind not in _BY_HAND])
def test_every_kind_of_finding_but_a_missing_gradient_and_a_wrong_axis_can_be_treated(kind):
    assert any(row[0] is kind for row in PLAN)


def test_what_is_fed_in_the_wrong_order_is_left_to_the_user():
    assert not any(row[0] is FindingKind.MIXED_SAMPLES for row in PLAN)


def test_parameters_without_a_gradient_are_left_to_the_user():
    assert remedies_for(FindingKind.NO_GRADIENT, "unknown") == ()


def test_a_run_that_has_learnt_a_constant_alone_does_not_go_back_to_it():
    assert remedies_for(*UNTOUCHED, has_learnt=True) == remedies_for(*UNTOUCHED) == ("scale_inputs",)


@pytest.mark.parametrize("kind", FindingKind)
@pytest.mark.parametrize("cause", sorted(NOT_FOR))
def test_what_only_the_user_can_cure_has_no_remedy(kind, cause):
    assert remedies_for(kind, cause) == ()


def test_a_cause_without_a_row_has_the_remedies_of_an_unknown_one():
    kind = FindingKind.EXPLODING_GRADIENT
    assert remedies_for(kind, "of a new kind") == PLAN[kind, "unknown"] != ()


def test_a_cause_without_a_row_of_a_kind_without_an_unknown_one_has_none():
    assert (FindingKind.LOSS_PLATEAU, "unknown") not in PLAN
    assert remedies_for(FindingKind.LOSS_PLATEAU, "of a new kind") == ()


@pytest.mark.parametrize(
    ("kind", "cause", "first"),
    [
        (FindingKind.DEAD_UNITS, "symmetry", "reinit"),
        (FindingKind.DEAD_UNITS, "initialisation", "reinit"),
        (FindingKind.SATURATED_ACTIVATION, "weight_scale", "reinit"),
        (FindingKind.LOSS_PLATEAU, "weight_scale", "reinit"),
        (FindingKind.LOSS_PLATEAU, "recurrence", "reinit"),
        (FindingKind.SATURATED_ACTIVATION, "drift", "rollback"),
    ],
)
def test_what_was_wrong_from_the_start_is_not_left_by_going_back(kind, cause, first):
    assert remedies_for(kind, cause, has_learnt=True)[0] == first


@pytest.mark.parametrize("kind", [FindingKind.UPDATE_RATIO, FindingKind.NONFINITE_GRADIENT])
def test_where_inputs_can_not_be_scaled_steps_are_clipped_before_the_run_is_slowed_down(kind):
    assert remedies_for(kind, "unscaled_inputs") == ("scale_inputs", "clip", "rollback")


def test_what_was_overwritten_is_put_back():
    assert remedies_for(FindingKind.UPDATE_RATIO, "overwritten", has_learnt=True) == ("rollback",)
