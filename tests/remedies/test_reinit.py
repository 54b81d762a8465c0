"""Weights drawn anew: what they are, and what stays as it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradflow.history import Point
from lightning_gradflow.remedies.reinit import activations_around, reinitialise


def _draw(module, before="", after="", seed=0):
    return reinitialise(module, before, after, torch.Generator().manual_seed(seed))


def test_activations_are_those_next_to_a_layer_in_order_of_execution():
    points = [
        Point("s0", "s0", "sigmoid"),
        Point("a", "a"),
        Point("a/relu", "a", "relu"),
        Point("a/tanh", "a", "tanh"),
        Point("b", "b"),
        Point("c", "c"),
    ]
    assert activations_around(points) == {"a": ("sigmoid", "relu"), "b": ("tanh", ""), "c": ("", "")}


@pytest.mark.parametrize("after", ["relu", "gelu", "leaky_relu"])
def test_before_a_rectifier_it_is_he_normal(after):
    layer = nn.Linear(400, 300)
    _draw(layer, after=after)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert not layer.bias.any()


def test_before_anything_else_it_is_glorot_normal():
    layer = nn.Linear(400, 300)
    _draw(layer)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 700), rel=0.02)


def test_before_tanh_it_is_orthogonal():
    layer = nn.Linear(16, 16)
    _draw(layer, "tanh", "tanh")
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(16), atol=1e-5, rtol=0)


def test_a_stack_of_sigmoids_is_a_stack_of_orthogonal_tanh_layers():
    """sigmoid(x) = (1 + tanh(x / 2)) / 2: what the docstring claims, computed by the tanh stack itself."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(6)]
    for i, layer in enumerate(layers):
        _draw(layer, "sigmoid" if i else "", "sigmoid", seed=i)
    x = torch.randn(5, 8)
    sigmoids, tanhs = x, x
    for i, layer in enumerate(layers):
        sigmoids = torch.sigmoid(layer(sigmoids))
        orthogonal = layer.weight / (4 if i else 2)
        torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(8), atol=1e-5, rtol=0)
        tanhs = torch.tanh(tanhs @ orthogonal.T)
    torch.testing.assert_close(2 * sigmoids - 1, tanhs, atol=1e-5, rtol=0)


def test_fifty_sigmoid_layers_pass_the_gradient_on():
    layers = [nn.Linear(32, 32) for _ in range(50)]
    for i, layer in enumerate(layers):
        _draw(layer, "sigmoid" if i else "", "sigmoid", seed=i)
    torch.manual_seed(0)
    x = torch.randn(16, 32, requires_grad=True)
    y = x
    for layer in layers:
        y = torch.sigmoid(layer(y))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.norm() > 1e-4


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 3), lambda i, o: nn.Conv1d(i, o, 3)])
def test_linear_layers_and_convolutions_are_drawn(make):
    layer = make(4, 4)
    before = layer.weight.detach().clone()
    assert _draw(layer, after="relu") == [layer.weight, layer.bias]
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("module", [nn.LSTM(2, 2), nn.Embedding(2, 2), nn.BatchNorm1d(2), nn.ReLU()])
def test_any_other_module_is_left_as_it_is(module):
    before = [p.detach().clone() for p in module.parameters()]
    assert _draw(module, after="relu") == []
    assert all(map(torch.equal, before, module.parameters()))


def test_a_frozen_weight_is_left_as_it_is():
    layer = nn.Linear(2, 2).requires_grad_(False)
    before = layer.weight.clone()
    assert _draw(layer, after="relu") == []
    assert torch.equal(layer.weight, before)


def test_a_frozen_bias_is_left_as_it_is():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False).fill_(7.0)
    assert _draw(layer, after="relu") == [layer.weight]
    assert layer.bias.tolist() == [7.0, 7.0]


def test_a_parametrized_layer_is_not_said_to_be_drawn():
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    assert _draw(layer, after="relu") == []


def test_the_same_seed_gives_the_same_weights():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    _draw(one, after="tanh", seed=3)
    _draw(other, after="tanh", seed=3)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("after", ["relu", "tanh", "sigmoid", ""])
def test_the_global_generator_is_not_touched(after):
    layer = nn.Linear(3, 3)
    before = torch.get_rng_state()
    _draw(layer, after=after)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pending_gradient_is_dropped():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    _draw(layer, after="relu")
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_the_weights_stay_the_same_parameters_in_their_own_precision():
    layer = nn.Linear(2, 2).bfloat16()
    weight = layer.weight
    _draw(layer, after="tanh")
    assert layer.weight is weight
    assert weight.dtype == torch.bfloat16
