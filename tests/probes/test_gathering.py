"""Small tensors that are read many at a time against the same ones read alone."""

import random

import pytest
import torch

from lightning_gradflow.probes import gathering
from lightning_gradflow.probes.flat_side import unit_axis
from lightning_gradflow.probes.gathering import Gathering
from lightning_gradflow.probes.packing import Deltas, Seen

_OPS = {"relu": {}, "relu6": {}, "tanh": {}, "sigmoid": {}, "elu": {"alpha": 2.0}, "gelu": {}, "softplus": {}}
_SHAPES = [(), (1,), (4, 3), (1, 3), (2, 5, 3), (2, 3, 4, 4), (5, 4, 3)]


def _calls(seed):
    """Outputs and gradients of a few points, in a random order; some come again, some in another shape."""
    draw, made = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(60):
        op, shape = draw.choice([*_OPS]), draw.choice(_SHAPES)
        values = torch.randn(shape, generator=made, dtype=draw.choice([torch.float32, torch.float64])) * draw.choice(
            [1, 9]
        )
        yield draw.randrange(8), op, getattr(torch, op, torch.relu)(values)


def _read(seed):
    reader, seen, deltas = Gathering(), [Seen() for _ in range(8)], [Deltas() for _ in range(8)]
    for i, op, values in _calls(seed):
        same = reader.output(seen[i], values, with_spread=True)
        reader.activation(seen[i], op, same, _OPS[op], unit_axis(values.shape, None))
        reader.delta(deltas[i], 0, values)
    reader.flush()
    return seen, deltas


def _numbers(seen, deltas):
    for point in seen:
        yield point.output_square, point.deviation_square, point.batched_square
        yield point.output_count, point.saturated, point.bounded_count, point.inputs
    for delta in deltas:
        yield delta.squares.get(0), delta.entries, delta.floor


@pytest.mark.parametrize("seed", range(10))
def test_together_they_have_the_numbers_that_each_has_alone(seed, monkeypatch):
    together = _read(seed)
    monkeypatch.setattr(gathering, "_SMALL", -1)
    alone = _read(seed)
    for found, expected in zip(_numbers(*together), _numbers(*alone), strict=True):
        assert [*found] == [None if x is None else pytest.approx(x, rel=1e-12, nan_ok=True) for x in expected]
    for found, expected in zip(together[0], alone[0], strict=True):
        assert (found.active is None) == (expected.active is None)
        assert found.active is None or torch.equal(found.active, expected.active)


def test_what_the_run_writes_to_later_was_read_before():
    reader, seen, deltas = Gathering(), Seen(), Deltas()
    values = torch.tensor([[3.0], [4.0]])
    reader.output(seen, values, with_spread=False)
    reader.delta(deltas, 0, values)
    values.zero_()
    reader.flush()
    assert (seen.output_square, deltas.squares) == (25.0, {0: 25.0})


def test_what_is_dropped_is_never_read():
    reader, seen = Gathering(), Seen()
    reader.output(seen, torch.ones(2, 2), with_spread=True)
    reader.drop()
    reader.flush()
    assert seen.output_square is None


def test_what_waits_is_read_before_it_becomes_too_much(monkeypatch):
    monkeypatch.setattr(gathering, "CHUNK", 8)
    reader, seen = Gathering(), [Seen() for _ in range(4)]
    for point in seen:
        reader.output(point, torch.ones(2, 3), with_spread=False)
    assert [point.output_square for point in seen] == [pytest.approx(6.0), pytest.approx(6.0), None, None]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_that_is_not_finite_spoils_no_other(value):
    reader, seen = Gathering(), [Seen(), Seen()]
    reader.output(seen[0], torch.tensor([[value], [1.0]]), with_spread=True)
    reader.output(seen[1], torch.tensor([[1.0], [1.0]]), with_spread=True)
    reader.flush()
    assert (seen[1].output_square, seen[1].deviation_square) == (2.0, 0.0)
    assert not torch.isfinite(torch.tensor(seen[0].output_square))
