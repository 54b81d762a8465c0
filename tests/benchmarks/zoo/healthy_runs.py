"""Ordinary networks that learn in unusual runs: schedules, precision, optimizers, batches, the size of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR

from .adapters import pretrained
from .case import Case, seeded
from .data import breast_cancer, diabetes, digits, noisy_digits, wine
from .stacks import mlp
from .task import ADAM, Task, error_rate
from .vision import pooled_convnet

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
FASTER = partial(ADAM, lr=3e-3)
SUM = partial(F.cross_entropy, reduction="sum")


class EpochWarmUp(Task):
    """The learning rate rises from epoch to epoch, and is exactly 0 for all of the first."""

    def configure_optimizers(self) -> Any:
        optimizer = self.optimize(self.parameters())
        return [optimizer], [LambdaLR(optimizer, lambda epoch: min(epoch / 3, 1.0))]


class Discriminative(Task):
    """Each layer's learning rate is a third of that of the layer above it (Howard and Ruder 2018)."""

    def configure_optimizers(self) -> Any:
        layers = [layer for layer in cast("nn.Sequential", self.net) if isinstance(layer, nn.Linear)]
        groups = [{"params": layer.parameters(), "lr": 3e-3 / 3**i} for i, layer in enumerate(reversed(layers))]
        return torch.optim.Adam(groups)


class Averaged(Task):
    """Lightning averages the weights of the last epochs at a constant learning rate (Izmailov et al. 2018)."""

    def configure_callbacks(self) -> Sequence[L.Callback]:
        return [StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)]


class Offset(Task):
    """A constant a thousand times the loss is added to it, as some penalties are."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 1e3


class ManualAccumulation(Task):
    """Manual optimization: a step after every third batch, with the gradients of all three."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        optimizer = cast("LightningOptimizer", self.optimizers())
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss / 3)
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Switching(Task):
    """At ``switch_at`` the digits are transposed: the loss jumps and falls again."""

    def __init__(self, net: nn.Module, *, switch_at: int) -> None:
        super().__init__(net, FASTER)
        self.switch_at = switch_at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.global_step >= self.switch_at:
            x = x.view(-1, 8, 8).mT.reshape(-1, 64)
        return super().training_step((x, y), batch_idx)


class FreshScaler(MixedPrecision):
    """fp16 under autocast with a loss scale so high at first that the first steps are skipped, in every fit anew."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def connect(self, *parts: Any) -> Any:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=40)
        return super().connect(*parts)


CASES = [
    Case(
        "loss_sum_times_1e-7",
        # The eps of Adam goes with the loss, as in the case of 1e-6.
        seeded(lambda: Task(mlp(4, nn.ReLU), partial(ADAM, eps=1e-16), loss=SUM, scale=1e-7)),
        digits,
        120,
        family="loss_scale",
    ),
    Case("loss_plus_1000", seeded(lambda: Offset(mlp(3, nn.ReLU))), digits, 120, score=error_rate, family="loss_scale"),
    Case(
        "bf16_autocast",
        seeded(lambda: Task(mlp(4, nn.GELU))),
        digits,
        120,
        trainer_kwargs={"precision": "bf16-mixed"},
        family="precision",
    ),
    Case(
        "fp16_steps_skipped",
        seeded(lambda: Task(mlp(3, nn.ReLU))),
        digits,
        120,
        trainer_kwargs={"plugins": [FreshScaler()]},
        family="precision",
    ),
    Case("warm_up_by_epoch", seeded(lambda: EpochWarmUp(mlp(3, nn.ReLU))), digits, 150, family="schedule"),
    Case(
        "cosine_restarts",
        seeded(lambda: Task(mlp(3, nn.ReLU), FASTER, schedule=partial(CosineAnnealingWarmRestarts, T_0=50))),
        digits,
        200,
        family="schedule",
    ),
    Case(
        "averaged_weights",
        seeded(lambda: Averaged(mlp(3, nn.ReLU, norm=True), SGD)),
        digits,
        # Five epochs of 24 batches, and one more in which BatchNorm gets the statistics of the averaged weights.
        125,
        trainer_kwargs={"max_epochs": 5},
        family="schedule",
    ),
    Case("discriminative_rates", seeded(lambda: Discriminative(mlp(4, nn.ReLU))), digits, 150, family="fine_tuning"),
    Case(
        "fine_tuning_2e-5",
        seeded(lambda: Task(pretrained(40, width=256), partial(torch.optim.AdamW, lr=2e-5))),
        partial(digits, transposed=True),
        150,
        family="fine_tuning",
    ),
    Case("task_switch", seeded(lambda: Switching(mlp(3, nn.ReLU), switch_at=75)), digits, 200, family="fine_tuning"),
    Case(
        "edge_of_stability",
        # Full batches: the largest curvature climbs to 2 / lr and stays there; the loss falls in jumps (Cohen 2021).
        seeded(lambda: Task(mlp(2, nn.Tanh, inputs=10, outputs=1), partial(torch.optim.SGD, lr=0.2), loss=F.mse_loss)),
        partial(diabetes, batch_size=442),
        200,
        family="optimizer",
    ),
    Case(
        "lbfgs",
        seeded(lambda: Task(mlp(2, nn.Tanh, inputs=13, outputs=3), partial(torch.optim.LBFGS, lr=0.1, max_iter=4))),
        wine,
        40,
        family="optimizer",
    ),
    Case(
        "clipped_at_every_step",
        seeded(lambda: Task(pooled_convnet(), SGD)),
        partial(digits, image=True),
        120,
        trainer_kwargs={"gradient_clip_val": 0.1},
        family="optimizer",
    ),
    Case(
        "targets_far_from_zero",
        seeded(lambda: Task(mlp(2, nn.ReLU, inputs=10, outputs=1), partial(ADAM, lr=1e-2), loss=F.mse_loss)),
        partial(diabetes, scaled=False),
        150,
        family="regression",
    ),
    Case(
        "weak_signal",
        seeded(lambda: Task(mlp(2, nn.ReLU))),
        partial(noisy_digits, share=0.8),
        150,
        score=error_rate,
        family="label_noise",
    ),
    Case(
        "one_sample_a_batch",
        seeded(lambda: Task(mlp(2, nn.ReLU))),
        partial(digits, batch_size=1),
        300,
        family="small_batch",
    ),
    Case(
        "four_samples_a_batch",
        seeded(lambda: Task(mlp(3, nn.ReLU, inputs=30, outputs=2))),
        partial(breast_cancer, batch_size=4),
        200,
        family="small_batch",
    ),
    Case("manual_accumulation", seeded(lambda: ManualAccumulation(mlp(3, nn.ReLU))), digits, 80, family="accumulation"),
    Case(
        "memorised",
        seeded(lambda: Task(mlp(2, nn.ReLU, inputs=13, outputs=3), FASTER)),
        wine,
        300,
        family="converged",
    ),
]
