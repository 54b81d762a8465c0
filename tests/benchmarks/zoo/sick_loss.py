"""Faults between the network and its loss: targets in a unit of their own, and losses of the wrong thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .data import diabetes, digit_images, digits, loader
from .fault import fault
from .stacks import he, mlp
from .task import ADAM, Task, error_rate

Error = Callable[[Tensor, Tensor], Tensor]


def ink(seed: int, *, mean: float = 0.0, deviation: float = 1.0) -> DataLoader[Any]:
    """Digits and how much ink each is drawn with, curved a little, in the unit that is asked for."""
    pixels = digit_images()
    amount = (pixels + 1).square().sum(1, keepdim=True)
    return loader(pixels, mean + deviation * (amount - amount.mean()) / amount.std(), seed=seed, batch_size=32)


def brightened(seed: int, *, factor: float = 1.0) -> DataLoader[Any]:
    """Digits as images, and the same with their light turned round, in steps of the sensor."""
    images = digit_images().view(-1, 1, 8, 8)
    return loader(images, factor * (1 - images), seed=seed, batch_size=32)


@torch.no_grad()
def unexplained(module: L.LightningModule, *, data: Callable[[int], DataLoader[Any]]) -> float:
    """Share of the targets' variance that is left, whatever their unit."""
    module.eval()
    pairs = [(module(x), y) for x, y in data(0)]
    module.train()
    outputs, targets = (torch.cat([pair[i] for pair in pairs]).flatten() for i in range(2))
    return float((outputs - targets).square().mean() / targets.var())


class UnitTask(Task):
    """A task whose outputs are asked for in the unit of the raw targets, whatever it is trained on."""

    def __init__(self, net: nn.Module, *args: Any, mean: float = 0.0, deviation: float = 1.0, **kwargs: Any) -> None:
        super().__init__(net, *args, **kwargs)
        self.mean, self.deviation = mean, deviation

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Train in the unit of the task."""
        return self.loss(self.net(batch[0]), (batch[1] - self.mean) / self.deviation) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Predict in the unit of the raw targets."""
        output: Tensor = self.mean + self.deviation * self.net(x)
        return output


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))


def _regression() -> nn.Module:
    return mlp(2, nn.ReLU, outputs=1)


def _with(net: nn.Module, last: nn.Module) -> nn.Module:
    return nn.Sequential(net, last)


def _to_rows(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.squeeze(1), target.squeeze(1))


def _by_hand(output: Tensor, target: Tensor) -> Tensor:
    return (output - target.squeeze(1)).square().mean()


def _targets(
    name: str,
    data: Callable[..., DataLoader[Any]],
    net: Callable[[], nn.Module],
    mean: float,
    deviation: float,
    layer: str,
    *,
    optimize: Any = ADAM,
    error: Error = F.mse_loss,
    **kwargs: Any,
) -> Any:
    return fault(
        name,
        family="unscaled_targets",
        sick=net,
        twin=net,
        kinds="loss_mismatch",
        causes="unscaled_targets",
        layers=(layer,),
        data=data,
        task=partial(Task, optimize=optimize, loss=error),
        twin_task=partial(UnitTask, optimize=optimize, loss=error, mean=mean, deviation=deviation),
        score=partial(unexplained, data=data),
        **kwargs,
    )


_loss = partial(fault, family="wrong_loss", kinds="loss_mismatch")

CASES = [
    _targets("targets_ink_adam", partial(ink, mean=2e4, deviation=5e3), _regression, 2e4, 5e3, "net.4", max_steps=200),
    _targets(
        "targets_ink_sgd",
        partial(ink, mean=2e4, deviation=5e3),
        _regression,
        2e4,
        5e3,
        "net.4",
        optimize=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        max_steps=200,
    ),
    _targets(
        "targets_years_l1_adam",
        partial(ink, mean=2000.0, deviation=12.0),
        _regression,
        2000.0,
        12.0,
        "net.4",
        error=F.l1_loss,
        max_steps=200,
    ),
    _targets(
        "targets_sensor_images_adamw",
        partial(brightened, factor=2000.0),
        _conv,
        1000.0,
        1500.0,
        "net.2",
        optimize=partial(torch.optim.AdamW, lr=3e-3),
        max_steps=200,
    ),
    _loss(
        "softmax_twice_sgd",
        sick=lambda: _with(he(mlp(3, nn.ReLU)), nn.Softmax(1)),
        twin=lambda: he(mlp(3, nn.ReLU)),
        causes="softmax_twice",
        task=partial(Task, optimize=partial(torch.optim.SGD, lr=0.02)),
        data=digits,
        score=error_rate,
        max_steps=100,
    ),
    _loss(
        "targets_broadcast",
        sick=lambda: mlp(2, nn.ReLU, inputs=10, outputs=1),
        twin=lambda: mlp(2, nn.ReLU, inputs=10, outputs=1),
        causes="broadcast",
        task=partial(Task, optimize=partial(ADAM, lr=3e-3), loss=_by_hand),
        twin_task=partial(Task, optimize=partial(ADAM, lr=3e-3), loss=_to_rows),
        data=diabetes,
        score=partial(unexplained, data=diabetes),
        max_steps=300,
    ),
]
