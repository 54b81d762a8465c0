"""Fully connected networks that learn: deep, sparse, pruned, binary, with weights or inputs of any size."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import OneCycleLR

from .case import Case, seeded
from .data import breast_cancer, digits
from .stacks import mlp, orthogonal, residual_mlp
from .task import ADAM, Task
from .vision import RowTransformer

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
FASTER = partial(ADAM, lr=3e-3)
FASTEST = partial(ADAM, lr=1e-2)
IMAGES = partial(digits, image=True)
ONE_CYCLE = partial(OneCycleLR, max_lr=1e-2, total_steps=100)


def _selu(depth: int) -> nn.Sequential:
    """Self-normalising: LeCun's initialisation keeps mean 0 and variance 1 (Klambauer et al. 2017)."""
    net = mlp(depth, nn.SELU)
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        nn.init.zeros_(layer.bias)
    return net


def _large_before_norm() -> nn.Sequential:
    """Weights thirty times too large, each before a LayerNorm that takes the size away again."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()]
        with torch.no_grad():
            layers[-3].get_parameter("weight").mul_(30)
    return nn.Sequential(*layers, nn.Linear(64, 10))


def _normed_weights() -> nn.Sequential:
    net = mlp(6, nn.ReLU)
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
        weight_norm(layer)
    return net


def _sparse(depth: int) -> nn.Sequential:
    """Each unit is active on a fifth of every batch and on other samples than the next: mostly zeros, none dead."""
    net = mlp(depth, nn.ReLU, width=128, norm=True)
    for norm in net[1::3]:
        # A fifth of a standard normal lies above 0.84.
        nn.init.constant_(norm.bias, -0.84)
    return net


class BinaryLinear(nn.Linear):
    """Uses the sign of its weight and passes the gradient straight through (Courbariaux et al. 2015)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + (self.weight.sign() * self.in_features**-0.5 - self.weight).detach()
        return F.linear(x, weight, self.bias)


def _binary() -> nn.Sequential:
    hidden: list[nn.Module] = []
    for _ in range(3):
        hidden += [BinaryLinear(64, 64), nn.BatchNorm1d(64), nn.Hardtanh()]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def _pruned() -> nn.Sequential:
    """Nine weights in ten are masked, and so is their gradient."""
    net = mlp(3, nn.ReLU, width=128)
    for layer in net[:-1:2]:
        nn.init.kaiming_normal_(layer.weight)
        prune.random_unstructured(layer, "weight", amount=0.9)
        with torch.no_grad():
            layer.weight_orig *= 10**0.5
    return net


def _normalised_inside() -> nn.Sequential:
    """Features from 1e-3 to 1e3 that a BatchNorm standardises before the first sigmoid sees them."""
    return nn.Sequential(nn.BatchNorm1d(30), mlp(2, nn.Sigmoid, inputs=30, outputs=2, width=32))


CASES = [
    Case("selu_12", seeded(lambda: Task(_selu(12), partial(SGD, lr=0.01))), digits, 120, family="well_initialised"),
    Case(
        "tanh_16_orthogonal",
        seeded(lambda: Task(orthogonal(mlp(16, nn.Tanh)), partial(SGD, lr=0.01))),
        digits,
        120,
        family="well_initialised",
    ),
    Case("sigmoid_5", seeded(lambda: Task(mlp(5, nn.Sigmoid), FASTEST)), digits, 300, family="moderate_depth"),
    Case("softsign_8", seeded(lambda: Task(mlp(8, nn.Softsign))), digits, 150, family="moderate_depth"),
    Case("pre_ln_mlp_24", seeded(lambda: Task(residual_mlp(24, gamma=1.0))), digits, 80, family="pre_ln"),
    Case(
        "pre_ln_transformer_10", seeded(lambda: Task(RowTransformer(10, 16, 0.0), FASTER)), digits, 80, family="pre_ln"
    ),
    Case(
        "large_weights_before_norm",
        seeded(lambda: Task(_large_before_norm(), FASTER)),
        digits,
        120,
        family="scale_invariant",
    ),
    Case("weight_norm", seeded(lambda: Task(_normed_weights())), digits, 120, family="scale_invariant"),
    Case("relu_80_percent_zeros", seeded(lambda: Task(_sparse(3))), digits, 120, family="sparse_relu"),
    Case("binary_weights", seeded(lambda: Task(_binary())), digits, 120, family="quantised"),
    Case("pruned_90_percent", seeded(lambda: Task(_pruned())), digits, 120, family="pruned"),
    Case("dropout_half", seeded(lambda: Task(mlp(3, nn.ReLU, width=128, dropout=0.5))), digits, 150, family="dropout"),
    Case(
        "unscaled_inputs_normalised_inside",
        seeded(lambda: Task(_normalised_inside(), FASTEST)),
        partial(breast_cancer, scaled=False),
        120,
        family="inputs",
    ),
    Case("pixels_0_to_16", seeded(lambda: Task(mlp(3, nn.ReLU))), partial(digits, raw=True), 120, family="inputs"),
]
