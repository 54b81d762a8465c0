"""Which limit is best, on made-up runs."""

import pytest

from tests.benchmarks.limits import LIMITS, Tried, best, leave_one_out

DEFAULT = LIMITS[0].default


def tried(family, is_sick, is_right, seed=0):
    return Tried(case=family, family=family, seed=seed, is_sick=is_sick, is_right=is_right)


def grid(**values):
    """Limits by name -> which of two sick and two healthy families are judged right: `ABcd` is a and b."""
    names = {"low": DEFAULT - 1, "default": DEFAULT, "high": DEFAULT + 2}
    return {
        names[name]: [tried(family, family in "ab", family.upper() in right) for family in "abcd"]
        for name, right in values.items()
    }


def test_no_false_alarm_comes_before_all_that_is_found():
    assert best(grid(low="ABCd", default="AbCD", high="abCD"), DEFAULT) == DEFAULT


def test_of_limits_without_a_false_alarm_the_one_that_finds_most_is_best():
    assert best(grid(low="ABCD", default="AbCD", high="abCD"), DEFAULT) == DEFAULT - 1


def test_of_equal_limits_the_nearest_to_the_default_is_best():
    assert best(grid(low="ABCD", default="abCD", high="ABCD"), DEFAULT) == DEFAULT - 1
    assert best(grid(low="ABCD", default="ABCD", high="ABCD"), DEFAULT) == DEFAULT


def test_a_family_that_is_left_out_has_no_say():
    values = grid(low="ABCd", default="AbCD", high="abCD")
    assert best(values, DEFAULT, without="d") == DEFAULT - 1


def test_what_changes_is_told_with_the_family_that_was_left_out():
    found = leave_one_out(LIMITS[0], grid(low="ABCd", default="AbCD", high="abCD"))
    assert found["best"] == DEFAULT
    assert found["chosen"] == {f"{DEFAULT:g}": 3, f"{DEFAULT - 1:g}": 1}
    assert found["changed"] == [
        {"family": "d", "case": "d", "seed": 0, "limit": DEFAULT - 1, "right_with_default": True}
    ]


@pytest.mark.parametrize("limit", LIMITS, ids=[limit.name for limit in LIMITS])
def test_every_limit_can_take_each_value_of_its_grid(limit):
    for value in limit.values:
        assert getattr(limit.detector(**{limit.attribute: value}), limit.attribute) == value
    assert limit.default in limit.values
