"""Which steps are sampled, with one optimizer and with several."""

import pytest

from lightning_gradflow.callbacks.cadence import Cadence


def _samples(interval, steps, **periods):
    """The sampled steps of a run in which optimizers step by turns: name -> (first step, period)."""
    cadence = Cadence(interval)
    found = {}
    for step in range(steps):
        due = cadence.is_due(step)
        stepped = [i for i, (first, period) in enumerate(periods.values()) if step % period == first]
        for i in stepped:
            cadence.note(i, step)
        if due:
            found[step] = stepped
            cadence.sampled(step, range(len(periods)), stepped)
    return found


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 1, 2, 3, 6, 9]), (4, [0, 1, 2, 4, 8, 12]), (10, [0, 1, 2, 4, 8, 10, 20])],
)
def test_the_first_steps_are_dense_and_the_rest_regular(interval, expected):
    assert list(_samples(interval, expected[-1] + 1, only=(0, 1))) == expected


def test_an_optimizer_whose_steps_never_fall_on_a_sample_gets_samples_of_its_own():
    found = _samples(50, 201, critic=(0, 1), generator=(4, 5))
    assert [step for step, stepped in found.items() if 1 in stepped and step > 20] == [34, 54, 104, 154]


def test_two_that_take_turns_are_both_sampled():
    found = _samples(10, 41, even=(0, 2), odd=(1, 2))
    assert [step for step, stepped in found.items() if 1 in stepped and step > 10] == [11, 21, 31]


def test_an_optimizer_that_has_stopped_is_not_waited_for():
    cadence = Cadence(10)
    cadence.note(0, 0)
    cadence.note(1, 0)
    cadence.note(1, 3)  # and never again
    due = []
    for step in range(30):
        cadence.note(0, step)
        if cadence.is_due(step):
            due.append(step)
            cadence.sampled(step, (0, 1), (0,))
    assert due == [0, 1, 2, 4, 6, 8, 10, 20]


def test_with_one_optimizer_that_steps_every_other_batch_nothing_is_added():
    assert list(_samples(10, 31, only=(0, 2))) == [0, 1, 2, 4, 8, 10, 20, 30]
