"""Clipping against torch's own, and the limit from a history."""

import math

import pytest
import torch
from torch import nn

from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.clip import clip, limit_from


def _history(*norms):
    history = History()
    for step, norm in enumerate(norms):
        history.append(Row(step, scalars={"grad_norm_total": norm}))
    return history


def _parameters(*gradients):
    parameters = []
    for gradient in gradients:
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def test_the_joint_norm_is_brought_to_the_limit():
    weights = _parameters(torch.tensor([30.0]), torch.tensor([40.0]))
    clip(weights, 5.0)
    assert [weight.grad.item() for weight in weights] == pytest.approx([3.0, 4.0])


def test_it_scales_as_torch_does():
    torch.manual_seed(0)
    gradients = [torch.randn(3, 3) * 50, torch.randn(7)]
    mine, theirs = _parameters(*(g.clone() for g in gradients)), _parameters(*(g.clone() for g in gradients))
    clip(mine, 2.0)
    nn.utils.clip_grad_norm_(theirs, 2.0)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-6) for a, b in zip(mine, theirs, strict=True))


def test_a_gradient_below_the_limit_is_not_touched():
    (weight,) = _parameters(torch.tensor([0.3, 0.4]))
    clip([weight], 0.6)
    assert torch.equal(weight.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nonfinite_gradient_is_left_as_it_is(bad):
    weights = _parameters(torch.tensor([1e9]), torch.tensor([bad]))
    clip(weights, 1.0)
    assert weights[0].grad.item() == 1e9


def test_it_is_done_in_place():
    (weight,) = _parameters(torch.tensor([10.0]))
    before = weight.grad
    clip([weight], 1.0)
    assert weight.grad is before


def test_parameters_without_a_gradient_are_passed_over():
    weight = nn.Parameter(torch.ones(1))
    clip([weight], 1.0)
    assert weight.grad is None


def test_the_limit_is_the_median_of_the_finite_norms():
    assert limit_from(_history(1.0, 2.0, math.inf, 3.0, 4.0, 1e12)) == 3.0


def test_a_single_explosion_moves_the_limit_less_than_to_the_next_norm():
    assert limit_from(_history(*[1.0, 1.1, 1.2, 1.3, 1.4], 1e30)) < 1.3


@pytest.mark.parametrize("norms", [(), (7.0,) * 4, (0.0,) * 9, (math.inf,) * 9])
def test_without_a_history_the_limit_is_one(norms):
    assert limit_from(_history(*norms)) == 1.0


def test_five_norms_are_a_history():
    assert limit_from(_history(*(7.0,) * 5)) == 7.0
