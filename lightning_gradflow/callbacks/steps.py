"""A fit, step by step: when a sample is opened, what is read in it, and when it is a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.cadence import Cadence
from lightning_gradflow.callbacks.losses import find_loss, returned_loss
from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.callbacks.validation import ValidationLoss
from lightning_gradflow.callbacks.why import Why
from lightning_gradflow.history import Floats, Row

_MAX_BATCHES = 16  # that a sample waits for a backward pass, or for an optimizer to step


class Steps:
    """Turns the hooks of one fit into rows.

    On a rank that has failed it goes through the same steps without measuring, and tells the others where they meet.

    Args:
        sampler: makes the rows.
        cadence: which steps are sampled.
        gradients_interval: steps between two samples of the parameter gradients alone, where no other is due.
        validation: takes the validation loss.
        why: keeps batches where a plateau is to be explained.
        train_loss: name under which the training loss is logged; None for the one that is returned or found.
        val_loss: the same for the validation loss.
        run: calls a hook of the session by name, inside the border.
        tell: warns.
    """

    def __init__(
        self,
        sampler: Sampler,
        cadence: Cadence,
        gradients_interval: int,
        validation: ValidationLoss,
        why: Why,
        *,
        train_loss: str | None,
        val_loss: str | None,
        run: Callable[..., None],
        tell: Callable[[str], None],
    ) -> None:
        self.sampler = sampler
        self._cadence = cadence
        self._gradients_interval = gradients_interval
        self._owes_whole = False  # a sample of everything was due, and has not become a row yet
        self._validation = validation
        self._why = why
        self._train_loss = train_loss
        self._val_loss = val_loss
        self._run = run
        self._tell = tell
        self._step_hooks: dict[int, RemovableHandle] = {}
        self._has_stepped: set[int] = set()
        self._is_read = False

    def batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens a sample where one is due, or goes on with the one that is open."""
        if not trainer_facts.skips_backward(trainer):
            self._why.batch_start(trainer_facts.logged_step(trainer), batch, batch_idx)
        step = self._due_step(trainer)
        if step is not None:
            samples = trainer_facts.batch_size(trainer) if self._owes_whole else None
            self.sampler.start_batch(step, gradients_only=not self._owes_whole, batch=batch, samples=samples)

    def _due_step(self, trainer: Trainer) -> int | None:
        """The step of the batch that starts, if it is part of a sample."""
        if trainer_facts.skips_backward(trainer):
            return None
        step = trainer_facts.logged_step(trainer)
        is_new = step > self.sampler.last_step
        self._owes_whole |= is_new and (self._cadence.is_due(step) or self._why.is_ready)
        is_due = self._owes_whole or step % self._gradients_interval == 0
        return step if self.sampler.is_open or (is_new and is_due) else None

    def before_backward(self, loss: Tensor | None = None) -> None:
        """Ends the observation of a forward pass."""
        if self.sampler.is_open:
            self.sampler.before_backward(loss)

    def after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes that gradients are fresh, and the scale that they carry."""
        if self.sampler.is_open:
            scale = trainer_facts.loss_scale(trainer, self.sampler.device)
            self.sampler.after_backward(more_to_come=not module.automatic_optimization, scale=scale)

    def before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the gradients that an optimizer is about to use."""
        sampler = self.sampler
        self._note(trainer, module, optimizer)
        if sampler.is_open and trainer_facts.makes_no_step(trainer, sampler.batch_had_backward):
            sampler.abandon_step()
        # without a backward pass what stands in the gradients is old; only in manual optimization can it come unseen
        has_fresh = sampler.had_backward or not module.automatic_optimization
        if not (sampler.is_open and has_fresh and sampler.is_first_reading(optimizer)):
            return
        # a window may have fewer batches than planned, the last one of an epoch; it is divided by the full number
        factor = 1.0
        if module.automatic_optimization:
            factor = trainer.accumulate_grad_batches / min(trainer.accumulate_grad_batches, sampler.backwards)
        scale = trainer_facts.loss_scale(trainer, sampler.device)
        is_raw = trainer_facts.takes_scaled_gradients(optimizer)
        sampler.read_gradients(optimizer, scale, factor, is_raw, trainer.optimizers)
        self._has_stepped.discard(id(optimizer))
        self._is_read = True

    def await_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads what the step will have changed, after remedies that have put back what they do for its time."""
        is_read, self._is_read = self._is_read and not self.sampler.gradients_only, False
        # what only wraps an optimizer may have no hooks
        if is_read and hasattr(optimizer, "_optimizer_step_post_hooks") and id(optimizer) not in self._step_hooks:
            self._step_hooks[id(optimizer)] = optimizer.register_step_post_hook(
                lambda stepped, *_: self._run("after_optimizer_step", stepped)
            )

    def _note(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not module.automatic_optimization and optimizer in trainer.optimizers:
            self._cadence.note(trainer.optimizers.index(optimizer), trainer_facts.logged_step(trainer))

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads what the step changed."""
        if id(optimizer) in self._has_stepped:
            return
        # torch is going through its hooks: ours is taken off when the batch is over
        self._has_stepped.add(id(optimizer))
        if self.sampler.is_open:
            self.sampler.after_optimizer_step(optimizer)

    def release(self) -> None:
        """Takes our hooks off the optimizers, of which one may not have stepped."""
        for handle in self._step_hooks.values():
            handle.remove()
        self._step_hooks = {}
        self._has_stepped = set()

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, decision: int) -> Row | None:
        """Keeps the loss; finishes the sample with the last batch of its step.

        Args:
            trainer: whose batch it was.
            module: the model.
            outputs: what `training_step` returned.
            decision: stands for what this rank is about to do, for the others to agree.

        Returns:
            The row, if the sample is complete.
        """
        sampler = self.sampler
        if trainer_facts.skips_backward(trainer):
            return None
        step = trainer_facts.logged_step(trainer)
        loss = returned_loss(outputs) if self._train_loss is None else None
        if loss is not None:
            # Lightning divides the loss that it shows by the number of accumulated batches
            sampler.take_loss(step, loss, trainer.accumulate_grad_batches if module.automatic_optimization else 1)
        if not sampler.is_open:
            return None
        sampler.end_batch(needs_backward=module.automatic_optimization)
        if not self._is_complete(trainer, module):
            return None
        self.release()
        if not sampler.had_backward:
            if not sampler.has_gradients and sampler.waited < _MAX_BATCHES:
                return None  # training_step may return None for a batch that is no good: the next one will do
            self._tell(
                "lightning_gradflow: a sampled step had no backward pass, so the signal was not measured in it. Did "
                "training_step return None, or call loss.backward() where self.manual_backward(loss) is needed?"
            )
            if not sampler.has_gradients:
                sampler.drop()
                self._owes_whole = False
                return None
        if loss is None:
            self._take_logged_loss(trainer, step)
        if not module.automatic_optimization and sampler.step is not None and not sampler.gradients_only:
            read = [i for i, optimizer in enumerate(trainer.optimizers) if id(optimizer) in sampler.stepped]
            self._cadence.sampled(sampler.step, range(len(trainer.optimizers)), read)
        # there is no hook before self.clip_gradients: what is read is what the optimizer gets
        sees_clipping = module.automatic_optimization
        validation = self._validation.take(sampler.device)
        line = self._why.answer(trainer, module) if self._why.is_ready else None
        self._owes_whole &= sampler.gradients_only
        return sampler.finish(_scalars(trainer), validation, decision, sees_clipping=sees_clipping, line=line)

    def _is_complete(self, trainer: Trainer, module: LightningModule) -> bool:
        if module.automatic_optimization:
            return trainer_facts.window_is_complete(trainer)
        return self.sampler.has_gradients or self.sampler.waited >= _MAX_BATCHES

    def _take_logged_loss(self, trainer: Trainer, step: int) -> None:
        metrics = trainer.callback_metrics
        name = self._train_loss or find_loss(metrics, validation=False)
        if name is not None and name in metrics:
            self.sampler.take_loss(step, metrics[name].detach())

    def epoch_end(self) -> None:
        """A batch that was opened and then skipped has no end; its sample waits for the next one."""
        if self.sampler.is_open:
            self.sampler.skip_batch()

    def validation_batch_end(self, outputs: Any) -> None:
        """Accumulates the loss that `validation_step` returned."""
        self._validation.add(outputs)

    def validation_end(self, trainer: Trainer) -> None:
        """Takes the validation loss, unless it is that of the check before the fit."""
        if trainer.sanity_checking:
            self._validation.forget()
        else:
            self._validation.end(trainer.callback_metrics, self._val_loss)

    def end(self, *, together: bool) -> tuple[Floats, float]:
        """(n,) the losses since the last row, and the validation loss; nothing is left behind."""
        self.release()
        self._why.drop()
        self.sampler.drop()
        return self.sampler.rest(self._validation.take(self.sampler.device), together=together)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if nothing had happened."""
        cadence = self._cadence.state_dict()
        return {"sampler": self.sampler.state_dict(), "cadence": cadence, "owes_whole": self._owes_whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self.sampler.load_state_dict(state["sampler"])
        self._cadence.load_state_dict(state["cadence"])
        self._owes_whole = state["owes_whole"]

    # -- on a rank that has failed ----------------------------------------------------------------------------------

    def meet_the_others(self, hook: str, trainer: Any = None, module: Any = None, *rest: Any) -> bool:
        """What is left to do on a rank that has failed: to be there, once, when the others meet.

        Args:
            hook: which one was called.
            trainer: its first argument.
            module: its second one.
            *rest: the others.

        Returns:
            Whether the others know.
        """
        sampler = self.sampler
        if hook == "batch_start":
            if not trainer_facts.skips_backward(trainer):
                self._why.batch_start(trainer_facts.logged_step(trainer), keep=False)
            step = self._due_step(trainer)
            if step is not None:
                sampler.start_muted(step)
        elif hook == "after_backward":
            sampler.backwards += 1
        elif hook == "before_optimizer_step":
            self._note(trainer, module, rest[0])
            if sampler.is_open:
                sampler.is_first_reading(rest[0])
        elif hook == "batch_end" and sampler.is_open and not trainer_facts.skips_backward(trainer):
            if self._is_complete(trainer, module):
                if sampler.had_backward or sampler.has_gradients:
                    sampler.report_failure()
                elif sampler.waited >= _MAX_BATCHES:
                    sampler.drop()
        elif hook == "end_together":
            sampler.report_failure()
        return sampler.others_know or hook == "end"


def _scalars(trainer: Trainer) -> dict[str, float]:
    return {
        "lr": trainer_facts.learning_rate(trainer),
        "normalised_updates": trainer_facts.normalised_updates(trainer),
        "falling_updates": trainer_facts.falling_updates(trainer),
        "optimizers": float(len(trainer.optimizers)),
        "epoch": float(trainer.current_epoch),
        "steps_per_epoch": trainer_facts.steps_per_epoch(trainer),
        "planned_steps": trainer_facts.planned_steps(trainer),
        "lr_scheduled": float(trainer_facts.has_schedule(trainer)),
    }
