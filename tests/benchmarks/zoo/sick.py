"""Trainings whose gradient vanishes: each stays at the class prior while its twin learns in the same steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, seeded
from .data import digits, digits_val
from .stacks import FunctionalSigmoid, ReversedSigmoid, he, mlp, normal, orthogonal, residual_mlp
from .task import ADAM, Task, ValidatedTask

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
SUM = partial(F.cross_entropy, reduction="sum")


def _case(
    name: str,
    sick: Callable[[], nn.Module],
    twin: Callable[[], nn.Module],
    task: Callable[[nn.Module], L.LightningModule] = Task,
    *,
    max_steps: int = 120,
    with_val: bool = False,
) -> Case:
    return Case(
        name,
        build=seeded(lambda: task(sick())),
        twin=seeded(lambda: task(twin())),
        data=digits,
        max_steps=max_steps,
        val=digits_val if with_val else None,
    )


def _relu(depth: int) -> nn.Module:
    return he(mlp(depth, nn.ReLU))


_CASES = [
    _case(
        "sigmoid_10", lambda: mlp(10, nn.Sigmoid), lambda: _relu(10), partial(ValidatedTask, log=True), with_val=True
    ),
    _case("sigmoid_30", lambda: mlp(30, nn.Sigmoid), lambda: residual_mlp(15, gamma=0.1)),
    _case("sigmoid_50", lambda: mlp(50, nn.Sigmoid), lambda: residual_mlp(25, gamma=0.1), partial(Task, log=True)),
    _case(
        "tanh_20_small_init",
        lambda: normal(mlp(20, nn.Tanh), 0.01),
        lambda: orthogonal(mlp(20, nn.Tanh)),
        partial(Task, optimize=SGD),
    ),
    _case("relu_24_default_init", lambda: mlp(24, nn.ReLU), lambda: _relu(24)),
    _case("sigmoid_functional", lambda: FunctionalSigmoid(10), lambda: _relu(10), partial(Task, optimize=SGD)),
    _case("sigmoid_reversed", lambda: ReversedSigmoid(10), lambda: _relu(10)),
    _case(
        "sigmoid_10_loss_1e-6",
        lambda: mlp(10, nn.Sigmoid),
        lambda: _relu(10),
        # Adam's default eps of 1e-8 would be a second fault beside gradients as small as these.
        partial(Task, optimize=partial(ADAM, eps=1e-16), scale=1e-6, log=True),
    ),
    _case(
        "sigmoid_10_loss_1e6_sum", lambda: mlp(10, nn.Sigmoid), lambda: _relu(10), partial(Task, loss=SUM, scale=1e6)
    ),
]

SICK: dict[str, Case] = {case.name: case for case in _CASES}
