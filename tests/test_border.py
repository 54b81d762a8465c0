import warnings

import pytest

from lightning_gradflow.border import RAISE_VARIABLE, Border
from lightning_gradflow.findings import GradFlowWarning, VanishingGradientWarning


@pytest.fixture
def closed(monkeypatch):
    """A border as users have it: errors do not get through."""
    monkeypatch.delenv(RAISE_VARIABLE)
    return Border()


BY_ZERO = ZeroDivisionError("by zero")


def fail(error=BY_ZERO):
    raise error


def test_a_part_that_works_gives_its_result(closed):
    assert closed.run("sum", sum, [1, 2], default=0) == 3
    assert not closed.is_off("sum")


def test_a_part_that_fails_gives_the_default(closed):
    with pytest.warns(GradFlowWarning):
        assert closed.run("division", fail, default=-1) == -1


def test_the_warning_names_the_part_and_the_error(closed):
    with pytest.warns(GradFlowWarning, match=r"division is switched off \(ZeroDivisionError: by zero\)"):
        closed.run("division", fail, default=None)


def test_a_part_that_failed_is_not_run_again(closed):
    with pytest.warns(GradFlowWarning):
        closed.run("part", fail, default=None)
    calls = []
    assert closed.run("part", calls.append, 1, default="default") == "default"
    assert calls == []


def test_the_other_parts_go_on(closed):
    with pytest.warns(GradFlowWarning):
        closed.run("part", fail, default=None)
    assert closed.run("other", int, "7", default=0) == 7


def test_a_message_is_told_once(closed):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            closed.tell("one")
            closed.tell("two")
    assert [str(warning.message) for warning in told] == ["one", "two"]


def test_a_warning_of_ours_that_the_user_made_an_error_gets_through(closed):
    with pytest.raises(VanishingGradientWarning):
        closed.run("part", fail, VanishingGradientWarning("as asked"), default=None)
    assert not closed.is_off("part")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_gets_through(closed, error):
    with pytest.raises(error):
        closed.run("part", fail, error(), default=None)


def test_errors_get_through_where_the_variable_says_so(monkeypatch):
    monkeypatch.setenv(RAISE_VARIABLE, "1")
    with pytest.raises(ZeroDivisionError):
        Border().run("part", fail, default=None)


def _told(action):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        action()
    return len(told)


@pytest.fixture
def second_rank(closed):
    """A border of a process that does not speak for all."""
    closed.reset(tells=False)
    return closed


def test_a_process_that_does_not_speak_for_all_tells_nothing(second_rank):
    assert _told(lambda: second_rank.tell("one")) == 0


def test_what_is_to_be_told_everywhere_is_told_by_every_process(second_rank):
    assert _told(lambda: second_rank.tell("one", everywhere=True)) == 1


def test_what_is_told_everywhere_is_told_once(second_rank):
    assert _told(lambda: [second_rank.tell("one", everywhere=True) for _ in range(2)]) == 1


def test_what_was_not_told_here_can_still_be_told_everywhere(second_rank):
    assert _told(lambda: [second_rank.tell("one"), second_rank.tell("one", everywhere=True)]) == 1


def test_an_error_is_told_by_the_process_that_it_happened_on(second_rank):
    assert _told(lambda: second_rank.run("part", fail, default=None)) == 1


def test_a_part_that_is_switched_off_by_plan_is_not_told_by_the_others(second_rank):
    assert _told(lambda: second_rank.switch_off("part", "as planned")) == 0


def test_a_part_is_off_whether_or_not_it_was_told(second_rank):
    second_rank.switch_off("part", "as planned")
    assert second_rank.is_off("part")


def test_after_a_reset_a_part_that_failed_is_tried_again(closed):
    with pytest.warns(GradFlowWarning):
        closed.run("part", fail, default=None)
    closed.reset()
    assert closed.run("part", int, "7", default=0) == 7


def test_after_a_reset_a_message_is_told_again(closed):
    first = _told(lambda: closed.tell("one"))
    closed.reset()
    assert (first, _told(lambda: closed.tell("one"))) == (1, 1)
