import numpy as np
import pytest

from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.history import History, Row


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
