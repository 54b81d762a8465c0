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
from tests.probes.gradient_values import by_layer

NAN, INF = float("nan"), float("inf")


def _measure(model, *groups, order=(), multiplier=1.0):
    transfer, layers = Transfer(), LayerMap(model)
    probe = GradientProbe(layers, transfer)
    for optimizer, parameters in enumerate(groups or (model.parameters(),)):
        probe.measure(optimizer, parameters, multiplier)
    probe.finish()
    found = probe.collect(transfer.fetch())
    return by_layer(found), found.histograms(order or layers.names)


def _with_gradient(gradient, weight=None):
    """A model with a single parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros_like(gradient) if weight is None else weight)
    model.w.grad = gradient
    return model


def _one(gradient, weight=None, **kwargs):
    """The statistics of a model with a single parameter."""
    return _measure(_with_gradient(gradient, weight), **kwargs)[0]["(root)"]


class Step:
    """A step of each optimizer, with a probe on it."""

    def __init__(self, model, *optimizers, before=lambda: None, multiplier=1.0, gradients_changed=False):
        transfer = Transfer()
        self.probe = GradientProbe(LayerMap(model), transfer)
        for i, optimizer in enumerate(optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.probe.measure(i, parameters, multiplier)
            before()
            optimizer.step()
            self.probe.after_step(i, gradients_changed=gradients_changed)
        self.probe.finish()
        self.columns = self.probe.collect(transfer.fetch())

    def found(self, layer="(root)", **kwargs):
        return by_layer(self.columns, **kwargs)[layer]

    def clip_factor(self, factor=1.0):
        return self.columns.clip_factor(factor)


def _descent(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_every_statistic_of_a_known_gradient_is_right():
    found = _one(torch.tensor([[3.0, -4.0, 0.0, 0.0]]), weight=torch.tensor([[1.0, 2.0, 2.0, 0.0]]))
    assert found == {
        "grad_norm": 5.0,
        "grad_rms": 2.5,
        "grad_mean_abs": 1.75,
        "grad_max_abs": 4.0,
        "grad_zero_fraction": 0.5,
        "grad_nonfinite_fraction": 0.0,
        "grad_missing_fraction": 0.0,
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
    found = _measure(model)[0]
    assert found["0"] == {"grad_missing_fraction": 1.0}
    assert found["1"]["grad_norm"] == 2.0
    assert found["1"]["grad_missing_fraction"] == pytest.approx(2 / 6)  # its bias


def test_without_any_gradient_all_of_it_is_missing():
    assert _measure(nn.Linear(1, 1)) == ({"(root)": {"grad_missing_fraction": 1.0}}, {})


def test_a_frozen_parameter_is_not_missing_a_gradient():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones(2, 2)
    found = _measure(model)[0]
    assert list(found) == ["1"]
    assert found["1"]["grad_missing_fraction"] == 0.0


def test_a_gradient_that_one_of_two_optimizers_misses_counts_once():
    model = nn.Linear(3, 1)
    assert _measure(model, model.parameters(), model.parameters())[0] == {"(root)": {"grad_missing_fraction": 1.0}}


def test_a_complex_entry_without_gradient_counts_both_parts():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1, dtype=torch.complex64))
    model.a.grad = torch.ones(2)
    assert _measure(model)[0]["(root)"]["grad_missing_fraction"] == 0.5


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
    counts = _measure(layer)[1]["grad_hist_early"]
    assert counts[HISTOGRAM_BINS] / counts.sum() == pytest.approx(1 / 64, abs=0.002)


# -- what turns the gradients as they are into those of the mean loss


@pytest.mark.parametrize("multiplier", [4.0, torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64)])
def test_a_multiplier_scales_norms_and_leaves_shares(multiplier):
    found = _one(torch.tensor([3.0, -4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 2.0, 0.0]), multiplier=multiplier)
    assert found == {
        "grad_norm": 20.0,
        "grad_rms": 10.0,
        "grad_mean_abs": 7.0,
        "grad_max_abs": 16.0,
        "grad_zero_fraction": 0.5,
        "grad_nonfinite_fraction": 0.0,
        "grad_missing_fraction": 0.0,
        "weight_norm": 3.0,
    }


@pytest.mark.parametrize("multiplier", [0.25, torch.tensor(0.25)])
def test_a_multiplier_shifts_the_histogram(multiplier):
    gradient = torch.tensor([1.0, 4.0, 0.0, INF])
    plain = _measure(_with_gradient(gradient))[1]["grad_hist_late"]
    scaled = _measure(_with_gradient(gradient), multiplier=multiplier)[1]["grad_hist_late"]
    np.testing.assert_array_equal(scaled[: HISTOGRAM_BINS - 2], plain[2:HISTOGRAM_BINS])
    np.testing.assert_array_equal(scaled[HISTOGRAM_BINS:], plain[HISTOGRAM_BINS:])


def test_a_scaled_gradient_in_half_precision_is_unscaled_without_underflow():
    found = _one(
        torch.full((4,), 2.0**-10, dtype=torch.float16), multiplier=torch.tensor(2.0**-40, dtype=torch.float64)
    )
    assert (found["grad_norm"], found["grad_zero_fraction"]) == (2.0**-49, 0.0)


def test_a_multiplier_does_not_touch_the_update():
    model = _with_gradient(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert Step(model, _descent(model), multiplier=7.0).found()["update_norm"] == 0.5


# -- what the step changed


def test_the_update_is_what_the_step_changed():
    model = _with_gradient(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    found = Step(model, _descent(model)).found()
    assert (found["update_norm"], found["update_ratio"]) == (0.5, 0.1)


def test_the_weight_norm_is_that_before_the_step():
    model = _with_gradient(torch.tensor([6.0, 8.0]), torch.tensor([3.0, 4.0]))
    assert Step(model, _descent(model)).found()["weight_norm"] == 5.0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_update_of_any_optimizer_is_that_of_a_naive_difference(optimizer):
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    model(torch.randn(3, 7)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    found = Step(model, optimizer(model.parameters(), lr=0.1, weight_decay=0.3)).found()
    change = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    norm = torch.cat([b.flatten() for b in before]).norm().item()
    assert found["update_norm"] == pytest.approx(change.norm().item(), rel=1e-6)
    assert found["update_ratio"] == pytest.approx(change.norm().item() / norm, rel=1e-6)


def test_a_layer_whose_weights_are_zero_has_an_update_and_no_ratio():
    model = _with_gradient(torch.tensor([3.0, 4.0]))
    found = Step(model, _descent(model, lr=1.0)).found()
    assert found["update_norm"] == 5.0
    assert "update_ratio" not in found


def test_without_a_step_there_is_no_update():
    assert "update_norm" not in _one(torch.ones(2))


def test_a_step_that_changes_nothing_has_an_update_of_zero():
    model = _with_gradient(torch.ones(2), torch.ones(2))
    found = Step(model, _descent(model, lr=0.0)).found()
    assert (found["update_norm"], found["update_ratio"]) == (0.0, 0.0)


def test_an_update_that_rounds_away_in_half_precision_is_zero():
    model = _with_gradient(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert Step(model, _descent(model, lr=1e-4)).found()["update_norm"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_update_in_other_precisions_is_measured(dtype):
    model = _with_gradient(torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([8.0, 6.0], dtype=dtype))
    found = Step(model, _descent(model, lr=1.0)).found()
    assert (found["update_norm"], found["update_ratio"]) == (5.0, 0.5)


def test_an_update_of_complex_weights_counts_both_parts():
    model = _with_gradient(torch.tensor([3.0 + 4.0j]), torch.tensor([6.0 + 8.0j]))
    found = Step(model, _descent(model, lr=1.0)).found()
    assert (found["update_norm"], found["update_ratio"]) == (5.0, 0.5)


def test_an_update_by_a_sparse_gradient_is_measured():
    model = nn.Embedding(10, 4, sparse=True)
    model(torch.tensor([2, 2, 7])).sum().backward()
    assert Step(model, _descent(model, lr=1.0)).found()["update_norm"] == pytest.approx(math.sqrt(4 * 2**2 + 4))


@pytest.mark.parametrize("entries", [65_537, 1_000_000])
def test_the_update_of_a_large_tensor_is_exact(entries):
    torch.manual_seed(0)
    model = _with_gradient(torch.randn(entries), torch.zeros(entries))
    true = model.w.grad.double().norm().item()
    assert Step(model, _descent(model, lr=1.0)).found()["update_norm"] == pytest.approx(true, rel=1e-6)


def test_an_update_in_one_row_of_a_large_embedding_is_exact():
    gradient = torch.zeros(100_000, 2)
    gradient[77_777] = torch.tensor([3.0, 4.0])
    model = _with_gradient(gradient)
    assert Step(model, _descent(model, lr=1.0)).found()["update_norm"] == 5.0


def test_after_the_step_no_copy_of_the_weights_is_held():
    model = _with_gradient(torch.ones(2), torch.ones(2))
    step = Step(model, _descent(model))
    assert all(group.before is None for group in step.probe._groups)


def test_each_optimizer_has_its_own_update():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.grad, model[1].weight.grad = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
    step = Step(model, _descent(model[0], lr=1.0), _descent(model[1], lr=2.0))
    assert [step.found(layer)["update_norm"] for layer in ("0", "1")] == [2.0, 6.0]


def test_an_optimizer_that_did_not_step_has_no_update():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    transfer = Transfer()
    probe = GradientProbe(LayerMap(model), transfer)
    for i, layer in enumerate(model):
        layer.weight.grad = torch.ones(1, 1)
        probe.measure(i, layer.parameters())
    probe.after_step(1)
    probe.finish()
    found = by_layer(probe.collect(transfer.fetch()))
    assert ["update_norm" in found[layer] for layer in ("0", "1")] == [False, True]


def test_an_update_that_is_no_number_is_infinite_and_not_missing():
    model = _with_gradient(torch.tensor([1.0, NAN]), torch.ones(2))
    found = Step(model, _descent(model)).found()
    assert (found["update_norm"], found["update_ratio"]) == (INF, INF)


def test_a_step_that_a_gradient_scaler_skips_has_no_update():
    model = _with_gradient(torch.tensor([1.0, INF]), torch.ones(2))
    found = Step(model, _descent(model, lr=0.0)).found(scaled=True)
    assert not {"update_norm", "update_ratio"} & set(found)


def test_a_step_that_a_gradient_scaler_lets_through_has_an_update():
    model = _with_gradient(torch.tensor([3.0, 4.0]), torch.ones(2))
    assert Step(model, _descent(model, lr=1.0)).found(scaled=True)["update_norm"] == 5.0


def test_a_gradient_scaler_skips_one_optimizer_and_not_the_other():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for layer, bad in zip(model, (INF, 1.0), strict=True):
        layer.weight.grad, layer.bias.grad = torch.full((1, 1), bad), torch.ones(1)
    step = Step(model, _descent(model[0], lr=0.0), _descent(model[1], lr=0.0))
    assert ["update_norm" in step.found(layer, scaled=True) for layer in ("0", "1")] == [False, True]


# -- what clipping left


def _clipped(limit, gradient=(3.0, 4.0), **kwargs):
    model = _with_gradient(torch.tensor(gradient), torch.ones(len(gradient)))
    return Step(model, _descent(model), before=lambda: nn.utils.clip_grad_norm_(model.parameters(), limit), **kwargs)


def test_the_clip_factor_is_the_norm_after_clipping_over_that_before():
    assert _clipped(1.0).clip_factor() == pytest.approx(0.2, rel=1e-5)


def test_what_was_not_clipped_has_a_factor_of_one():
    assert _clipped(100.0).clip_factor() == 1.0


def test_clipping_by_value_is_seen():
    model = _with_gradient(torch.tensor([3.0, 4.0]), torch.ones(2))
    step = Step(model, _descent(model), before=lambda: nn.utils.clip_grad_value_(model.parameters(), 3.0))
    assert step.clip_factor() == pytest.approx(math.sqrt(18) / 5)


def test_the_norm_is_that_before_clipping():
    assert _clipped(1.0).found()["grad_norm"] == 5.0


def test_the_update_is_that_of_the_clipped_gradient():
    assert _clipped(1.0).found()["update_norm"] == pytest.approx(0.5, rel=1e-5)


def test_the_clip_factor_is_the_same_whatever_the_norm_before_is_multiplied_by():
    assert _clipped(1.0, multiplier=3.0).clip_factor(3.0) == pytest.approx(0.2, rel=1e-5)


def test_the_clip_factor_is_that_over_all_optimizers():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].weight.grad, model[1].weight.grad = torch.full((1, 1), 3.0), torch.full((1, 1), 4.0)
    step = Step(model, _descent(model[0]), _descent(model[1]), before=lambda: model[0].weight.grad.zero_())
    assert step.clip_factor() == pytest.approx(0.8)


@pytest.mark.parametrize("gradient", [(3.0, NAN), (3.0, INF), (0.0, 0.0)])
def test_of_a_gradient_without_a_finite_norm_above_zero_the_clip_factor_is_not_known(gradient):
    assert math.isnan(_clipped(1.0, gradient).clip_factor())


def test_after_further_backward_passes_in_the_step_the_clip_factor_is_not_known():
    assert math.isnan(_clipped(1.0, gradients_changed=True).clip_factor())


def test_further_backward_passes_in_the_step_leave_the_update_known():
    assert "update_norm" in _clipped(1.0, gradients_changed=True).found()


def test_of_gradients_that_the_step_took_away_the_clip_factor_is_not_known():
    model = _with_gradient(torch.tensor([3.0, 4.0]), torch.ones(2))
    optimizer = _descent(model)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    assert math.isnan(Step(model, optimizer).clip_factor())


def test_without_any_gradient_the_clip_factor_is_not_known():
    model = nn.Linear(1, 1)
    assert math.isnan(Step(model, _descent(model)).clip_factor())
