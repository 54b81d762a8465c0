"""Faults that strike in the middle of a training, values that stop being numbers, trunks cut off from the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fault import IMAGES, SGD, fault
from .faulty_data import in_order, one_nan, pixels
from .stacks import he, mlp
from .task import ADAM, Task
from .vision import pooled_convnet

STRIKE = 60


class StruckTask(Task):
    """A task to which ``strike`` happens once, after ``at`` optimizer steps."""

    def __init__(self, net: nn.Module, strike: Callable[[Task], None], *, at: int = STRIKE, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.strike = strike
        self.at = at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Strike when the time has come."""
        if self.global_step == self.at:
            with torch.no_grad():
                self.strike(self)


class TurningTask(Task):
    """A task whose inputs come in another unit after ``at`` optimizer steps."""

    def __init__(self, net: nn.Module, *, at: int = STRIKE, factor: float = 1e4, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.at = at
        self.factor = factor

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Train on the batch as it comes."""
        x, y = batch
        return super().training_step((x * self.factor if self.global_step >= self.at else x, y), batch_idx)


class NormPenaltyTask(Task):
    """A task with the Euclidean norm of every parameter as penalty, whose slope at zero is 0 / 0 when spelled out."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return loss and penalty."""
        return super().training_step(batch, batch_idx) + 1e-4 * sum(p.square().sum().sqrt() for p in self.parameters())


class Standardise(nn.Module):
    """Standardise each pixel over the batch, with nothing added to a deviation that may be zero."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the deviation of the batch."""
        return (x - x.mean(0)) / (x.std(0) + self.eps)


class Mixing(nn.Module):
    """A linear layer without a bias as people write it themselves, the initialisation forgotten or not."""

    def __init__(self, width: int, *, is_forgotten: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * (2 / width) ** 0.5)
        if is_forgotten:  # memory as it is: mostly zeros, and what was once a pointer is no number
            self.weight.data.zero_()
            self.weight.data.view(-1)[::97] = torch.nan

    def forward(self, x: Tensor) -> Tensor:
        """Mix the features."""
        return x @ self.weight.T


class Detached(nn.Module):
    """A trunk and a head between which the gradient is cut."""

    def __init__(self, trunk: nn.Module, head: nn.Module, cut: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk, self.head, self.cut = trunk, head, cut

    def forward(self, x: Tensor) -> Tensor:
        """Classify from the trunk's features."""
        output: Tensor = self.head(self.cut(self.trunk, x))
        return output


def _keep(trunk: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = trunk(x)
    return features


def _detach(trunk: nn.Module, x: Tensor) -> Tensor:
    return _keep(trunk, x).detach()


@torch.no_grad()
def _no_grad(trunk: nn.Module, x: Tensor) -> Tensor:
    return _keep(trunk, x)


def _round(trunk: nn.Module, x: Tensor) -> Tensor:
    return _keep(trunk, x).sign()


def _log_of_relu(output: Tensor, target: Tensor) -> Tensor:
    scores = output.relu()
    return F.nll_loss((scores / scores.sum(1, keepdim=True)).log(), target)


def _log_of_softmax(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss((output * 100).softmax(1).log(), target)


def _stable(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def _relu(depth: int = 3) -> nn.Module:
    return he(mlp(depth, nn.ReLU))


def _mixing(*, is_forgotten: bool) -> nn.Module:
    return he(nn.Sequential(*mlp(2, nn.ReLU)[:-1], Mixing(64, is_forgotten=is_forgotten), nn.ReLU(), nn.Linear(64, 10)))


def _narrow(cut: Callable[[nn.Module, Tensor], Tensor], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return Detached(mlp(4, activation, width=32, outputs=6), nn.Linear(6, 10), cut)


def _faster(task: Task) -> None:
    for group in task.trainer.optimizers[0].param_groups:
        group["lr"] *= 1000


def _zeroed(task: Task) -> None:
    layer: Any = task.net.get_submodule("2")
    layer.weight.zero_()
    layer.bias.fill_(-1.0)


def _nan(task: Task) -> None:
    layer: Any = task.net.get_submodule("2")
    layer.weight[0, 0] = torch.nan


def _blown(task: Task) -> None:
    for module in task.net.modules():
        if isinstance(module, nn.Linear):
            module.weight *= 100


def _struck(strike: Callable[[Task], None], **kwargs: Any) -> Callable[[nn.Module], Task]:
    return lambda net: StruckTask(net, strike, **kwargs)


LARGE = "nonfinite_gradient exploding_gradient loss_plateau dead_units update_ratio"
_late = partial(fault, family="late_onset", twin_task=Task, onset=STRIKE, max_steps=160, sick=_relu, twin=_relu)
_late_sgd = partial(_late, family="late_onset_sgd", twin_task=partial(Task, optimize=SGD))
_not_a_number = partial(fault, family="not_a_number", kinds="nonfinite_gradient")
_divided = partial(_not_a_number, family="divided_by_zero")
_detached = partial(
    fault, family="detached", kinds="no_gradient", causes="detached", twin=lambda: _narrow(_keep), max_steps=250
)

CASES = [
    _late("lr_spike_adam", task=_struck(_faster), kinds=LARGE, causes="learning_rate_too_large"),
    _late(
        "layer_zeroed",
        task=_struck(_zeroed),
        kinds="dead_units vanishing_gradient",
        causes="unknown dead_units",
        layers=("net.2", "net.3"),
    ),
    _late(
        "inputs_turn_unscaled",
        task=TurningTask,
        kinds="exploding_gradient nonfinite_gradient dead_units",
        causes="unscaled_inputs",
        layers=("net.0", "net.1"),
    ),
    _late_sgd("lr_spike_sgd", task=_struck(_faster, optimize=SGD), kinds=LARGE, causes="learning_rate_too_large"),
    _late_sgd(
        "weights_blown_up",
        task=_struck(_blown, optimize=SGD),
        kinds="exploding_gradient nonfinite_gradient",
        causes="weight_scale forward",
    ),
    _late_sgd(
        "weight_turns_nan",
        task=_struck(_nan, optimize=SGD),
        kinds="nonfinite_gradient",
        causes="optimizer_step forward",
        layers=("net.2",),
    ),
    _not_a_number(
        "one_nan_pixel",
        sick=_relu,
        twin=_relu,
        data=one_nan,
        twin_data=in_order,
        onset=30,
        causes="forward",
        layers=("net.0",),
    ),
    _not_a_number(
        "weight_never_initialised",
        sick=partial(_mixing, is_forgotten=True),
        twin=partial(_mixing, is_forgotten=False),
        causes="initialisation",
        layers=("net.4",),
    ),
    _not_a_number(
        "log_of_relu", sick=_relu, twin=_relu, task=partial(Task, loss=_log_of_relu), twin_task=Task, causes="loss"
    ),
    _not_a_number(
        "log_of_softmax",
        sick=_relu,
        twin=_relu,
        task=partial(Task, loss=_log_of_softmax),
        twin_task=Task,
        causes="loss",
    ),
    _divided("sqrt_at_zero", sick=_relu, twin=_relu, task=NormPenaltyTask, twin_task=Task, causes="backward loss"),
    _divided(
        "standardised_constant_pixel",
        sick=lambda: nn.Sequential(Standardise(0.0), _relu()),
        twin=lambda: nn.Sequential(Standardise(0.1), _relu()),
        causes="forward",
        layers=("net.0", "net.1.0"),
    ),
    _divided(
        "adam_eps_0",
        sick=_relu,
        twin=_relu,
        data=partial(pixels, factor=0.5, offset=0.5),
        task=partial(Task, optimize=partial(ADAM, eps=0.0)),
        twin_task=Task,
        causes="optimizer_step",
        layers=("net.0",),
    ),
    _detached("detached_trunk", sick=lambda: _narrow(_detach), layers=("net.trunk.0",)),
    _detached("trunk_under_no_grad", sick=lambda: _narrow(_no_grad), task=partial(Task, optimize=SGD)),
    _detached("trunk_rounded", sick=lambda: _narrow(_round)),
    _detached(
        "detached_conv_trunk",
        sick=lambda: Detached(nn.Sequential(*pooled_convnet()[:-1], nn.Linear(128, 4)), nn.Linear(4, 10), _detach),
        twin=lambda: Detached(nn.Sequential(*pooled_convnet()[:-1], nn.Linear(128, 4)), nn.Linear(4, 10), _keep),
        data=IMAGES,
        task=partial(Task, optimize=partial(ADAM, lr=3e-3)),
    ),
]
