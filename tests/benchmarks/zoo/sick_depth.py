"""Fully connected stacks whose gradient is lost on the way down."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from .data import digits, digits_val
from .fault import SGD, fault
from .stacks import FunctionalSigmoid, ReversedSigmoid, he, mlp, normal, orthogonal, residual_mlp
from .task import ADAM, Task, ValidatedTask

SUM = partial(F.cross_entropy, reduction="sum")
SATURATION = {"kinds": "vanishing_gradient", "causes": "saturation", "layers": ("net.0",)}
DEPTH = {"kinds": "vanishing_gradient", "causes": "depth weight_scale", "layers": ("net.0",)}
WEIGHT_SCALE = {"kinds": "vanishing_gradient", "causes": "weight_scale", "layers": ("net.0",)}


def _relu(depth: int) -> nn.Module:
    return he(mlp(depth, nn.ReLU))


def _residual(depth: int) -> nn.Module:
    return residual_mlp(depth, gamma=0.1)


_sigmoid = partial(fault, family="deep_sigmoid", data=digits, **SATURATION)
_section = partial(fault, family="sigmoid_section", **{**SATURATION, "layers": ("net.0.0", "net.2.0")})
_tanh = partial(fault, family="deep_tanh")
_relus = partial(fault, family="deep_relu")


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())


def _sectioned(depth: int, inner: type[nn.Module], *, norm: bool = True) -> nn.Module:
    """Layers that train well above and below a section of ``depth`` plain ones."""
    section = mlp(depth, inner, outputs=64)
    if inner is nn.ReLU:
        he(section)
    bridge = nn.BatchNorm1d(64) if norm else nn.Identity()
    return nn.Sequential(_normed(), _normed(), section, bridge, nn.ReLU(), _normed(), nn.Linear(64, 10))


CASES = [
    _sigmoid(
        "sigmoid_10",
        sick=lambda: mlp(10, nn.Sigmoid),
        twin=lambda: _relu(10),
        task=partial(ValidatedTask, log=True),
        val=digits_val,
    ),
    _sigmoid("sigmoid_30", sick=lambda: mlp(30, nn.Sigmoid), twin=lambda: _residual(15)),
    _sigmoid("sigmoid_50", sick=lambda: mlp(50, nn.Sigmoid), twin=lambda: _residual(25), task=partial(Task, log=True)),
    _sigmoid(
        "sigmoid_functional",
        sick=lambda: FunctionalSigmoid(10),
        twin=lambda: _relu(10),
        task=partial(Task, optimize=SGD),
        layers=("net.hidden.0",),
    ),
    _sigmoid("sigmoid_reversed", sick=lambda: ReversedSigmoid(10), twin=lambda: _relu(10), layers=("net.fc0",)),
    _sigmoid(
        "sigmoid_10_loss_1e-6",
        sick=lambda: mlp(10, nn.Sigmoid),
        twin=lambda: _relu(10),
        # Adam's default eps of 1e-8 would be a second fault beside gradients as small as these.
        task=partial(Task, optimize=partial(ADAM, eps=1e-16), scale=1e-6, log=True),
    ),
    _sigmoid(
        "sigmoid_10_loss_1e6_sum",
        sick=lambda: mlp(10, nn.Sigmoid),
        twin=lambda: _relu(10),
        task=partial(Task, loss=SUM, scale=1e6),
    ),
    _section("sigmoid_section", sick=lambda: _sectioned(14, nn.Sigmoid), twin=lambda: _sectioned(14, nn.ReLU)),
    _section(
        "sigmoid_section_bare",
        sick=lambda: _sectioned(8, nn.Sigmoid, norm=False),
        twin=lambda: _sectioned(8, nn.ReLU, norm=False),
        task=partial(Task, optimize=SGD, loss=SUM, scale=1e-2),
    ),
    _tanh(
        "tanh_20_small_init",
        sick=lambda: normal(mlp(20, nn.Tanh), 0.01),
        twin=lambda: orthogonal(mlp(20, nn.Tanh)),
        task=partial(Task, optimize=SGD),
        data=digits,
        **WEIGHT_SCALE,
    ),
    _tanh(
        "tanh_30_default_init",
        sick=lambda: mlp(30, nn.Tanh),
        twin=lambda: orthogonal(mlp(30, nn.Tanh)),
        **DEPTH,
    ),
    _tanh(
        "softsign_30_default_init",
        sick=lambda: mlp(30, nn.Softsign),
        twin=lambda: _residual(10),
        task=partial(Task, scale=1e4, loss=SUM),
        **DEPTH,
    ),
    _relus("relu_24_default_init", sick=lambda: mlp(24, nn.ReLU), twin=lambda: _relu(24), data=digits, **DEPTH),
    _relus(
        "gelu_20_default_init",
        sick=lambda: mlp(20, nn.GELU),
        twin=lambda: _residual(10),
        task=partial(Task, scale=1e-7, optimize=partial(ADAM, eps=1e-18)),
        **DEPTH,
    ),
    _relus("elu_30_default_init", sick=lambda: mlp(30, nn.ELU, width=32), twin=lambda: _residual(10), **DEPTH),
    _relus(
        "relu_12_small_init",
        sick=lambda: normal(mlp(12, nn.ReLU), 0.02),
        twin=lambda: _relu(12),
        **WEIGHT_SCALE,
    ),
]
