"""Samples on their way to the host against a naive second implementation."""

import math
import random

import numpy as np
import pytest
import torch

from lightning_gradflow.history import Point
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.flat_rows import one_behind_the_other
from lightning_gradflow.probes.packing import Deltas, Seen, pack
from lightning_gradflow.probes.ranks import Topology
from lightning_gradflow.probes.transfer import Transfer
from lightning_gradflow.probes.unpacking import unpack
from tests.probes.naive_signals import POINTS, drawn, expected


def _unpacked(sample, silent=None, multiplier=1.0, scales=None):
    transfer = Transfer()
    pack(sample, scales or {}, transfer)
    return unpack(transfer.fetch(), Topology(), silent or SilentUnits(3), multiplier)


def _close(found, naive):
    """Sums of many numbers are rounded as they are added up."""
    assert {name: set(values) for name, values in found.items()} == {n: set(values) for n, values in naive.items()}
    for name, values in naive.items():
        for metric, value in values.items():
            assert found[name][metric] == pytest.approx(value, rel=1e-12, nan_ok=True), (name, metric)


@pytest.mark.parametrize("seed", range(25))
def test_statistics_are_those_of_a_naive_count(seed):
    draw = random.Random(seed)
    silent, naive_silent = SilentUnits(2), {}
    for _ in range(4):
        sample = drawn(draw)
        multiplier, scales = draw.choice([1.0, 0.25]), {0: torch.tensor(1024.0)} if draw.random() < 0.5 else {}
        signals = _unpacked(sample, silent, multiplier, scales)
        factors = {k: multiplier / (1024.0 if k in scales else 1.0) for k in _passes(sample)}
        naive, calls = expected([sample], naive_silent, 2, factors)
        _close({point.name: values for point, values in signals.points.items()}, naive)
        assert (list(signals.calls) and set(signals.calls) == set(calls)) or not calls
        for name, norms in calls.items():
            np.testing.assert_allclose(signals.calls[name], norms, rtol=1e-12)
        floors = [deltas.floor for seen in sample.values() for deltas in seen.deltas.values()]
        assert signals.floor == pytest.approx(max(floors, default=math.nan), nan_ok=True)


def _passes(sample):
    return sorted({k for seen in sample.values() for k in (*seen.deltas, *seen.times)})


def test_points_stand_in_order_of_execution():
    sample = {point: Seen(output_square=torch.tensor(1.0), output_count=1) for point in reversed(POINTS)}
    assert list(_unpacked(sample).points) == POINTS[::-1]


def test_a_point_without_an_output_stands_behind_those_with_one():
    first, second = POINTS[:2]
    sample = {first: Seen(deltas={0: Deltas({0: torch.tensor(4.0)}, 1, -149.0)})}
    sample[second] = Seen(output_square=torch.tensor(1.0), output_count=1)
    found = _unpacked(sample).points
    assert list(found) == [second, first]
    assert found[first] == {"delta_norm": 2.0, "delta_headroom": 150.0, "backward_pass": 0.0}


def test_a_sample_that_saw_nothing_has_no_numbers():
    signals = _unpacked({})
    assert (signals.points, signals.calls, math.isnan(signals.floor)) == ({}, {}, True)


def test_all_points_together_are_a_handful_of_arrays():
    """Thousands of small ones cost more than all that is measured."""

    def pieces(points):
        transfer = Transfer()
        seen = {"output_square": torch.tensor(1.0), "output_count": 1, "deviation_square": torch.tensor(1.0)}
        seen |= {"batched_square": torch.tensor(1.0), "saturated": torch.tensor(1), "bounded_count": 1}
        seen |= {"active": torch.tensor([True]), "deltas": {0: Deltas({0: torch.tensor(1.0)}, 1, -149.0)}}
        pack({Point(f"point{i}", f"point{i}"): Seen(**seen) for i in range(points)}, {}, transfer)
        return len(transfer.fetch())

    assert pieces(100) == pieces(1) < 10


def test_tensors_of_several_types_keep_their_order():
    pieces = [
        torch.tensor([1.0, 2.0]),
        torch.tensor(2**40 + 1),
        None,
        torch.tensor(True),
        torch.tensor(1e-300).double(),
    ]
    assert one_behind_the_other(pieces).tolist() == [1.0, 2.0, 2.0**40 + 1, 0.0, 1.0, float(torch.tensor(1e-300))]


def test_a_part_that_did_not_run_is_no_copy_of_one_whose_gradient_is_zero():
    """Zeros stand for it: equal sums of squares alone would take them for the same tensor, and the first for all."""
    point = POINTS[0]
    host = {
        ("delta", (0, point, 1)): np.zeros(2),
        ("delta counts", (0, point, 1)): np.array([0, 0, 0, 0, 0, 1, 6, -149.0, 0, 1]),
    }
    found = unpack(host, Topology(model=2), SilentUnits(3), 1.0)
    assert found.points[point] == {"delta_norm": 0.0, "delta_headroom": -math.inf, "backward_pass": 0.0}
    assert found.floor == -149.0


def test_an_activation_that_no_rank_ran_in_this_sample_has_no_numbers():
    """Ranks agree on names once: a branch that is not taken this time has zeros throughout."""
    point = Point("a.sigmoid", "a", "sigmoid")
    found = unpack({("gate", point): np.zeros(2)}, Topology(data=2), SilentUnits(3), 1.0)
    assert dict(found.points) == {}
