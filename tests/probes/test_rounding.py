"""What of a step the number format of the weights takes."""

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.rounding import Rounding
from lightning_gradflow.probes.transfer import Transfer
from tests.probes.gradient_values import by_layer


def step(model, optimizer):
    """What the probe finds in one step, by layer."""
    transfer = Transfer()
    probe = GradientProbe(LayerMap(model), transfer)
    probe.measure(0, [p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    probe.after_step(0)
    probe.finish()
    return by_layer(probe.collect(transfer.fetch()))


def single(weight, gradient):
    model = nn.Module()
    model.w = nn.Parameter(weight)
    model.w.grad = gradient
    return model


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_step_counts_as_lost_below_half_of_the_spacing_and_not_above(dtype, bits):
    half = 2.0**-bits  # of the spacing above 1
    for size, lost in ((0.99 * half, 1.0), (1.01 * half, 0.0)):
        model = single(torch.ones(4, dtype=dtype), -torch.ones(4, dtype=dtype))
        found = step(model, torch.optim.SGD(model.parameters(), lr=size))
        assert found["(root)"]["unchanged_fraction"] == lost


def test_entries_count_by_their_gradient_and_those_without_one_not_at_all():
    model = single(torch.ones(4, dtype=torch.bfloat16), torch.tensor([-4.0, -1.0, -1.0, 0.0], dtype=torch.bfloat16))
    found = step(model, torch.optim.SGD(model.parameters(), lr=2e-3))  # 0.008 is more than 2**-8, 0.002 is less
    assert found["(root)"]["unchanged_fraction"] == pytest.approx(2 / 6)


def test_weights_in_single_precision_are_not_looked_at():
    model = single(torch.ones(4), torch.ones(4))
    assert "unchanged_fraction" not in step(model, torch.optim.SGD(model.parameters(), lr=1e-12))["(root)"]


def test_a_selection_of_a_large_tensor_stands_for_all_of_it():
    torch.manual_seed(0)
    before, gradient = torch.randn(300, 200).bfloat16(), torch.randn(300, 200).bfloat16()
    now = (before.float() - 1e-3 * gradient.float()).bfloat16()
    naive = (gradient.float().abs() * (before == now)).sum() / gradient.float().abs().sum()
    lost, of = Rounding([before]).measure([now], [gradient])
    assert float(lost / of) == pytest.approx(float(naive), abs=0.03)
    assert float(of) == pytest.approx(float(gradient.float().abs().sum()), rel=0.05)


def test_a_layer_is_its_weight_and_its_bias_by_their_sizes():
    model = nn.Linear(100, 100, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = step(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    assert found["(root)"]["unchanged_fraction"] == pytest.approx(100 / 101)


def test_what_is_not_finite_or_sparse_tells_nothing():
    model = single(torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    assert "unchanged_fraction" not in step(model, torch.optim.SGD(model.parameters(), lr=1e-5))["(root)"]
    model = nn.Embedding(5, 3, sparse=True, dtype=torch.bfloat16)
    model(torch.tensor([1])).sum().backward()
    assert "unchanged_fraction" not in step(model, torch.optim.SGD(model.parameters(), lr=1e-5))["(root)"]
