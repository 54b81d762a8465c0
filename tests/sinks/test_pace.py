import math

import pytest

from lightning_gradflow.sinks.pace import ASSUMED_SECONDS, MAX_SHARE, Pace
from tests import made_up

ENDLESS, PLANNED = [math.nan] * 5000, [row / 5000 for row in range(5000)]


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def pictures(progress, seconds_a_row, seconds_a_picture):
    """Rows, from 0 on, with which a picture was sent; the clock; the pace."""
    clock, found = Clock(), []
    pace, shown = Pace(clock), made_up.history(2)
    for row, done in enumerate(progress):
        clock.seconds += seconds_a_row
        if pace.is_due(made_up.view(shown, progress=done)):
            with pace.drawing():
                clock.seconds += seconds_a_picture
            found.append(row)
    return found, clock, pace


def test_every_tenth_of_a_long_run_has_a_picture_and_nothing_between():
    found, _, _ = pictures([row / 100 for row in range(100)], 60, 0.1)
    assert found == list(range(10, 100, 10))


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0, math.nan])
def test_the_first_row_has_none_however_much_of_the_run_is_done(done):
    assert pictures([done], 1e6, 0.1)[0] == []


def test_a_run_without_an_end_has_one_whenever_the_rows_have_doubled():
    found, _, _ = pictures([math.nan] * 40, 1000, 0.1)
    assert [row + 1 for row in found] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("progress", [ENDLESS, PLANNED], ids=["endless", "planned"])
@pytest.mark.parametrize("cost", [0.01, 0.2, 1.0, 10.0])
def test_pictures_take_half_a_percent_of_the_time_at_most_once_it_is_known_what_they_cost(progress, cost):
    for rows in (100, 400, 1600, 5000):
        found, clock, _ = pictures(progress[:rows], 1.0, cost)
        first = cost - ASSUMED_SECONDS  # what the first one took more than was thought
        assert len(found) * cost <= MAX_SHARE * (clock.seconds - 1000.0) + max(0.0, first)


def test_the_first_comes_when_there_is_time_for_what_it_is_thought_to_cost():
    found, _, _ = pictures([0.5] * 100, 1.0, 0.1)
    assert found == [ASSUMED_SECONDS / MAX_SHARE - 1]


def test_a_picture_for_which_there_was_no_time_comes_later_and_once():
    found, _, _ = pictures([0.05, 0.1, 0.11, 0.12, 0.13, 0.14, 0.2, 0.25], 10, 0.1)
    assert found == [3, 6]


def test_a_dear_picture_is_not_followed_by_another_one_soon():
    found, _, _ = pictures([row / 1000 for row in range(1000)], 1.0, 2.0)
    assert found == [100, 797]


def test_a_picture_that_fails_has_taken_its_time_too():
    clock = Clock()
    pace = Pace(clock)

    def draw():
        with pace.drawing():
            clock.seconds += 100
            raise ValueError("no font")

    with pytest.raises(ValueError, match="no font"):
        draw()
    clock.seconds += 1000
    view = made_up.view(progress=0.5)
    assert not any(pace.is_due(view) for _ in range(3))


def test_at_the_end_there_is_one_unless_the_newest_row_had_it():
    assert pictures([0.5], 1.0, 0.1)[2].is_due_at_end
    assert pictures([0.5, 0.6], 1.0, 0.1)[2].is_due_at_end
    assert not pictures([0.5, 0.6], 1000.0, 0.1)[2].is_due_at_end
    assert not pictures([], 1.0, 0.1)[2].is_due_at_end
