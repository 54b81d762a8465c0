"""Units that are silent for several samples in a row."""

import math
import random

import pytest
import torch

from lightning_gradflow.probes.dead_units import SilentUnits


def _feed(silent, *samples):
    return [silent.update("relu", torch.tensor(sample, dtype=torch.bool)).item() for sample in samples]


def test_nothing_is_known_before_the_window_is_full():
    assert [math.isnan(share) for share in _feed(SilentUnits(3), [1, 0], [1, 0], [1, 0])] == [True, True, False]


def test_a_unit_that_fires_once_in_the_window_is_alive():
    assert _feed(SilentUnits(2), [0, 0], [0, 1], [0, 0], [0, 0])[1:] == [0.5, 0.5, 1.0]


def test_a_unit_that_fires_again_is_alive_at_once():
    assert _feed(SilentUnits(1), [0], [1], [0]) == [1.0, 0.0, 1.0]


def test_another_number_of_units_starts_anew():
    shares = _feed(SilentUnits(2), [0, 0], [0, 0], [0, 0, 0], [0, 0, 0])
    assert [math.isnan(share) for share in shares] == [True, False, True, False]


def test_activations_are_counted_apart():
    silent = SilentUnits(1)
    silent.update("a", torch.tensor([False]))
    assert silent.update("b", torch.tensor([True])).item() == 0.0


def test_the_share_is_that_of_a_naive_count():
    draw = random.Random(0)
    samples = [[draw.random() < 0.3 for _ in range(50)] for _ in range(12)]
    found = _feed(SilentUnits(4), *samples)
    for i in range(3, 12):
        last = samples[i - 3 : i + 1]
        assert found[i] == pytest.approx(sum(not any(s[u] for s in last) for u in range(50)) / 50)


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match=r"window must be in \[1, inf\), got 0"):
        SilentUnits(0)
