"""What the monitors of one Trainer share: it turns the Trainer's hooks into samples, rows and actions."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import MeanMetric

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.losses import find_loss, returned_loss
from lightning_gradflow.callbacks.sampler import Sampler, is_due
from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.metrics import measured
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.mitigation import Mitigation
from lightning_gradflow.sinks import ConsoleSink, ReportSink, make_sinks

if TYPE_CHECKING:
    from lightning_gradflow.callbacks.base import Monitor

MONITOR = "the monitor"
_DEAD_WINDOW = 4  # samples, as SaturationMonitor has it, where none is among the monitors
_MAX_BATCHES = 16  # that a sample of manual optimization waits for an optimizer to step


class Session:
    """Drives the probes for a group of monitors in one Trainer; every error in it ends at the border.

    Args:
        trainer: the Trainer that the monitors are callbacks of.
        monitors: the group, in the order of the Trainer's callbacks.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self._trainer = weakref.ref(trainer)
        self._monitors = list(monitors)
        self._parts = [part for monitor in monitors for part in monitor.parts()]
        alone = len(self._parts) == 1
        self._detectors: list[Detector] = []
        for part in self._parts:
            self._detectors += [detector for detector in part.detectors(alone) if detector not in self._detectors]
        self._border = Border()
        self._mitigation: Mitigation | None = None
        self._sampler: Sampler | None = None
        self._interval = 1
        self._validation = MeanMetric(nan_strategy="disable")
        self._val_loss = math.nan
        self._start_anew()

    def _start_anew(self) -> None:
        suggests = any(part.suggests for part in self._parts)
        self.recorder = Recorder(self._detectors, self._border, suggest=suggests)
        self._mitigation = next((m for part in self._parts if (m := part.mitigation()) is not None), None)

    def belongs_to(self, trainer: Trainer, monitors: Sequence[Monitor]) -> bool:
        """Whether it was made for this Trainer and these callbacks, so that a second fit continues it."""
        return self._trainer() is trainer and self._monitors == list(monitors)

    def renew(self, trainer: Trainer) -> None:
        """Another fit is about to start: what failed in the last one is tried again."""
        self._border.reset(tells=trainer.is_global_zero)

    def run(self, hook: str, *args: Any) -> None:
        """Calls one of the methods below, inside the border; after an error nothing is left behind."""
        self._border.run(MONITOR, getattr(self, hook), *args, default=None)
        if self._border.is_off(MONITOR) and self._sampler is not None:
            sampler, self._sampler = self._sampler, None
            sampler.drop()

    # -- when a fit starts and ends -----------------------------------------------------------------------------

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """The fit is about to start: models, optimizers and loggers stand."""
        unsupported = trainer_facts.unsupported(trainer)
        if unsupported is not None:
            self._border.switch_off(MONITOR, unsupported)
            return
        if self._mitigation is not None and trainer.world_size > 1:
            self._mitigation = None
            self._border.switch_off("the mitigator", "its decisions are not shared between ranks yet")
        step = trainer_facts.logged_step(trainer)
        if len(self.recorder.history) and step <= self.recorder.history.steps[-1]:
            self._start_anew()
        asked = [part.every_n_steps for part in self._parts if part.every_n_steps is not None]
        asked += [monitor.every_n_steps for monitor in self._monitors if monitor.every_n_steps is not None]
        self._interval = min(asked, default=trainer_facts.logging_interval(trainer))
        self._sampler = Sampler(
            module,
            self.recorder.history,
            gradients=any(part.measures_gradients for part in self._parts),
            activations=any(part.measures_activations for part in self._parts),
            window=next((part.dead_window for part in self._parts if part.dead_window is not None), _DEAD_WINDOW),
        )
        self._validation = self._validation.to(module.device)
        self.recorder.tells = trainer.is_global_zero
        self.recorder.model = type(module).__name__
        self.recorder.sinks = self._sinks(trainer) if trainer.is_global_zero else []
        if not any(p.requires_grad for p in module.parameters()):
            self._border.tell(
                "lightning_gradflow: the model has no trainable parameters, so there is nothing to watch."
            )

    def _sinks(self, trainer: Trainer) -> list[Any]:
        if trainer_facts.is_dry_run(trainer):
            return []
        sinks: list[Any] = list(make_sinks(trainer.loggers))
        report = None
        if any(monitor.report for monitor in self._monitors):
            report = ReportSink(lambda: trainer_facts.run_directory(trainer))
            sinks.append(report)
        if any(monitor.console for monitor in self._monitors):
            sinks.append(ConsoleSink(report))
        return sinks

    @property
    def report_path(self) -> Path | None:
        """The page that was written last, or None."""
        return next((sink.written for sink in self.recorder.sinks if isinstance(sink, ReportSink)), None)

    def end(self, trainer: Trainer) -> None:
        """The fit is over, or died: nothing is left behind, and what was seen is shown. May be called repeatedly."""
        if self._sampler is None:
            return
        sampler, self._sampler = self._sampler, None
        sampler.drop()
        step = trainer_facts.logged_step(trainer) - 1
        self.recorder.close(step, sampler.rest(), self._val_loss, trainer_facts.progress(trainer, step))
        self.recorder.end()

    # -- one step -----------------------------------------------------------------------------------------------

    def batch_start(self, trainer: Trainer) -> None:
        """Opens a sample where one is due, or goes on with the one that is open."""
        sampler = self._sampler
        if sampler is None:
            return
        step = trainer_facts.logged_step(trainer)
        if sampler.is_open or (is_due(step, self._interval) and step > self._last_step):
            sampler.start_batch(step)

    @property
    def _last_step(self) -> int:
        rows = self.recorder.history.rows
        return rows[-1].step if rows else -1

    def before_backward(self) -> None:
        """Ends the observation of a forward pass."""
        if self._sampler is not None and self._sampler.is_open:
            self._sampler.before_backward()

    def after_backward(self, module: LightningModule) -> None:
        """Notes that gradients are fresh."""
        if self._sampler is not None and self._sampler.is_open:
            self._sampler.after_backward(more_to_come=not module.automatic_optimization)

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads the gradients, and clips them where the mitigator says so."""
        if self._sampler is not None and self._sampler.is_open:
            self._sampler.read_gradients(optimizer)
        if self._mitigation is not None:
            self._mitigation.before_optimizer_step(optimizer)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Keeps the loss; finishes the sample with the last batch of its step."""
        sampler = self._sampler
        if sampler is None:
            return
        loss = returned_loss(outputs) if self._named("train_loss") is None else None
        step = trainer_facts.logged_step(trainer)
        if loss is not None:
            # Lightning divides the loss that it shows by the number of accumulated batches
            sampler.take_loss(step, loss, trainer.accumulate_grad_batches if module.automatic_optimization else 1)
        if not sampler.is_open:
            return
        sampler.end_batch()
        if not self._is_complete(trainer, module, sampler):
            return
        if not sampler.had_backward:
            sampler.drop()
            self._border.tell(
                "lightning_gradflow: a sampled step had no backward pass, so nothing was measured in it. Did "
                "training_step return None, or call loss.backward() where self.manual_backward(loss) is needed?"
            )
            return
        if loss is None:
            self._take_logged_loss(trainer, sampler, step)
        row = sampler.finish(self._scalars(trainer))
        opened = self.recorder.add(row, step, trainer_facts.progress(trainer, step))
        if self._mitigation is not None:
            self.recorder.actions += self._mitigation.act(opened, self.recorder.history, module, trainer.optimizers)

    def _is_complete(self, trainer: Trainer, module: LightningModule, sampler: Sampler) -> bool:
        if module.automatic_optimization:
            return trainer_facts.window_is_complete(trainer)
        return sampler.has_gradients or sampler.batches >= _MAX_BATCHES

    def _take_logged_loss(self, trainer: Trainer, sampler: Sampler, step: int) -> None:
        metrics = trainer.callback_metrics
        name = self._named("train_loss") or find_loss(metrics, validation=False)
        if name is not None and name in metrics:
            sampler.take_loss(step, metrics[name].detach())

    def _named(self, which: str) -> str | None:
        return next((getattr(part, which) for part in self._parts if getattr(part, which, None)), None)

    def _scalars(self, trainer: Trainer) -> dict[str, float]:
        found = {
            "val_loss": self._val_loss,
            "lr": trainer_facts.learning_rate(trainer),
            "normalised_updates": trainer_facts.normalised_updates(trainer),
            "optimizers": float(len(trainer.optimizers)),
            "epoch": float(trainer.current_epoch),
            "steps_per_epoch": trainer_facts.steps_per_epoch(trainer),
            "loss_scale": trainer_facts.loss_scale(trainer),
        }
        self._val_loss = math.nan
        return found

    # -- validation ---------------------------------------------------------------------------------------------

    def validation_batch_end(self, outputs: Any) -> None:
        """Accumulates the loss that `validation_step` returned."""
        loss = returned_loss(outputs)
        if loss is not None and self._sampler is not None:
            self._validation.update(loss)

    def validation_end(self, trainer: Trainer) -> None:
        """Takes the validation loss under whatever name it was logged, else the mean of what was returned."""
        if trainer.sanity_checking or self._sampler is None:
            self._validation.reset()
            return
        metrics = trainer.callback_metrics
        name = self._named("val_loss") or find_loss(metrics, validation=True)
        if name is not None and name in metrics:
            self._val_loss = measured(float(metrics[name]))
        elif self._validation.update_called:
            self._val_loss = measured(float(self._validation.compute()))
        self._validation.reset()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history, findings and actions, in types that a checkpoint loads with `weights_only=True`."""
        mitigation = self._mitigation.state_dict() if self._mitigation is not None else None
        state: dict[str, Any] = to_checkpoint({"recorder": self.recorder.state_dict(), "mitigation": mitigation})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        state = from_checkpoint(state)
        self.recorder.load_state_dict(state["recorder"])
        if self._mitigation is not None and state["mitigation"] is not None:
            self._mitigation.load_state_dict(state["mitigation"])
