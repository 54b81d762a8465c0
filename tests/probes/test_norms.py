"""Norms, largest entries and counts, against the same in double precision."""

import math

import pytest
import torch

from lightning_gradflow.probes import reading, spread
from lightning_gradflow.probes.kept import Kept
from lightning_gradflow.probes.norms import norms, sizes
from lightning_gradflow.probes.reading import square_sum
from lightning_gradflow.probes.spread import coprime_stride, spread_between_samples

SHAPES = [(1,), (), (4095,), (32768,), (40_001,), (256, 512), (3, 5, 64, 65)]
SCALES = [1e-44, 1e-36, 1e-30, 1e-12, 1.0, 1e12, 1e30]


def _normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _exact(tensor):
    return float(tensor.double().square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_sum_of_squares_is_exact_at_any_scale_and_size(shape, scale):
    tensor = _normal(shape) * scale
    assert float(square_sum(tensor)) == pytest.approx(_exact(tensor), rel=2e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (300, 300)])
def test_all_dtypes_are_summed_in_double_precision_or_nearly_so(dtype, shape):
    tensor = _normal(shape, dtype)
    assert square_sum(tensor).dtype == torch.float64
    assert float(square_sum(tensor)) == pytest.approx(_exact(tensor), rel=2e-6)


def test_one_large_entry_among_tiny_ones_is_not_lost():
    tensor = torch.full((100_000,), 1e-30)
    tensor[77_777] = 1e-20
    assert float(square_sum(tensor)) == pytest.approx(1e-40, rel=1e-6)


def test_entries_whose_squares_are_too_large_for_single_precision_are_summed():
    tensor = torch.ones(100_000)
    tensor[5] = 1e25
    assert float(square_sum(tensor)) == pytest.approx(1e50, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [10, 100_000])
def test_what_is_not_finite_stays_so(bad, size):
    tensor = torch.ones(size)
    tensor[size // 2] = bad
    assert not math.isfinite(float(square_sum(tensor)))
    assert not math.isfinite(float(norms([tensor])[0]))
    found = sizes([tensor])
    assert not any(math.isfinite(float(found[name][0])) for name in ("norm", "sum", "max"))
    assert (found["nonfinite"].tolist(), found["nonzero"].tolist()) == ([1], [size])


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(0, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(9, -1, -1, -1),
        lambda x: x.flip(1),
    ],
    ids=["transposed", "channels last", "every other", "expanded", "flipped"],
)
def test_the_way_a_tensor_lies_in_memory_makes_no_difference(lay):
    tensor = lay(_normal((8, 16, 32, 33)))
    assert float(square_sum(tensor)) == pytest.approx(_exact(tensor), rel=2e-6)
    assert float(sizes([tensor])["sum"][0]) == pytest.approx(float(tensor.double().abs().sum()), rel=1e-6)
    deviation, square = spread_between_samples(tensor)
    assert 0 < float(deviation) <= float(square) * (1 + 1e-9) or float(deviation) == pytest.approx(0, abs=1e-6)


def _mixed():
    large = [_normal((200, 300)), torch.zeros(50_000), _normal((70_000,), torch.bfloat16), _normal((300_000,)) * 1e-30]
    small = [torch.tensor([-3.0]), _normal((64, 33)) * 1e-30, _normal((5, 5), torch.float64).T, torch.zeros(3)]
    half = _normal((7,), torch.float16)
    return [
        large[0],
        *small,
        large[1],
        half,
        large[2],
        half[::2],
        large[3],
        *[_normal((90,), seed=i) for i in range(9)],
    ]


def _naive(tensor):
    """The same, entry by entry in double precision."""
    wide = tensor.double().flatten()
    return {
        "norm": math.sqrt(float(wide.square().sum())),
        "max": float(wide.abs().max()),
        "nonfinite": float((~torch.isfinite(wide)).sum()),
        "sum": float(wide.abs().sum()),
        "nonzero": float((wide != 0).sum()),
    }


@pytest.mark.parametrize("chunk", [50, 1000, reading.CHUNK])
def test_sizes_of_many_tensors_are_those_of_each(monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    found = sizes(_mixed())
    for name in found:
        assert found[name].dtype == torch.float64
        assert found[name].tolist() == pytest.approx([_naive(t)[name] for t in _mixed()], rel=1e-6, abs=0)
    assert torch.equal(found["norm"], norms(_mixed()))


def test_only_what_is_wanted_is_read():
    everything, some = sizes(_mixed()), sizes(_mixed(), all_statistics=False)
    assert set(everything) - set(some) == {"max", "sum", "nonzero"}
    assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_among_many_tensors_only_those_with_a_bad_entry_are_not_finite(bad):
    tensors = _mixed()
    for i in (1, 2, 5):
        tensors[i] = tensors[i].clone()
        tensors[i].view(-1)[-1] = bad
    found = sizes(tensors)
    is_bad = [i in (1, 2, 5) for i in range(len(tensors))]
    assert (found["nonfinite"] == 1).tolist() == is_bad
    for name in ("norm", "sum", "max"):
        assert (~torch.isfinite(found[name])).tolist() == is_bad


def test_a_sum_that_is_too_large_for_single_precision_is_made_in_double():
    assert float(sizes([torch.full((100_000,), 1e38)])["sum"][0]) == pytest.approx(1e43, rel=1e-6)


@pytest.mark.parametrize("size", [2, 40_000])
def test_the_largest_magnitude_may_be_a_negative_entry_and_is_never_a_negative_zero(size):
    down = torch.full((size,), -3.0)
    down[1] = 2.0
    found = sizes([down, torch.full((size,), -0.0)])["max"]
    assert found.tolist() == [3.0, 0.0]
    assert not torch.signbit(found).any()


def test_a_tensor_without_entries_has_no_length():
    assert norms([torch.zeros(0), torch.ones(4)]).tolist() == [0.0, 2.0]
    assert norms([]).tolist() == []


@pytest.mark.parametrize("chunk", [50, reading.CHUNK])
def test_a_change_is_measured_from_what_was_kept(monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    before = [*_mixed(), torch.zeros(0)]
    now = [tensor.clone() for tensor in before]
    kept = Kept(now)
    assert torch.equal(kept.norms(), norms(now))
    for i, tensor in enumerate(now):
        tensor += (i % 3) * 0.25
    expected = [math.sqrt(_exact(a.double() - b.double())) for a, b in zip(now, before, strict=True)]
    assert kept.norms_of_change(now).tolist() == pytest.approx(expected, rel=1e-2)
    assert [x == 0 for x in expected] == [i % 3 == 0 or not t.numel() for i, t in enumerate(before)]


def test_of_nothing_nothing_is_kept():
    assert Kept([]).norms_of_change([]).tolist() == []


def test_the_spread_of_few_entries_is_exact():
    tensor = _normal((16, 5, 7)) + 3
    deviation, square = spread_between_samples(tensor)
    wide = tensor.double()
    assert float(deviation) == pytest.approx(float((wide - wide.mean(0)).square().sum()), rel=1e-12)
    assert float(square) == pytest.approx(float(wide.square().sum()), rel=1e-12)


@pytest.mark.parametrize(
    "shape", [(32, 16, 32, 32), (16, 64, 1024), (2048, 512), (70_000, 64), (2, 1_000_003), (1000, 17)]
)
@pytest.mark.parametrize("spread", [1e-3, 0.1, 10.0])
def test_the_spread_of_a_large_tensor_is_known_to_a_few_percent_of_what_it_reads(shape, spread):
    tensor = 1 + spread * _normal(shape)
    deviation, square = spread_between_samples(tensor)
    wide = tensor.double()
    exact = float(((wide - wide.mean(0)).square().sum() / wide.square().sum()).sqrt())
    assert math.sqrt(float(deviation / square)) == pytest.approx(exact, rel=0.05)


def test_samples_that_are_all_the_same_have_no_spread():
    tensor = _normal((1, 100, 999)).expand(31, -1, -1)
    deviation, square = spread_between_samples(tensor)
    assert float(deviation) <= 1e-24 * float(square)


def test_of_a_large_tensor_a_selection_is_read():
    deviation, square = spread_between_samples(torch.ones(64, 100_000))
    assert float(deviation) == 0
    assert spread._SELECTED / 2 <= float(square) <= 2 * spread._SELECTED


@pytest.mark.parametrize("number", [1, 2, 12, 97, 4096, 65_536, 999_983])
@pytest.mark.parametrize("most", [1, 16, 4096])
def test_a_stride_reads_as_many_as_it_may_and_all_residues(number, most):
    stride = coprime_stride(number, most)
    assert math.gcd(stride, number) == 1 or number == 1
    assert len(range(0, number, stride)) <= most or stride == 1
