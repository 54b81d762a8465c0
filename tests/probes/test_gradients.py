"""Statistics of parameter gradients against analytic values and a naive second implementation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.metrics import HISTOGRAM_BINS, MIN_EXPONENT
from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.transfer import Transfer

NAN, INF = float("nan"), float("inf")


def _measure(model, *groups, order=()):
    transfer, layers = Transfer(), LayerMap(model)
    probe = GradientProbe(layers, transfer)
    for parameters in groups or (model.parameters(),):
        probe.measure(parameters)
    host = transfer.fetch()
    return probe.collect(host), probe.histograms(host, order or layers.names)


def _one(gradient, weight=None):
    """The statistics of a model with a single parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros_like(gradient) if weight is None else weight)
    model.w.grad = gradient
    return _measure(model)[0]["(root)"]


def test_every_statistic_of_a_known_gradient_is_right():
    found = _one(torch.tensor([[3.0, -4.0, 0.0, 0.0]]), weight=torch.tensor([[1.0, 2.0, 2.0, 0.0]]))
    assert found == {
        "grad_norm": 5.0,
        "grad_rms": 2.5,
        "grad_mean_abs": 1.75,
        "grad_max_abs": 4.0,
        "grad_zero_fraction": 0.5,
        "grad_nonfinite_fraction": 0.0,
        "weight_norm": 3.0,
    }


def test_weight_and_bias_of_a_layer_are_taken_together():
    model = nn.Linear(7, 3)
    model(torch.randn(5, 7)).square().sum().backward()
    entries = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]).astype(np.float64)
    found = _measure(model)[0]["(root)"]
    assert found["grad_norm"] == pytest.approx(np.sqrt((entries**2).sum()), rel=1e-6)
    assert found["grad_rms"] == pytest.approx(np.sqrt((entries**2).mean()), rel=1e-6)
    assert found["grad_mean_abs"] == pytest.approx(np.abs(entries).mean(), rel=1e-6)
    assert found["grad_max_abs"] == pytest.approx(np.abs(entries).max(), rel=1e-6)


def test_a_layer_without_gradient_is_missing_and_not_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.grad = torch.ones(2, 2)
    assert list(_measure(model)[0]) == ["1"]


def test_without_any_gradient_nothing_is_found():
    assert _measure(nn.Linear(1, 1)) == ({}, {})


def test_parameters_of_a_stranger_are_left_out():
    mine, stranger = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    assert _measure(mine, [stranger])[0] == {}


def test_two_optimizers_are_read_beside_each_other():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.grad, model[1].weight.grad = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    found, _ = _measure(model, model[1].parameters(), model[0].parameters())
    assert {layer: values["grad_norm"] for layer, values in found.items()} == {"1": 3.0, "0": 2.0}


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e30])
def test_norms_of_extreme_gradients_neither_underflow_nor_overflow(size):
    found = _one(torch.full((100,), size))
    assert found["grad_norm"] == pytest.approx(10 * size, rel=1e-5)
    assert found["grad_zero_fraction"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_summed_wide(dtype):
    assert _one(torch.full((10_000,), 16.0, dtype=dtype))["grad_norm"] == 1600.0


def test_a_model_of_mixed_precision_is_measured():
    model = nn.Sequential(nn.Linear(2, 1, bias=False).bfloat16(), nn.Linear(2, 1, bias=False).double())
    model[0].weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    model[1].weight.grad = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    assert [values["grad_norm"] for values in _measure(model)[0].values()] == [5.0, 10.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_nonfinite_gradient_is_infinite_and_not_missing(bad):
    found = _one(torch.tensor([1.0, bad, 1.0, 1.0]))
    assert [found[name] for name in ("grad_norm", "grad_rms", "grad_mean_abs", "grad_max_abs")] == [INF] * 4
    assert found["grad_nonfinite_fraction"] == 0.25


def test_a_complex_gradient_counts_both_parts():
    found = _one(torch.tensor([3.0 + 4.0j, 0.0 + 0.0j]))
    assert found["grad_norm"] == 5.0
    assert found["grad_zero_fraction"] == 0.5


def test_a_gradient_that_is_a_conjugate_view_is_read():
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    (model.w.conj() * torch.tensor([3.0 + 0.0j, 0.0 + 4.0j])).abs().sum().backward()
    assert model.w.grad.is_conj()
    naive = math.sqrt(sum(abs(entry) ** 2 for entry in model.w.grad.tolist()))
    assert _measure(model)[0]["(root)"]["grad_norm"] == pytest.approx(naive)


def test_the_untouched_rows_of_a_sparse_gradient_are_zeros():
    model = nn.Embedding(10, 4, sparse=True)
    model(torch.tensor([2, 2, 7])).sum().backward()
    found = _measure(model)[0]["(root)"]
    assert found["grad_norm"] == pytest.approx(math.sqrt(4 * 2**2 + 4))
    assert found["grad_zero_fraction"] == 0.8
    assert found["grad_mean_abs"] == pytest.approx(12 / 40)


def test_a_sparse_gradient_without_entries_is_zero():
    model = nn.Embedding(10, 4, sparse=True)
    model(torch.empty(0, dtype=torch.int64)).sum().backward()
    found = _measure(model)[0]["(root)"]
    assert (found["grad_norm"], found["grad_zero_fraction"]) == (0.0, 1.0)


def test_a_parameter_without_entries_is_left_out():
    model = nn.Module()
    model.w = nn.Parameter(torch.empty(0))
    model.w.grad = torch.empty(0)
    assert _measure(model)[0] == {}


def test_histograms_count_by_binary_exponent():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(8))
    model.w.grad = torch.tensor([1.0, 1.5, -2.0, 0.25, 0.0, NAN, INF, 1.999])
    counts = _measure(model)[1]["grad_hist_late"]
    at = {0: 3, 1: 1, -2: 1}
    expected = np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
    for exponent, count in at.items():
        expected[exponent - MIN_EXPONENT] = count
    expected[HISTOGRAM_BINS], expected[HISTOGRAM_BINS + 1] = 1, 2
    np.testing.assert_array_equal(counts, expected)


def test_what_lies_outside_the_bins_is_counted_in_the_end_bins():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model.w.grad = torch.tensor([1e-300, 1e-25, 1e30], dtype=torch.float64)
    counts = _measure(model)[1]["grad_hist_early"]
    assert (counts[0], counts[HISTOGRAM_BINS - 1], counts.sum()) == (2, 1, 3)


def test_a_large_tensor_is_sampled_evenly():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1_000_000))
    model.w.grad = torch.where(torch.arange(1_000_000) % 4 == 0, 0.0, 1.0)[torch.randperm(1_000_000)]
    counts = _measure(model)[1]["grad_hist_late"]
    assert 2048 < counts.sum() <= 4096
    assert counts[HISTOGRAM_BINS] / counts.sum() == pytest.approx(0.25, abs=0.04)


def test_early_and_late_are_thirds_in_the_given_order():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(6)))
    for exponent, layer in enumerate(model):
        layer.weight.grad = torch.full((1, 1), 2.0**exponent)
    _, found = _measure(model, order=["5", "4", "3", "2", "1", "0"])
    exponents = {name: (np.flatnonzero(counts) + MIN_EXPONENT).tolist() for name, counts in found.items()}
    assert exponents == {"grad_hist_early": [4, 5], "grad_hist_late": [0, 1]}


def test_reading_leaves_the_gradients_as_they_were():
    model = nn.Linear(3, 3)
    model(torch.randn(4, 3)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    _measure(model)
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_the_entries_of_a_histogram_come_from_all_columns():
    weight = nn.Parameter(torch.ones(4096, 64))
    weight.grad = torch.ones(4096, 64)
    weight.grad[:, 0] = 0  # an input that is always zero: 1.6 % of the entries
    layer = nn.Module()
    layer.weight = weight
    transfer = Transfer()
    probe = GradientProbe(LayerMap(layer), transfer)
    probe.measure([weight])
    counts = probe.histograms(transfer.fetch(), ["(root)"])["grad_hist_early"]
    assert counts[HISTOGRAM_BINS] / counts.sum() == pytest.approx(1 / 64, abs=0.002)
