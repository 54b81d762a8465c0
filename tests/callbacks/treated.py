"""A mitigator that hears of trouble when a test says so, and a tiny network that it treats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_gradflow import AutoMitigator
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Says:
    """A detector that says the same at every sample from one step to another."""

    kind: FindingKind = FindingKind.VANISHING_GRADIENT
    cause: str = "saturation"
    start: int = 4
    end: int = 5

    def judge(self, history: History) -> list[Finding]:
        """The finding, if it is time."""
        step = history.rows[-1].step
        layers = ("net.0", "net.2")
        found = [Finding(self.kind, Severity.WARNING, step, layers, self.cause)]
        return found if self.start <= step < self.end else []


SICK = Says()
STAYS_SICK = Says(end=10**9)
TOO_FAST = Says(FindingKind.UPDATE_RATIO, "learning_rate_too_large")
EXPLODES = Says(FindingKind.EXPLODING_GRADIENT, "unknown")


class Doctor(AutoMitigator):
    """Applies remedies; what there is to find is made up.

    Args:
        *found: detectors.
        **kwargs: for `AutoMitigator`.
    """

    def __init__(self, *found: Any, **kwargs: Any) -> None:
        super().__init__(**{"mode": "apply", "every_n_steps": 4, **kwargs})
        self._found = found

    def detectors(self, alone: bool) -> list[Detector]:
        """What was given."""
        return list(self._found)


class Net(L.LightningModule):
    """Dropout, running statistics, a log and a counter: all that a second call of the training step could disturb.

    Args:
        lr: the rate.
        optimizer: makes the optimizer.
        schedule: makes a scheduler of it.
    """

    seen: Sequence[Tensor] = ()
    """The first batch value of every call of a training step, of copies too; set by `watch_calls`."""

    def __init__(
        self,
        lr: float = 0.05,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        schedule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1))
            self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.lr, self.optimizer, self.schedule = lr, optimizer, schedule
        self.calls = 0

    def loss(self, batch: Pair) -> Tensor:
        """Squared error of a batch."""
        return (self.net(self.dropout(self.norm(batch[0]))) - batch[1]).square().mean()

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The loss, logged and counted."""
        self.calls += 1
        if isinstance(type(self).seen, list):
            type(self).seen.append(batch[0].detach().clone())
        loss = self.loss(batch)
        self.log("calls", float(self.calls))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer, with its schedule."""
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }


class Steady(Net):
    """Does not learn at this rate, so that no remedy helps."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"lr": 1e-12, **kwargs})
        self.dropout = nn.Dropout(0.0)


class Each(L.Callback):
    """Notes something at the end of every batch.

    Args:
        note: what, of the module.
    """

    def __init__(self, note: Callable[[L.LightningModule], Any]) -> None:
        self.note = note
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes it."""
        self.kept.append(self.note(pl_module))


def weights(module: nn.Module) -> Tensor:
    """All weights, in a row."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def buffers(module: nn.Module) -> Tensor:
    """All buffers, in a row."""
    return torch.cat([b.detach().flatten().double() for b in module.buffers()])
