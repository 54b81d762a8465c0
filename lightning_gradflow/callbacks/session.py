"""What the monitors of one Trainer share: it turns the Trainer's hooks into samples, rows and actions."""

from __future__ import annotations

import contextlib
import weakref
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
from lightning_gradflow.callbacks.treating import PART as MITIGATOR
from lightning_gradflow.callbacks.treating import Treating
from lightning_gradflow.callbacks.validation import ValidationLoss
from lightning_gradflow.callbacks.why import Why, is_able
from lightning_gradflow.callbacks.wishes import Wishes
from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.probes.ranks import anyone_failed
from lightning_gradflow.probes.shards import is_sharded as is_spread
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.held import is_in_force
from lightning_gradflow.sinks import ReportSink

if TYPE_CHECKING:
    from lightning_gradflow.callbacks.base import Monitor

MONITOR = "the monitor"


class Session:
    """Drives the probes for a group of monitors in one Trainer; every error in it ends at the border.

    Args:
        trainer: the Trainer that the monitors are callbacks of.
        monitors: the group, in the order of the Trainer's callbacks.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self._trainer = weakref.ref(trainer)
        self.monitors = list(monitors)
        self._wishes = Wishes(monitors)
        self._parts = self._wishes.parts
        self._detectors = self._wishes.detectors()
        self._border = Border()
        self._treating: Treating | None = None
        self._steps: Steps | None = None
        self._validation = ValidationLoss()
        self._start_anew()

    def _start_anew(self) -> None:
        self._steps_state: Mapping[str, Any] | None = None
        suggests = any(part.suggests for part in self._parts)
        self.recorder = Recorder(self._detectors, self._border, suggest=suggests)
        self._treating = self._new_treating()
        self.recorder.is_treated = self._treating is not None

    def _new_treating(self) -> Treating | None:
        mitigation = next((m for part in self._parts if (m := part.mitigation()) is not None), None)
        if mitigation is None:
            return None
        mitigation.load_state_dict(None, self.recorder.actions)
        return Treating(mitigation, self.recorder, self._border)

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
        if self._treating is None:
            self._treating = self._new_treating()

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
                if hook == "before_optimizer_step" and self._treating is not None:
                    self._treating.before_optimizer_step(args[0], args[-1])  # as the others do, until they know
                if hook == "batch_end" and self._treating is not None:
                    self._treating.batch_end()
                if self._steps.meet_the_others(hook, *args):
                    self._stop()

    def _give_up(self, steps: Steps) -> None:
        steps.release()
        # an error in the collective, or told in it, is known to all ranks
        if steps.sampler.is_alone or steps.sampler.others_know:
            steps.sampler.drop()
            self._stop()
        else:
            steps.sampler.mute()

    def _stop(self) -> None:
        """Nothing is measured any more. So nothing is treated either: what is in force ends on all ranks at once."""
        self._steps = None
        self._end_treating()

    def _end_treating(self) -> None:
        treating, self._treating = self._treating, None
        if treating is not None:
            self._border.run("the end of " + MITIGATOR, treating.end, default=None)

    # -- when a fit starts and ends -----------------------------------------------------------------------------

    def begin_together(self, trainer: Trainer, module: LightningModule) -> None:
        """The fit is about to start, on all ranks or on none: one that cannot must not let the others wait."""
        self.run("begin", trainer, module)
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        if anyone_failed(self._border.is_off(MONITOR), trainer.strategy.root_device) and self._steps is not None:
            self._stop()
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
        if self._treating is not None and (topology.model > 1 or without is not None):
            self._treating = None
            self._border.switch_off(MITIGATOR, "it can't change parameters that are cut over ranks in this way")
        step = trainer_facts.logged_step(trainer)
        if len(self.recorder.history) and step < self.recorder.history.steps[-1]:
            self._start_anew()
        interval, gradients_interval = self._wishes.intervals(trainer_facts.logging_interval(trainer))
        if without is not None:  # else each row would cost a meeting of the ranks, for nothing
            gradients_interval = interval
        if gradients_interval < interval:
            self.recorder.expect_gradients_only()
        sampler = Sampler(
            module,
            self.recorder.history,
            gradients=without is None and any(part.measures_gradients for part in self._parts),
            activations=any(part.measures_activations for part in self._parts),
            window=self._wishes.dead_window,
            topology=topology,
            device=trainer.strategy.root_device,
        )
        explains = any(part.explains_plateaus for part in self._parts) and not is_sharded and topology.model == 1
        plateaus = [detector for detector in self._detectors if isinstance(detector, LossPlateau)]
        why = Why(
            self.recorder.judged,
            self._border,
            is_able=explains and is_able(trainer, module),
            suspects=lambda history: any(plateau.suspects(history) for plateau in plateaus),
        )
        self.recorder.holds = why.asks
        self._steps = Steps(
            sampler,
            Cadence(interval),
            gradients_interval,
            self._validation,
            why,
            train_loss=self._wishes.loss_name("train_loss"),
            val_loss=self._wishes.loss_name("val_loss"),
            run=self.run,
            tell=self._border.tell,
        )
        if self._steps_state is not None:
            self._steps.load_state_dict(self._steps_state)
        if self._treating is not None:
            self._begin_treating(self._treating, trainer, module, is_sharded)
        self.recorder.tells = trainer.is_global_zero
        self.recorder.model = type(module).__name__
        self.recorder.sinks = self._wishes.sinks(trainer) if trainer.is_global_zero else []
        if not any(p.requires_grad for p in module.parameters()):
            self._border.tell(
                "lightning_gradflow: the model has no trainable parameters, so there is nothing to watch."
            )

    def _begin_treating(self, treating: Treating, trainer: Trainer, module: LightningModule, is_sharded: bool) -> None:
        def begin() -> None:
            treating.begin(trainer, module, is_sharded=is_sharded)

        if trainer.world_size > 1:
            begin()  # an error here ends the monitor, on all ranks
            return
        self._border.run(MITIGATOR, begin, default=None)
        if self._border.is_off(MITIGATOR):
            self._end_treating()

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
        if self._treating is not None:
            self._treating.end()
        losses, val_loss = steps.end(together=together)
        self._steps_state = steps.state_dict()  # another fit, or a checkpoint, may go on from here
        step = trainer_facts.logged_step(trainer) - 1
        self.recorder.close(step, losses, val_loss, trainer_facts.progress(trainer, step))
        self.recorder.end()

    def end_together(self, trainer: Trainer) -> None:
        """The fit ended as planned."""
        self.end(trainer, together=True)

    # -- what comes of a step -----------------------------------------------------------------------------------

    def batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens a sample where one is due."""
        if self._steps is None:
            return
        self._steps.batch_start(trainer, module, batch, batch_idx)
        sampler = self._steps.sampler
        if self._treating is not None and sampler.is_open and not sampler.gradients_only:
            self._treating.batch_start(batch, batch_idx)

    def before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the gradients, and lets the remedies that are in force change them."""
        if self._steps is not None:
            self._steps.before_optimizer_step(trainer, module, optimizer)
        if self._treating is not None:
            self._treating.before_optimizer_step(trainer, optimizer)
        if self._steps is not None:
            self._steps.await_step(optimizer)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """Records the row of a sample that is complete, and acts on what is found in it."""
        treating = self._treating
        if treating is not None:
            treating.batch_end()
        if self._steps is None:
            return
        sampler = self._steps.sampler
        row = self._steps.batch_end(trainer, module, outputs, treating.digest if treating is not None else 0)
        if row is None:
            return
        if treating is not None and not sampler.is_agreed:
            self._end_treating()
            treating = None
            self._border.switch_off(MITIGATOR, "the ranks do not find the same")
        step = trainer_facts.logged_step(trainer)  # loggers are told in order, and a sample may take several steps
        self.recorder.add(row, step, trainer_facts.progress(trainer, step))
        if treating is not None and not row.gradients_only:
            if not sampler.is_alone:
                self._act(treating, trainer, module)
            self._border.run(MITIGATOR, treating.decide, trainer, module, default=None)
            if sampler.is_alone:
                self._act(treating, trainer, module)

    def _act(self, treating: Treating, trainer: Trainer, module: LightningModule) -> None:
        """Does what was decided: with several ranks one sample later, when each is known to have decided the same."""
        self._border.run(MITIGATOR, treating.carry_out, trainer, module, default=None)
        if self._border.is_off(MITIGATOR):
            self._end_treating()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history, findings and actions, in types that a checkpoint loads with `weights_only=True`."""
        mitigation = self._treating.state_dict() if self._treating is not None else None
        steps = self._steps.state_dict() if self._steps is not None else self._steps_state
        state: dict[str, Any] = to_checkpoint(
            {
                "recorder": self.recorder.state_dict(),
                "mitigation": mitigation,
                "steps": steps,
                "val_loss": self._validation.state_dict(),
            }
        )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        mitigation = state["mitigation"]  # holds tensors of its own
        state = from_checkpoint({name: part for name, part in state.items() if name != "mitigation"})
        self.recorder.load_state_dict(state["recorder"])
        self._steps_state = state["steps"]
        self._validation.load_state_dict(state["val_loss"])
        if self._treating is not None:
            self._treating.load_state_dict(mitigation, self.recorder.actions)
        elif mitigation is not None and mitigation["held"] and is_in_force(mitigation["held"]):
            self._border.tell(
                'lightning_gradflow: this checkpoint is of a run that was cured with mitigate="apply"; without it a '
                "smaller learning rate, clipping or scaled inputs that were in force end here. flow.actions says which."
            )
