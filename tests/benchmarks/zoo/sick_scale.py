"""Weights, biases and inputs of the wrong size: explosions, saturation, dead units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .fault import IMAGES, SGD, fault
from .faulty_data import pixels, table
from .sick_conv import vgg
from .stacks import he, mlp, normal, orthogonal
from .task import ADAM, Task


@torch.no_grad()
def _changed(net: nn.Module, layer: str, *, weight: float = 1.0, bias: float | None = None) -> nn.Module:
    """Multiply the weight of one layer, or set its bias."""
    module: Any = net.get_submodule(layer)
    module.weight *= weight
    if bias is not None:
        module.bias.fill_(bias)
    return net


@torch.no_grad()
def _biased(net: nn.Module, bias: float) -> nn.Module:
    """Set the bias of every layer but the last."""
    for module in list(net.children())[:-1]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias.fill_(bias)  # type: ignore[union-attr]
    return net


def _relu(depth: int) -> nn.Module:
    return he(mlp(depth, nn.ReLU))


def _table(classes: int, inputs: int, activation: Callable[[], nn.Module], depth: int = 3) -> Callable[[], nn.Module]:
    return lambda: mlp(depth, activation, inputs=inputs, outputs=classes, width=32)


SGD_TASK = partial(Task, optimize=SGD)
_large = partial(fault, family="exploding_init", causes="weight_scale", twin=lambda: _relu(8))
_one = partial(fault, family="one_bad_layer", causes="weight_scale", task=SGD_TASK)
_saturated = partial(fault, family="saturated_weights", causes="weight_scale", layers=("net.0", "net.1"))
_dead = partial(fault, family="dead_biases", kinds="dead_units", causes="initialisation")
_unscaled = partial(fault, family="unscaled_inputs", causes="unscaled_inputs", layers=("net.0", "net.1"))
_column = partial(fault, family="unscaled_column", causes="unscaled_inputs", layers=("net.0", "net.1"))

SATURATED = "saturated_activation"
BLOWN_INPUTS = "exploding_gradient nonfinite_gradient dead_units"

CASES = [
    _large("relu_8_std_0.5_sgd", sick=lambda: normal(mlp(8, nn.ReLU), 0.5), kinds="exploding_gradient", task=SGD_TASK),
    _large("relu_8_std_1_adam", sick=lambda: normal(mlp(8, nn.ReLU), 1.0), kinds="exploding_gradient"),
    _large(
        "vgg_large_init",
        sick=lambda: normal(vgg(9, nn.ReLU), 1.0),
        twin=lambda: vgg(9, nn.ReLU, norm=True),
        kinds="exploding_gradient",
        data=IMAGES,
    ),
    _large(
        "elu_16_large_init",
        sick=lambda: normal(mlp(16, nn.ELU), 0.35),
        twin=lambda: orthogonal(mlp(16, nn.ELU)),
        kinds="exploding_gradient",
    ),
    _one(
        "one_layer_times_300",
        sick=lambda: _changed(_relu(5), "4", weight=300.0),
        twin=lambda: _relu(5),
        kinds="exploding_gradient",
        layers=("net.0", "net.2", "net.4"),
    ),
    _one(
        "two_layers_times_1e-4",
        sick=lambda: _changed(_changed(_relu(5), "4", weight=1e-4), "6", weight=1e-4),
        twin=lambda: _relu(5),
        kinds="vanishing_gradient",
        layers=("net.0", "net.2", "net.4", "net.6"),
    ),
    _saturated(
        "tanh_3_std_3",
        sick=lambda: normal(mlp(3, nn.Tanh), 3.0),
        twin=lambda: orthogonal(mlp(3, nn.Tanh)),
        kinds="saturated_activation exploding_gradient",
    ),
    _saturated(
        "tanh_6_std_2_sgd",
        sick=lambda: normal(mlp(6, nn.Tanh), 2.0),
        twin=lambda: orthogonal(mlp(6, nn.Tanh)),
        task=SGD_TASK,
        kinds="saturated_activation exploding_gradient",
    ),
    _saturated(
        "sigmoid_2_bias_30",
        sick=lambda: _biased(mlp(2, nn.Sigmoid), 30.0),
        twin=lambda: mlp(2, nn.Sigmoid),
        kinds="saturated_activation vanishing_gradient",
        causes="weight_scale saturation",
        task=partial(Task, optimize=partial(ADAM, lr=3e-3)),
        max_steps=250,
    ),
    _dead("dead_biases_all", sick=lambda: _biased(_relu(4), -30.0), twin=lambda: _relu(4), layers=("net.0", "net.1")),
    _dead(
        "dead_biases_one_layer",
        sick=lambda: _changed(_relu(5), "4", bias=-30.0),
        twin=lambda: _relu(5),
        layers=("net.4", "net.5"),
    ),
    _dead(
        "dead_biases_conv",
        sick=lambda: _changed(vgg(4, nn.ReLU), "2", bias=-8.0),
        twin=lambda: vgg(4, nn.ReLU),
        data=IMAGES,
        layers=("net.2", "net.3"),
        task=partial(Task, optimize=partial(ADAM, lr=3e-3)),
        max_steps=200,
    ),
    _dead(
        "dead_biases_most_units",
        sick=lambda: _biased(he(mlp(6, nn.ReLU)), -6.0),
        twin=lambda: _relu(6),
        task=SGD_TASK,
        layers=("net.0", "net.1", "net.2", "net.3"),
    ),
    _unscaled(
        "tanh_breast_cancer_raw",
        sick=_table(2, 30, nn.Tanh),
        twin=_table(2, 30, nn.Tanh),
        data=partial(table, name="breast_cancer", scaled=False),
        twin_data=partial(table, name="breast_cancer"),
        task=SGD_TASK,
        kinds=SATURATED,
        max_steps=200,
    ),
    _unscaled(
        "sigmoid_wine_raw",
        sick=_table(3, 13, nn.Sigmoid, 2),
        twin=_table(3, 13, nn.Sigmoid, 2),
        data=partial(table, name="wine", scaled=False),
        twin_data=partial(table, name="wine"),
        kinds=SATURATED,
        task=partial(Task, optimize=partial(ADAM, lr=3e-3)),
        max_steps=200,
    ),
    _unscaled(
        "relu_breast_cancer_raw_sgd",
        sick=_table(2, 30, nn.ReLU),
        twin=_table(2, 30, nn.ReLU),
        data=partial(table, name="breast_cancer", scaled=False),
        twin_data=partial(table, name="breast_cancer"),
        task=SGD_TASK,
        kinds=BLOWN_INPUTS,
    ),
    _unscaled(
        "tanh_pixels_0_to_256_sgd",
        sick=lambda: mlp(3, nn.Tanh),
        twin=lambda: mlp(3, nn.Tanh),
        data=partial(pixels, factor=128.0, offset=128.0),
        twin_data=pixels,
        task=SGD_TASK,
        kinds=SATURATED,
        max_steps=200,
    ),
    _unscaled(
        "relu_pixels_0_to_256_sgd",
        sick=lambda: _relu(6),
        twin=lambda: _relu(6),
        data=partial(pixels, factor=128.0, offset=128.0),
        twin_data=pixels,
        task=SGD_TASK,
        kinds=BLOWN_INPUTS,
    ),
    _column(
        "relu_wine_one_column_sgd",
        sick=_table(3, 13, nn.ReLU),
        twin=_table(3, 13, nn.ReLU),
        data=partial(table, name="wine", column=5, factor=1e4),
        twin_data=partial(table, name="wine"),
        task=SGD_TASK,
        kinds=BLOWN_INPUTS,
    ),
    _column(
        "tanh_breast_cancer_one_column",
        sick=_table(2, 30, nn.Tanh),
        twin=_table(2, 30, nn.Tanh),
        data=partial(table, name="breast_cancer", column=11, factor=1e4),
        twin_data=partial(table, name="breast_cancer"),
        kinds=SATURATED,
    ),
]
