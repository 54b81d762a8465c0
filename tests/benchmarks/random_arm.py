"""What it is worth to act at random: the same remedies, at the same moments, without a thought."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_gradflow import AutoMitigator, Finding, FindingKind, GradFlow, Severity
from lightning_gradflow.callbacks.copies import apart, can_rehearse, loss_of, quiet_copy
from lightning_gradflow.remedies.around import activations_around
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.input_scaling import InputScaling
from lightning_gradflow.remedies.learning_rate import RateFactor
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.recurrent import reinitialise_recurrence
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.snapshot import Snapshot
from lightning_gradflow.remedies.textbook import initialise, name_for
from lightning_gradflow.remedies.training import Training

EVERY_N_STEPS = 20
"""Steps between two moments that a rollback may go back to."""
FACTOR = 0.1
"""What the learning rate is multiplied by after a rollback."""


def cool_down(planned: int) -> int:
    """Steps from one action to the next while an alarm lasts: as long as a trial of ours that fails, and its pause."""
    return int(1.5 * min(max(16, 0.1 * planned), 200))


Remedy = Callable[["RandomActor", Training, "list[str]"], bool]


class RandomActor(L.Callback):
    """Takes a remedy at random for layers at random, while an alarm is open, and never looks back.

    A remedy that can do nothing for these layers is no action: another one is drawn. It stands behind `GradFlow` among
    the callbacks.

    Args:
        flow: tells the alarms.
        seed: of all that is drawn; another one for each training, or all of them draw the same.
    """

    def __init__(self, flow: GradFlow, seed: str) -> None:
        self.done: list[tuple[int, str]] = []
        self._flow = flow
        self._random = random.Random(seed)
        self._most = AutoMitigator().max_actions
        self._held: dict[str, Clipper | RateFactor | InputScaling] = {}
        self._past: list[Snapshot] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._past = [Snapshot.take(pl_module, trainer.optimizers)]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for held in self._held.values():
            if not isinstance(held, RateFactor):
                held.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for held in self._held.values():
            if not isinstance(held, Clipper):
                held.batch_end()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._may_act(step, cool_down(trainer.max_steps)):
            self._act(trainer, pl_module, batch, batch_idx, step)
        if step and step % EVERY_N_STEPS == 0:
            self._past.append(Snapshot.take(pl_module, trainer.optimizers))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for held in self._held.values():
            held.release()

    def _may_act(self, step: int, pause: int) -> bool:
        is_cool = not self.done or step - self.done[-1][0] >= pause
        is_told = any(finding.is_open and finding.severity.is_alarm for finding in self._flow.findings)
        return is_told and is_cool and len(self.done) < self._most

    def _act(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, step: int) -> None:
        rehearse = _rehearsal(trainer, module, batch, batch_idx) if can_rehearse(module) else None
        training = Training(
            module, trainer.optimizers, self._flow.history, rehearse, seed=self._random.randrange(2**31)
        )
        for name in self._random.sample(list(REMEDIES), len(REMEDIES)):
            layers = [
                name
                for name, layer in module.named_modules()
                if any(True for _ in layer.parameters(recurse=False)) and self._random.random() < 0.5
            ]
            if REMEDIES[name](self, training, layers):
                self.done.append((step, name))
                return

    # -- the remedies ---------------------------------------------------------------------------------------------

    def _clip(self, training: Training, layers: list[str]) -> bool:
        is_new = "clip" not in self._held
        if is_new:
            self._held["clip"] = Clipper(training)
        return is_new

    def _reinit(self, training: Training, layers: list[str]) -> bool:
        """By the book, for the activations around a layer."""
        generator = torch.Generator().manual_seed(training.seed)
        around = activations_around(training.history.points)
        changed: list[nn.Parameter] = []
        for layer in layers:
            module = training.model.get_submodule(layer)
            before, after = around.get(layer, ("", ""))
            changed += initialise(module, name_for(after), generator, before=before, after=after)
            changed += reinitialise_recurrence(module, generator)
        forget(training.optimizers, changed)
        return bool(changed)

    def _recycle(self, training: Training, layers: list[str]) -> bool:
        finding = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, step=0, layers=tuple(layers))
        return recycle(training, finding) is not None

    def _rollback(self, training: Training, layers: list[str]) -> bool:
        self._random.choice(self._past).restore(training.model, training.optimizers)
        rate = self._held.setdefault("rollback", RateFactor(training.optimizers))
        if isinstance(rate, RateFactor):
            rate.factor *= FACTOR
        return True

    def _scale_inputs(self, training: Training, layers: list[str]) -> bool:
        scaling = self._held.setdefault("scale_inputs", InputScaling())
        return isinstance(scaling, InputScaling) and scaling.start(training, layers) is not None


REMEDIES: dict[str, Remedy] = {
    "clip": RandomActor._clip,
    "reinit": RandomActor._reinit,
    "recycle": RandomActor._recycle,
    "rollback": RandomActor._rollback,
    "scale_inputs": RandomActor._scale_inputs,
}
"""Name of a remedy -> what does it, and says whether it has done anything."""


def _rehearsal(trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> Any:
    """Forward passes of the last batch, on a copy of the model."""

    @contextmanager
    def rehearse() -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        with apart(module):
            (twin,) = quiet_copy(trainer, module)
            loss = loss_of(trainer, twin, batch, batch_idx)

            def run() -> None:
                loss()

            yield twin, run

    return rehearse
