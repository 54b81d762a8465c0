import numpy as np
import pytest

from lightning_gradflow.detectors.progress import has_learnt, is_blind
from lightning_gradflow.history import History, Point, Row


def learnt(losses, **limits):
    history = History()
    if len(losses):
        history.append(Row(len(losses) - 1, losses=np.array(losses, dtype=float)))
    return has_learnt(history, **limits)


def noise(n, size, seed=0):
    return size * np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([2.3], False),
        (np.full(100, 2.3), False),
        (np.linspace(2.3, 1.3, 100), True),
        (np.linspace(1.3, 2.3, 100), False),
        (np.linspace(2.3, 2.25, 100), False),
        (np.r_[9.0, np.full(99, 2.3)], True),  # halved at once, and flat from then on
        (np.full(100, np.nan), False),
        (np.r_[np.full(50, np.nan), np.full(50, 2.3)], False),
        (-np.linspace(1, 2, 100), True),
        (2.3 + noise(300, 0.3), False),
        (np.linspace(2.3, 1.5, 300) + noise(300, 0.1), True),
    ],
)
def test_a_run_has_learnt_when_its_loss_is_clearly_below_its_start(losses, expected):
    assert learnt(losses) is expected


@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_multiplying_the_loss_changes_nothing(scale):
    for losses in (np.linspace(2.3, 1.3, 100), np.full(100, 2.3)):
        assert learnt(losses * scale) is learnt(losses)


def test_the_limit_is_met_from_both_sides():
    def drop(share):
        return np.r_[np.ones(200), np.full(400, 1 - share)]

    assert not learnt(drop(0.049))
    assert learnt(drop(0.051))
    assert learnt(drop(0.049), min_learnt=0.04)


def test_noise_alone_is_rarely_taken_for_progress():
    assert sum(learnt(2.3 + noise(100, 0.5, seed)) for seed in range(100)) <= 10


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.r_[2.3, np.linspace(50, 2.4, 99)], False),  # a spike of its own, and back
        (np.r_[2.3, np.linspace(50, 1.0, 49), np.full(50, 1.0)], True),
        (np.r_[np.linspace(2.3, 1.0, 100), np.full(5, 2.3)], False),  # learnt, and lost again
        (np.r_[np.linspace(2.3, 1.0, 100), np.full(2, 2.3)], True),  # two odd batches
        (np.r_[np.linspace(2.3, 1.0, 100), np.full(5, 1.3)], True),  # some of it
    ],
)
def test_what_was_not_gained_or_is_lost_is_not_learnt(losses, expected):
    assert learnt(losses) is expected


def test_the_noise_of_a_run_that_learns_is_no_falling_back():
    for seed in range(50):
        losses = np.linspace(2.3, 1.0, 300) + noise(300, 0.3, seed)
        assert learnt(losses)


def outputs(*spread, losses=(2.3, 1.0)):
    history = History()
    history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(len(spread))])
    known = np.repeat(np.array(losses), 50)
    history.append(Row(99, {"output_spread": np.array(spread)}, losses=known))
    return history


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ((1.0, 0.9, 0.9), False),
        ((1.0, 0.1, 1e-5, 1e-7), True),  # the signal dies on its way forward
        ((1.0, 1e-5, 0.9, 0.9), False),
        ((1.0, 1.0, 0.5, 0.0), False),  # one constant by design
        ((1.0, np.nan, 1e-5, np.nan), True),
        ((np.nan, np.nan), False),
        ((), False),
    ],
)
def test_a_network_is_blind_if_its_output_is_the_same_for_every_sample(spread, expected):
    history = outputs(*spread)
    assert is_blind(history) is expected
    assert has_learnt(history) is not expected
