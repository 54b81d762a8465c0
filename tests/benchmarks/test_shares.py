import math

import pytest

from tests.benchmarks.shares import Share


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # at the ends the formula comes down to z^2 / (n + z^2)
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        # the last two are from Newcombe 1998, table I
        (50, 100, 0.403832, 0.596168),
        (81, 263, 0.255340, 0.366210),
        (15, 148, 0.062386, 0.160498),
    ],
)
def test_the_interval_is_wilsons(hits, total, low, high):
    assert Share(hits, total).interval == pytest.approx((low, high), abs=2e-4)


def test_nothing_has_no_share():
    assert math.isnan(Share(0, 0).value)
    assert all(map(math.isnan, Share(0, 0).interval))


def test_a_share_counts_what_is_true():
    assert Share.of(x > 1 for x in (0, 1, 2, 3)) == Share(2, 4)
