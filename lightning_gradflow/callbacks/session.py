"""What the monitors of one Trainer share: it turns the Trainer's hooks into samples, rows and actions."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.cadence import Cadence
from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.callbacks.steps import Steps
from lightning_gradflow.callbacks.validation import ValidationLoss
from lightning_gradflow.callbacks.why import Why, is_able
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.findings import Finding
from lightning_gradflow.probes.ranks import anyone_failed
from lightning_gradflow.probes.shards import is_sharded as is_spread
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.mitigation import Mitigation
from lightning_gradflow.sinks import ConsoleSink, ReportSink, make_sinks

if TYPE_CHECKING:
    from lightning_gradflow.callbacks.base import Monitor

MONITOR = "the monitor"
_DEAD_WINDOW = 3  # samples, as SaturationMonitor has it, where none is among the monitors


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
        self._steps: Steps | None = None
        self._validation = ValidationLoss()
        self._start_anew()

    def _start_anew(self) -> None:
        self._steps_state: Mapping[str, Any] | None = None
        self._to_treat: list[Finding] = []
        suggests = any(part.suggests for part in self._parts)
        self.recorder = Recorder(self._detectors, self._border, suggest=suggests)
        self._mitigation = next((m for part in self._parts if (m := part.mitigation()) is not None), None)

    def belongs_to(self, trainer: Trainer, monitors: Sequence[Monitor]) -> bool:
        """Whether it was made for this Trainer and these callbacks, so that a second fit continues it."""
        return self._trainer() is trainer and self.monitors == list(monitors)

    @property
    def is_running(self) -> bool:
        """Whether a fit is on."""
        return self._steps is not None

    def renew(self, trainer: Trainer) -> None:
        """Another fit is about to start: what failed in the last one is tried again."""
        self._border.reset(tells=trainer.is_global_zero)

    def run(self, hook: str, *args: Any) -> None:
        """Calls a method of ours or of the steps by name, inside the border; after an error nothing is left behind."""
        if self._steps is None or not self._steps.sampler.is_muted:
            method = getattr(self, hook, None) or getattr(self._steps, hook, None)
            if method is not None:  # else no fit is on
                self._border.run(MONITOR, method, *args, default=None)
            if self._border.is_off(MONITOR) and self._steps is not None:
                self._give_up(self._steps)
        if self._steps is not None and self._steps.sampler.is_muted:
            with contextlib.suppress(Exception):  # told already; what is left to do is not to let the others wait
                if hook == "before_optimizer_step" and self._mitigation is not None:
                    self._mitigation.before_optimizer_step(args[-1])  # as the others do, until they know
                if self._steps.meet_the_others(hook, *args):
                    self._steps = None

    def _give_up(self, steps: Steps) -> None:
        steps.release()
        # an error in the collective, or told in it, is known to all ranks
        if steps.sampler.is_alone or steps.sampler.others_know:
            steps.sampler.drop()
            self._steps = None
        else:
            steps.sampler.mute()

    # -- when a fit starts and ends -----------------------------------------------------------------------------

    def begin_together(self, trainer: Trainer, module: LightningModule) -> None:
        """The fit is about to start, on all ranks or on none: one that cannot must not let the others wait."""
        self.run("begin", trainer, module)
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        if anyone_failed(self._border.is_off(MONITOR), trainer.strategy.root_device) and self._steps is not None:
            self._steps = None
            self._border.switch_off(MONITOR, "an error on another rank, which says more")

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Looks at model, optimizers and loggers."""
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
        interval = min(asked, default=trainer_facts.logging_interval(trainer))
        sampler = Sampler(
            module,
            self.recorder.history,
            gradients=without is None and any(part.measures_gradients for part in self._parts),
            activations=any(part.measures_activations for part in self._parts),
            window=next((part.dead_window for part in self._parts if part.dead_window is not None), _DEAD_WINDOW),
            topology=topology,
            device=trainer.strategy.root_device,
        )
        explains = any(part.explains_plateaus for part in self._parts) and not is_sharded and topology.model == 1
        plateaus = [detector for detector in self._detectors if isinstance(detector, LossPlateau)]
        why = Why(
            self.recorder.history,
            self._border,
            is_able=explains and is_able(trainer, module),
            suspects=lambda history: any(plateau.suspects(history) for plateau in plateaus),
        )
        self.recorder.holds = why.asks
        self._steps = Steps(
            sampler,
            Cadence(interval),
            self._validation,
            why,
            train_loss=self._named("train_loss"),
            val_loss=self._named("val_loss"),
            run=self.run,
            tell=self._border.tell,
        )
        if self._steps_state is not None:
            self._steps.load_state_dict(self._steps_state)
        self.recorder.tells = trainer.is_global_zero
        self.recorder.model = type(module).__name__
        self.recorder.sinks = self._sinks(trainer) if trainer.is_global_zero else []
        if not any(p.requires_grad for p in module.parameters()):
            self._border.tell(
                "lightning_gradflow: the model has no trainable parameters, so there is nothing to watch."
            )

    def _named(self, which: str) -> str | None:
        return next((getattr(part, which) for part in self._parts if getattr(part, which, None)), None)

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
        steps, self._steps = self._steps, None
        if steps is None:
            return
        losses, val_loss = steps.end(together=together)
        self._steps_state = steps.state_dict()  # another fit, or a checkpoint, may go on from here
        step = trainer_facts.logged_step(trainer) - 1
        self.recorder.close(step, losses, val_loss, trainer_facts.progress(trainer, step))
        self.recorder.end()

    def end_together(self, trainer: Trainer) -> None:
        """The fit ended as planned."""
        self.end(trainer, together=True)

    # -- what comes of a step -----------------------------------------------------------------------------------

    def before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the gradients, and clips them where the mitigator says so."""
        if self._steps is not None:
            self._steps.before_optimizer_step(trainer, module, optimizer)
        if self._mitigation is not None:
            self._mitigation.before_optimizer_step(optimizer)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Records the row of a sample that is complete, and acts on what is found in it."""
        if self._steps is None:
            return
        sampler = self._steps.sampler
        row = self._steps.batch_end(trainer, module, outputs, _digest(self._to_treat))
        if row is None:
            return
        if self._mitigation is not None and not sampler.is_agreed:
            self._mitigation = None
            self._border.switch_off("the mitigator", "the ranks do not find the same")
        if not sampler.is_alone:
            self._treat(module, trainer)
        step = trainer_facts.logged_step(trainer)  # loggers are told in order, and a sample may take several steps
        self._to_treat = self.recorder.add(row, step, trainer_facts.progress(trainer, step))
        if sampler.is_alone:
            self._treat(module, trainer)

    def _treat(self, module: LightningModule, trainer: Trainer) -> None:
        """Acts on the findings; with several ranks one sample later, when each is known to have found the same."""
        opened, self._to_treat = self._to_treat, []
        if self._mitigation is not None and opened:
            self.recorder.actions += self._mitigation.act(opened, self.recorder.history, module, trainer.optimizers)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history, findings and actions, in types that a checkpoint loads with `weights_only=True`."""
        mitigation = self._mitigation.state_dict() if self._mitigation is not None else None
        steps = self._steps.state_dict() if self._steps is not None else self._steps_state
        state: dict[str, Any] = to_checkpoint(
            {
                "recorder": self.recorder.state_dict(),
                "mitigation": mitigation,
                "steps": steps,
                "to_treat": [finding.to_dict() for finding in self._to_treat],
                "val_loss": self._validation.state_dict(),
            }
        )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        state = from_checkpoint(state)
        self.recorder.load_state_dict(state["recorder"])
        self._steps_state = state["steps"]
        self._to_treat = [Finding.from_dict(finding) for finding in state["to_treat"]]
        self._validation.load_state_dict(state["val_loss"])
        if self._mitigation is not None and state["mitigation"] is not None:
            self._mitigation.load_state_dict(state["mitigation"])
