"""Units that are silent for several samples in a row."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer


def _feed(silent, *samples):
    one = [silent.update(["relu"], np.array([len(s)]), np.array(s, dtype=np.bool_)) for s in samples]
    return [share for shares in one for share in shares.tolist()]


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
    silent = SilentUnits(2)
    first = silent.update(["a", "b"], np.array([1, 2]), np.array([False, True, False]))
    assert np.isnan(first).all()
    assert silent.update(["b"], np.array([2]), np.array([False, False])).tolist() == [0.5]
    assert silent.update(["b", "a"], np.array([2, 1]), np.array([False, True, False])).tolist() == [0.5, 1.0]


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


def test_counts_that_were_saved_go_on():
    draw = np.random.default_rng(0)
    samples = draw.random((6, 20)) < 0.3
    whole, first, second = SilentUnits(4), SilentUnits(4), SilentUnits(4)
    _feed(first, *samples[:3])
    second.load_state_dict(first.state_dict())
    assert _feed(second, *samples[3:]) == _feed(whole, *samples)[3:]


def test_saved_counts_do_not_change_with_further_samples():
    silent, loaded = SilentUnits(2), SilentUnits(2)
    _feed(silent, [0])
    state = silent.state_dict()
    _feed(silent, [1])
    loaded.load_state_dict(state)
    assert _feed(loaded, [0]) == [1.0]


def test_what_was_counted_before_is_forgotten_where_counts_are_loaded():
    silent = SilentUnits(1)
    _feed(silent, [0])
    silent.load_state_dict({})
    assert silent.state_dict() == {}


def _silent_fraction(*batches):
    """What one accumulated step over these batches gives for a ReLU with weights 1 and -1, and a unit that is dead."""
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU())
    model[0].weight.data, model[0].bias.data = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0.0, 0.0, -1.0])
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    for batch in batches:
        probe.start_batch()
        loss = model(batch).sum()
        probe.before_backward()
        loss.backward()
        probe.after_backward()
    probe.finish()
    found = {point.name: values for point, values in probe.collect(transfer.fetch()).points.items()}
    return found["1"].get("silent_fraction")


def test_a_single_sample_tells_the_units_that_are_silent_in_it_from_16_inputs_on():
    assert _silent_fraction(torch.ones(16, 1)) == pytest.approx(2 / 3)
    assert _silent_fraction(torch.ones(15, 1)) is None


def test_inputs_of_an_accumulated_step_and_positions_count_together():
    assert _silent_fraction(torch.ones(8, 1), -torch.ones(8, 1)) == pytest.approx(1 / 3)
    assert _silent_fraction(torch.ones(4, 4, 1)) == pytest.approx(2 / 3)
