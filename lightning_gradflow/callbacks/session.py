"""What the monitors of one Trainer share: it turns the Trainer's hooks into samples, rows and actions."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.cadence import Cadence
from lightning_gradflow.callbacks.losses import find_loss, returned_loss
from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.callbacks.validation import ValidationLoss
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.findings import Finding
from lightning_gradflow.probes.shards import is_sharded as is_spread
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.mitigation import Mitigation
from lightning_gradflow.sinks import ConsoleSink, ReportSink, make_sinks

if TYPE_CHECKING:
    from lightning_gradflow.callbacks.base import Monitor

MONITOR = "the monitor"
_DEAD_WINDOW = 4  # samples, as SaturationMonitor has it, where none is among the monitors
_MAX_BATCHES = 16  # that a sample of manual optimization waits for an optimizer to step


def _digest(findings: Sequence[Finding]) -> int:
    told = [(str(f.kind), str(f.severity), f.step, f.layers, f.cause) for f in findings]
    return zlib.crc32(repr(told).encode()) if told else 0


class Session:
    """Drives the probes for a group of monitors in one Trainer; every error in it ends at the border.

    Args:
        trainer: the Trainer that the monitors are callbacks of.
        monitors: the group, in the order of the Trainer's callbacks.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self._trainer = weakref.ref(trainer)
        self.monitors = list(monitors)
        self._parts = [part for monitor in monitors for part in monitor.parts()]
        alone = len(self._parts) == 1
        self._detectors: list[Detector] = []
        for part in self._parts:
            self._detectors += [detector for detector in part.detectors(alone) if detector not in self._detectors]
        self._border = Border()
        self._mitigation: Mitigation | None = None
        self._sampler: Sampler | None = None
        self._cadence = Cadence(1)
        self._validation = ValidationLoss()
        self._step_hooks: dict[int, RemovableHandle] = {}
        self._to_treat: list[Finding] = []
        self._start_anew()

    def _start_anew(self) -> None:
        self._sampler_state: Mapping[str, Any] | None = None
        suggests = any(part.suggests for part in self._parts)
        self.recorder = Recorder(self._detectors, self._border, suggest=suggests)
        self._mitigation = next((m for part in self._parts if (m := part.mitigation()) is not None), None)

    def belongs_to(self, trainer: Trainer, monitors: Sequence[Monitor]) -> bool:
        """Whether it was made for this Trainer and these callbacks, so that a second fit continues it."""
        return self._trainer() is trainer and self.monitors == list(monitors)

    @property
    def is_running(self) -> bool:
        """Whether a fit is on."""
        return self._sampler is not None

    def renew(self, trainer: Trainer) -> None:
        """Another fit is about to start: what failed in the last one is tried again."""
        self._border.reset(tells=trainer.is_global_zero)

    def run(self, hook: str, *args: Any) -> None:
        """Calls one of the methods below, inside the border; after an error nothing is left behind."""
        if self._sampler is None or not self._sampler.is_muted:
            self._border.run(MONITOR, getattr(self, hook), *args, default=None)
            if self._border.is_off(MONITOR) and self._sampler is not None:
                self._give_up(self._sampler)
        if self._sampler is not None and self._sampler.is_muted:
            with contextlib.suppress(Exception):  # told already; what is left to do is not to let the others wait
                self._meet_the_others(self._sampler, hook, *args)

    def _meet_the_others(
        self, sampler: Sampler, hook: str, trainer: Any = None, module: Any = None, *rest: Any
    ) -> None:
        """What a rank that has failed still does: it is there, once, when the others meet at the end of a sample."""
        if hook in ("batch_start", "batch_end") and trainer_facts.skips_backward(trainer):
            return
        if hook == "batch_start":
            step = trainer_facts.logged_step(trainer)
            if sampler.is_open or (self._cadence.is_due(step) and step > self._last_step):
                sampler.start_muted(step)
        elif hook == "after_backward":
            sampler.backwards += 1
        elif hook == "before_optimizer_step":
            if len(trainer.optimizers) > 1:
                self._cadence.note(id(rest[0]), trainer_facts.logged_step(trainer))
            if sampler.is_open:
                sampler.is_first_reading(*rest)
            if self._mitigation is not None:  # as the others do, until they know
                self._mitigation.before_optimizer_step(*rest)
        elif hook == "batch_end" and sampler.is_open and self._is_complete(trainer, module, sampler):
            if sampler.had_backward or sampler.has_gradients:
                sampler.report_failure()
                self._sampler = None
            elif sampler.waited >= _MAX_BATCHES:
                sampler.drop()
        elif hook in ("end", "end_together"):
            self.end(trainer, together=hook == "end_together")

    def _give_up(self, sampler: Sampler) -> None:
        self._release_optimizers()
        # an error in the collective, or told in it, is known to all ranks
        if sampler.is_alone or sampler.others_know:
            sampler.drop()
            self._sampler = None
        else:
            sampler.mute()

    def _release_optimizers(self) -> None:
        for handle in self._step_hooks.values():
            handle.remove()
        self._step_hooks = {}

    # -- when a fit starts and ends -----------------------------------------------------------------------------

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """The fit is about to start: models, optimizers and loggers stand."""
        unsupported = trainer_facts.unsupported(trainer)
        if unsupported is not None:
            self._border.switch_off(MONITOR, unsupported)
            return
        without = trainer_facts.without_gradients(trainer)
        topology = trainer_facts.topology(trainer)
        # those of the model may just be whole: FSDP puts them together for a forward pass
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        is_sharded = without is not None or any(is_spread(p) for group in groups for p in group["params"])
        if without is not None:
            self._border.switch_off("the reading of parameter gradients", without)
        if self._mitigation is not None and is_sharded:
            self._mitigation = None
            self._border.switch_off("the mitigator", "it does not change parameters that are sharded over ranks yet")
        step = trainer_facts.logged_step(trainer)
        if len(self.recorder.history) and step < self.recorder.history.steps[-1]:
            self._start_anew()
        asked = [part.every_n_steps for part in self._parts if part.every_n_steps is not None]
        asked += [monitor.every_n_steps for monitor in self.monitors if monitor.every_n_steps is not None]
        self._cadence = Cadence(min(asked, default=trainer_facts.logging_interval(trainer)))
        self._sampler = Sampler(
            module,
            self.recorder.history,
            gradients=without is None and any(part.measures_gradients for part in self._parts),
            activations=any(part.measures_activations for part in self._parts),
            window=next((part.dead_window for part in self._parts if part.dead_window is not None), _DEAD_WINDOW),
            topology=topology,
            device=trainer.strategy.root_device,
        )
        if self._sampler_state is not None:
            self._sampler.load_state_dict(self._sampler_state)
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
        if any(monitor.report for monitor in self.monitors):
            report = ReportSink(lambda: trainer_facts.run_directory(trainer))
            sinks.append(report)
        if any(monitor.console for monitor in self.monitors):
            sinks.append(ConsoleSink(report))
        return sinks

    @property
    def report_path(self) -> Path | None:
        """The page that was written last, or None."""
        return next((sink.written for sink in self.recorder.sinks if isinstance(sink, ReportSink)), None)

    def end(self, trainer: Trainer, *, together: bool = False) -> None:
        """The fit is over, or died: nothing is left behind, and what was seen is shown. May be called repeatedly.

        Args:
            trainer: whose fit it is.
            together: whether it ended as planned, so that all ranks are here.
        """
        sampler, self._sampler = self._sampler, None
        self._release_optimizers()
        if sampler is None:
            return
        sampler.drop()
        if sampler.is_muted:
            if together:
                sampler.report_failure()
            return
        step = trainer_facts.logged_step(trainer) - 1
        losses, val_loss = sampler.rest(self._validation.take(sampler.device), together=together)
        self._sampler_state = sampler.state_dict()  # another fit, or a checkpoint, may go on from here
        self.recorder.close(step, losses, val_loss, trainer_facts.progress(trainer, step))
        self.recorder.end()

    def end_together(self, trainer: Trainer) -> None:
        """The fit ended as planned."""
        self.end(trainer, together=True)

    # -- one step -----------------------------------------------------------------------------------------------

    def batch_start(self, trainer: Trainer) -> None:
        """Opens a sample where one is due, or goes on with the one that is open."""
        sampler = self._sampler
        if sampler is None or trainer_facts.skips_backward(trainer):
            return
        step = trainer_facts.logged_step(trainer)
        if sampler.is_open or (self._cadence.is_due(step) and step > self._last_step):
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

    def before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the gradients, and clips them where the mitigator says so."""
        sampler = self._sampler
        if len(trainer.optimizers) > 1:
            self._cadence.note(id(optimizer), trainer_facts.logged_step(trainer))
        if sampler is not None and sampler.is_open and trainer_facts.makes_no_step(trainer, sampler.batch_had_backward):
            sampler.abandon_step()
        # without a backward pass what stands in the gradients is old; only in manual optimization can it come unseen
        if sampler is not None and sampler.is_open and (sampler.had_backward or not module.automatic_optimization):
            self._read_gradients(trainer, module, sampler, optimizer)
        if self._mitigation is not None:
            self._mitigation.before_optimizer_step(optimizer)

    def _read_gradients(
        self, trainer: Trainer, module: LightningModule, sampler: Sampler, optimizer: torch.optim.Optimizer
    ) -> None:
        if not sampler.is_first_reading(optimizer):
            return
        # a window may have fewer batches than planned, the last one of an epoch; it is divided by the full number
        factor = 1.0
        if module.automatic_optimization:
            factor = trainer.accumulate_grad_batches / min(trainer.accumulate_grad_batches, sampler.backwards)
        scale = trainer_facts.loss_scale(trainer, sampler.device)
        raw = trainer_facts.takes_scaled_gradients(optimizer)
        sampler.read_gradients(optimizer, scale, factor, raw)
        if hasattr(optimizer, "register_step_post_hook"):  # what only looks like an optimizer has no hooks
            key = id(optimizer)
            self._step_hooks[key] = optimizer.register_step_post_hook(
                lambda stepped, *_: self.run("after_optimizer_step", stepped)
            )

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads what the step changed."""
        handle = self._step_hooks.pop(id(optimizer), None)
        if handle is not None:
            handle.remove()
        if self._sampler is not None and self._sampler.is_open:
            self._sampler.after_optimizer_step(optimizer)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Keeps the loss; finishes the sample with the last batch of its step."""
        sampler = self._sampler
        if sampler is None or trainer_facts.skips_backward(trainer):
            return
        loss = returned_loss(outputs) if self._named("train_loss") is None else None
        step = trainer_facts.logged_step(trainer)
        if loss is not None:
            # Lightning divides the loss that it shows by the number of accumulated batches
            sampler.take_loss(step, loss, trainer.accumulate_grad_batches if module.automatic_optimization else 1)
        if not sampler.is_open:
            return
        sampler.end_batch(needs_backward=module.automatic_optimization)
        if not self._is_complete(trainer, module, sampler):
            return
        self._release_optimizers()
        if not sampler.had_backward:
            if not sampler.has_gradients and sampler.waited < _MAX_BATCHES:
                return  # training_step may return None for a batch that is no good: the next one will do
            self._border.tell(
                "lightning_gradflow: a sampled step had no backward pass, so the signal was not measured in it. Did "
                "training_step return None, or call loss.backward() where self.manual_backward(loss) is needed?"
            )
            if not sampler.has_gradients:
                sampler.drop()
                return
        if loss is None:
            self._take_logged_loss(trainer, sampler, step)
        if len(trainer.optimizers) > 1:
            self._cadence.sampled(step, map(id, trainer.optimizers), sampler.stepped)
        row = sampler.finish(
            self._scalars(trainer), self._validation.take(sampler.device), decision=_digest(self._to_treat)
        )
        if self._mitigation is not None and not sampler.is_agreed:
            self._mitigation = None
            self._border.switch_off("the mitigator", "the ranks do not find the same")
        if not sampler.is_alone:
            self._treat(module, trainer)
        self._to_treat = self.recorder.add(row, step, trainer_facts.progress(trainer, step))
        if sampler.is_alone:
            self._treat(module, trainer)

    def _treat(self, module: LightningModule, trainer: Trainer) -> None:
        """Acts on the findings; with several ranks one sample later, when each is known to have found the same."""
        opened, self._to_treat = self._to_treat, []
        if self._mitigation is not None and opened:
            self.recorder.actions += self._mitigation.act(opened, self.recorder.history, module, trainer.optimizers)

    def epoch_end(self) -> None:
        """A batch that was opened and then skipped has no end; its sample waits for the next one."""
        if self._sampler is not None and self._sampler.is_open:
            self._sampler.skip_batch()

    def _is_complete(self, trainer: Trainer, module: LightningModule, sampler: Sampler) -> bool:
        if module.automatic_optimization:
            return trainer_facts.window_is_complete(trainer)
        return sampler.has_gradients or sampler.waited >= _MAX_BATCHES

    def _take_logged_loss(self, trainer: Trainer, sampler: Sampler, step: int) -> None:
        metrics = trainer.callback_metrics
        name = self._named("train_loss") or find_loss(metrics, validation=False)
        if name is not None and name in metrics:
            sampler.take_loss(step, metrics[name].detach())

    def _named(self, which: str) -> str | None:
        return next((getattr(part, which) for part in self._parts if getattr(part, which, None)), None)

    def _scalars(self, trainer: Trainer) -> dict[str, float]:
        return {
            "lr": trainer_facts.learning_rate(trainer),
            "normalised_updates": trainer_facts.normalised_updates(trainer),
            "optimizers": float(len(trainer.optimizers)),
            "epoch": float(trainer.current_epoch),
            "steps_per_epoch": trainer_facts.steps_per_epoch(trainer),
        }

    # -- validation ---------------------------------------------------------------------------------------------

    def validation_batch_end(self, outputs: Any) -> None:
        """Accumulates the loss that `validation_step` returned."""
        if self._sampler is not None:
            self._validation.add(outputs)

    def validation_end(self, trainer: Trainer) -> None:
        """Takes the validation loss, unless it is that of the check before the fit."""
        if trainer.sanity_checking or self._sampler is None:
            self._validation.forget()
        else:
            self._validation.end(trainer.callback_metrics, self._named("val_loss"))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history, findings and actions, in types that a checkpoint loads with `weights_only=True`."""
        mitigation = self._mitigation.state_dict() if self._mitigation is not None else None
        sampler = self._sampler.state_dict() if self._sampler is not None else self._sampler_state
        state: dict[str, Any] = to_checkpoint(
            {
                "recorder": self.recorder.state_dict(),
                "mitigation": mitigation,
                "sampler": sampler,
                "val_loss": self._validation.state_dict(),
            }
        )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        state = from_checkpoint(state)
        self.recorder.load_state_dict(state["recorder"])
        self._sampler_state = state["sampler"]
        self._validation.load_state_dict(state["val_loss"])
        if self._mitigation is not None and state["mitigation"] is not None:
            self._mitigation.load_state_dict(state["mitigation"])
