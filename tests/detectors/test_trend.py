import math

import numpy as np
import pytest
from scipy import stats

from lightning_gradflow.detectors.trend import mann_kendall, steepest_fall, theil_sen

SEEDS = range(5)


def naive_slopes(x, y):
    return [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x)) if x[i] != x[j]]


def naive_z(y):
    n = len(y)
    score = sum(int(y[j] > y[i]) - int(y[j] < y[i]) for i in range(n) for j in range(i + 1, n))
    variance = n * (n - 1) * (2 * n + 5)
    for value in set(y.tolist()):
        t = y.tolist().count(value)
        variance -= t * (t - 1) * (2 * t + 5)
    return 0.0 if score == 0 else (score - (1 if score > 0 else -1)) / math.sqrt(variance / 18)


def test_the_slope_of_a_line_is_its_slope():
    x = np.array([0.0, 1.0, 5.0, 6.0])
    assert theil_sen(x, 3 - 0.5 * x) == -0.5


def test_a_quarter_of_wild_points_does_not_move_a_line():
    x = np.arange(20.0)
    y = 2 * x
    y[::4] = 1e9
    assert theil_sen(x, y) == pytest.approx(2.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_slope_is_the_median_of_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 9, 30).astype(float), rng.standard_normal(30)
    assert theil_sen(x, y) == pytest.approx(float(np.median(naive_slopes(x, y))))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_slope_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.standard_normal(40)), rng.standard_normal(40)
    assert theil_sen(x, y) == pytest.approx(stats.theilslopes(y, x).slope)


def test_a_selection_of_many_points_gives_nearly_the_slope_of_all():
    rng = np.random.default_rng(0)
    x = np.arange(1500.0)
    y = 0.01 * x + rng.standard_normal(1500)
    assert theil_sen(x, y) == pytest.approx(stats.theilslopes(y, x).slope, rel=0.02)


@pytest.mark.parametrize("x", [[], [1.0], [2.0, 2.0, 2.0]])
def test_without_two_different_positions_there_is_no_slope(x):
    assert math.isnan(theil_sen(np.array(x), np.arange(float(len(x)))))


def test_five_falling_values_have_the_z_of_the_textbook():
    # S = -10, Var = 5 * 4 * 15 / 18
    assert mann_kendall(np.array([5.0, 4.0, 3.0, 2.0, 1.0])) == pytest.approx(-9 / math.sqrt(50 / 3))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [3, 1000])
def test_z_with_ties_is_that_of_a_naive_loop(seed, levels):
    y = np.random.default_rng(seed).integers(0, levels, 25).astype(float)
    assert mann_kendall(y) == pytest.approx(naive_z(y))


@pytest.mark.parametrize("seed", SEEDS)
def test_z_has_the_sign_of_kendalls_tau(seed):
    y = np.random.default_rng(seed).standard_normal(25)
    assert np.sign(mann_kendall(y)) == np.sign(stats.kendalltau(np.arange(25), y).statistic)


@pytest.mark.parametrize("y", [[], [1.0], [2.0, 2.0, 2.0], [1.0, 2.0, 1.0]])
def test_a_series_without_a_trend_has_z_zero(y):
    assert mann_kendall(np.array(y)) == 0


def test_z_is_standard_normal_without_a_trend():
    rng = np.random.default_rng(0)
    z = [mann_kendall(rng.standard_normal(32)) for _ in range(2000)]
    assert np.std(z) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_steepest_fall_is_the_lower_confidence_limit_of_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = np.arange(40.0), rng.standard_normal(40)
    sure = 0.95
    one = np.zeros(40, dtype=int)
    found = steepest_fall(x, y, one, z=float(stats.norm.ppf(0.5 + sure / 2)))
    limit = stats.theilslopes(y, x, alpha=sure).low_slope
    slopes = np.sort(naive_slopes(x, y))  # scipy rounds the rank, we take the lower one
    assert abs(np.searchsorted(slopes, found) - np.searchsorted(slopes, limit)) <= 1


def test_the_steepest_fall_of_a_line_is_its_slope():
    x = np.arange(12.0)
    assert steepest_fall(x, -3 * x, np.zeros(12, dtype=int), z=3) == -3


@pytest.mark.parametrize("phase", [1.0, -1.0])
def test_what_returns_in_every_season_is_no_fall(phase):
    x = np.arange(32.0)
    seasons = np.arange(32) % 8
    assert steepest_fall(x, 5 * phase * seasons, seasons, z=2.5) == 0


def test_without_seasons_a_falling_period_looks_like_a_fall():
    x = np.arange(32.0)
    assert steepest_fall(x, -5.0 * (np.arange(32) % 8), np.zeros(32, dtype=int), z=2.5) < -0.1


def test_too_few_pairs_leave_room_for_any_fall():
    x = np.arange(3.0)
    assert steepest_fall(x, x, np.zeros(3, dtype=int), z=3) == -math.inf
    assert steepest_fall(x, x, np.arange(3), z=0) == -math.inf


def test_the_true_slope_is_below_the_steepest_fall_as_rarely_as_z_says():
    rng = np.random.default_rng(0)
    x, one = np.arange(32.0), np.zeros(32, dtype=int)
    lower = [steepest_fall(x, rng.standard_normal(32), one, z=1.645) > 0 for _ in range(2000)]
    assert 0.02 < np.mean(lower) < 0.07
