"""The numbers in every way of training that Lightning has, against plain PyTorch."""

import pytest

from .harness import expected, lines
from .modes import MODES


# one test a mode, for a mode is trained once in a process, and tests are spread over several
@pytest.mark.parametrize("mode", MODES)
def test_every_number_is_that_of_plain_pytorch(mode):
    assert {line.quantity: line.worst for line in lines(mode) if not line.holds} == {}


def _values(mode, quantity):
    return [value for _, row in expected(mode, quantity) for value in row.values()]


@pytest.mark.parametrize("mode", [mode for mode in MODES if "clipped" in mode])
def test_a_clipped_mode_is_clipped(mode):
    assert min(_values(mode, "clip_factor")) < 0.9


@pytest.mark.parametrize("mode", [mode for mode in MODES if "skipped" in mode])
def test_steps_are_skipped_at_first_and_not_later(mode):
    skipped = _values(mode, "step_skipped")
    assert skipped[0] == 1
    assert skipped[-1] == 0


@pytest.mark.parametrize("quantity", ["saturated_fraction", "dead_fraction", "grad_zero_fraction"])
def test_a_share_is_not_trivial(quantity):
    assert any(0 < share < 1 for share in _values("fp32", quantity))


@pytest.mark.parametrize("mode", ["cell in a loop", "module used twice", "shared layer"])
def test_calls_are_told_apart_where_there_are_several(mode):
    assert len({name for _, row in expected(mode, "calls") for name in row}) > 1
