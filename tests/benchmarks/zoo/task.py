"""The LightningModule that most cases share: a network, a loss, an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .data import digits_val

ADAM = partial(torch.optim.Adam, lr=1e-3)
Optimize = Callable[[Any], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


class Task(L.LightningModule):
    """Train ``net`` on batches ``(x, y)``.

    Args:
        net: The network; its modules appear below ``net.``.
        optimize: Parameters to optimizer.
        loss: Takes output and target.
        schedule: Optimizer to a schedule that moves with every step.
        scale: Constant factor on the loss.
        log: Also log the loss as ``train_loss``; without it the loss is only returned, as many users do.
        only_trainable: Hand the optimizer only what requires a gradient, rather than all parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        optimize: Optimize = ADAM,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        schedule: Schedule | None = None,
        scale: float = 1.0,
        log: bool = False,
        only_trainable: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimize = optimize
        self.loss = loss
        self.schedule = schedule
        self.scale = scale
        self.log_loss = log
        self.only_trainable = only_trainable

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        output: Tensor = self.net(x)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the batch, multiplied by the constant factor."""
        loss = self.loss(self(batch[0]), batch[1]) * self.scale
        if self.log_loss:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule where there is one."""
        parameters = [p for p in self.parameters() if p.requires_grad or not self.only_trainable]
        optimizer = self.optimize(parameters)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


class ValidatedTask(Task):
    """A task with a validation step; Lightning warns about one that finds no validation data."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of the batch."""
        self.log("val_loss", self.loss(self(batch[0]), batch[1]) * self.scale)


class WeakHeadTask(Task):
    """A task whose auxiliary loss has a small weight, as regularisers have."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the main loss and a millionth of the auxiliary one."""
        auxiliary, main = self.net(batch[0])
        loss: Tensor = self.loss(main, batch[1]) + 1e-6 * self.loss(auxiliary, batch[1])
        return loss


class ThawingTask(Task):
    """A task whose first layer is frozen until ``thaw_at`` optimizer steps have been made."""

    def __init__(self, net: nn.Sequential, *, thaw_at: int) -> None:
        super().__init__(net)
        self.thaw_at = thaw_at
        net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the first layer train once the time has come."""
        if self.global_step >= self.thaw_at:
            self.net.requires_grad_(True)


def sequence_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of every position, for logits (B, T, C) and targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error against pixels rescaled from [-1, 1] to [0, 1]."""
    return F.mse_loss(output, (target + 1) / 2)


@torch.no_grad()
def error_rate(module: L.LightningModule) -> float:
    """Share of the held-out digits that the module gets wrong: for a loss that does not tell."""
    module.eval()
    right = torch.cat([module(x).argmax(1) == y for x, y in digits_val(0)])
    module.train()
    return 1 - float(right.float().mean())
