"""The mitigator's part in a fit: it is asked after each sample, and acts between two steps, on all ranks alike."""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.copies import bytes_of, can_rehearse, copy_of
from lightning_gradflow.callbacks.rehearsal import pace, rehearsal, shared, unsharded
from lightning_gradflow.callbacks.together import ApartError, Together
from lightning_gradflow.callbacks.unsharded import as_parts
from lightning_gradflow.callbacks.why import is_able
from lightning_gradflow.findings import Action
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.snapshot import size
from lightning_gradflow.remedies.training import Training, of_one_process
from lightning_gradflow.remedies.trial import Mitigation
from lightning_gradflow.remedies.verdict import Decision
from lightning_gradflow.sinks.words import action_line, verdict_line

PART = "the mitigator"
_AVERAGES = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_SNAPSHOTS = 4  # of the start, the last good one, one of which it is not known yet, and of before an action
_BATCHES = 3  # of samples: on a single one a network learns by heart, at rates that no other batch bears
_MOST_BYTES = 1 << 26  # of these
_LARGE = 1 << 30  # bytes of snapshots that people are told of


class Treating:
    """Drives a `Mitigation` in a fit.

    With several ranks a decision waits for the next sample, in which all ranks are known to have decided the same. They
    then act on the batch of rank zero, with the same random numbers, and take over its weights. Where FSDP2 has spread
    the parameters, each rank puts them together in a copy, and what comes of it is written into the parts.

    Args:
        mitigation: decides and acts.
        recorder: shows what was done.
        border: tells, once.
    """

    def __init__(self, mitigation: Mitigation, recorder: Recorder, border: Border) -> None:
        self._mitigation = mitigation
        self._recorder = recorder
        self._border = border
        self._batch: tuple[Any, int] | None = None
        self._batches: deque[tuple[Any, int]] = deque(maxlen=_BATCHES)
        self._decision: Decision | None = None
        self._is_sharded = False
        self._told: set[str] = set()

    def begin(self, trainer: Trainer, module: LightningModule, *, is_sharded: bool) -> None:
        """The fit starts.

        Args:
            trainer: whose fit it is.
            module: the model.
            is_sharded: whether parameters are spread over ranks.
        """
        self._is_sharded = is_sharded
        for callback in trainer_facts.callbacks(trainer):
            if {kind.__name__ for kind in type(callback).__mro__} & set(_AVERAGES):
                self._border.tell(
                    f"lightning_gradflow: {type(callback).__name__} averages the weights of many steps. What the "
                    "mitigator replaces stays in the average until it has faded or is started anew, so judge the run "
                    "by its own weights until then."
                )
        needs = _SNAPSHOTS * size(module, trainer.optimizers)
        if needs > _LARGE:
            self._border.tell(
                f"lightning_gradflow: to be able to go back, the mitigator keeps up to {needs / 2**30:.1f} GiB of "
                "copies of weights and optimizer states in the memory of the host."
            )
        self._mitigation.start(self._training(trainer, module))

    def batch_start(self, batch: Any, batch_idx: int) -> None:
        """Copies a batch of a sample, before the training step may change it in place."""
        self._batch = (copy_of(batch), batch_idx)
        self._batches.append(self._batch)
        while len(self._batches) > 1 and bytes_of(self._batches) > _MOST_BYTES:
            self._batches.popleft()

    def before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """The gradients of an optimizer are complete."""
        if not self._mitigation.changes_gradients:
            return
        device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        scale = trainer_facts.loss_scale(trainer, device)
        if scale is not None and not trainer_facts.takes_scaled_gradients(optimizer):
            scale = torch.ones_like(scale)
        self._mitigation.before_step(optimizer, scale)

    def batch_end(self) -> None:
        """Puts back what a step has left half done."""
        self._mitigation.batch_end()

    @property
    def digest(self) -> int:
        """Stands for what this rank is about to do; 0 for nothing, 1 where it has failed."""
        if self._border.is_off(PART):
            return 1
        return zlib.crc32(self._decision.words.encode()) if self._decision is not None else 0

    def carry_out(self, trainer: Trainer, module: LightningModule) -> None:
        """Does what was decided."""
        decision, self._decision = self._decision, None
        batch, self._batch = self._batch, None
        if decision is None:
            return
        together = Together(trainer.strategy.root_device, trainer.world_size)
        training = self._training(trainer, module)
        action, error = None, None
        try:
            if decision.what == "act":
                training = self._treatable(training, trainer, module, batch, together)
            action = self._mitigation.carry_out(decision, training)
        except Exception as raised:
            error = raised
        if trainer.world_size > 1:
            error = self._even_out(training, action, error, together)
        if error is not None:
            self._mitigation.undo(training)
            raise error
        if action is not None:
            self._recorder.act(self._mitigation.actions, action)
            line = action_line(action) if action.decided_step is None else verdict_line(action)
            rank_zero_info(f"lightning_gradflow: {line}")

    def decide(self, trainer: Trainer, module: LightningModule) -> None:
        """Looks at the newest row."""
        said, history = self._recorder.said, self._recorder.judged
        step = trainer_facts.logged_step(trainer)
        self._mitigation.keep_good(said, self._training(trainer, module))
        self._decision = self._mitigation.decide(said, history, trainer_facts.progress(trainer, step))
        forbidden = self._mitigation.forbidden
        self._tell_once(forbidden, forbidden)
        clips = any(action.kind == "clip" for action in self._mitigation.actions)
        if clips and "clipping" not in self._told:  # its numbers change, the advice does not
            self._tell_once("clipping", self._mitigation.clipping_advice)

    def _tell_once(self, what: str, text: str) -> None:
        if text and what not in self._told:
            self._told.add(what)
            self._border.tell(f"lightning_gradflow: {text}")

    def end(self) -> None:
        """The fit is over, or died."""
        self._batch = self._decision = None
        self._batches.clear()
        number = steps = 0
        with contextlib.suppress(RuntimeError):  # a device that has failed can't be read any more
            number, steps = self._mitigation.left_out
        self._mitigation.end()
        if number:
            self._border.tell(
                f"lightning_gradflow: {number} of {steps} steps were left out: their gradients were NaN or infinite. "
                "Look for values that are missing or infinite in the batches."
            )

    def _training(self, trainer: Trainer, module: LightningModule) -> Training:
        """The run as it is now."""
        if self._is_sharded:
            as_parts(module)
        history = self._recorder.judged
        # the rest is the same on all ranks: they rehearse with the same batch
        averaged = _mean_over_ranks if self._is_sharded and trainer.world_size > 1 else of_one_process
        return Training(module, trainer.optimizers, history, averaged=averaged, seed=len(history))

    def _treatable(
        self,
        training: Training,
        trainer: Trainer,
        module: LightningModule,
        batch: tuple[Any, int] | None,
        together: Together,
    ) -> Training:
        """The run as it is now, which can be rehearsed if there is a batch of it."""
        if self._is_sharded and trainer.world_size > 1:

            def averaged(values: Tensor) -> Tensor:
                together.agree("a mean")
                return _mean_over_ranks(values)

            training = replace(training, averaged=averaged)
        given = shared(trainer, batch) if batch is not None and can_rehearse(module) else None
        if given is None:
            return training
        over = self._mitigation.batch_end  # the step that was refused had begun
        if not self._is_sharded:
            tried = pace(trainer, module, self._batches or [given]) if is_able(trainer, module) else None
            return replace(training, rehearse=rehearsal(trainer, module, given, over), pace=tried)
        tell = self._border.tell
        opened = partial(unsharded, training, trainer, module, given, over, together, tell)
        return replace(training, unsharded=opened)

    def _even_out(
        self, training: Training, action: Action | None, error: Exception | None, together: Together
    ) -> Exception | None:
        """Lets all ranks go on from the same weights; gives the error of this rank, or of having done otherwise."""
        if error is not None:
            together.fail()
            return error
        done = None
        if action is not None:
            done = (action.kind, action.layers, action.outcome, sorted(action.before), sorted(action.after))
        try:
            together.agree(repr(done))
        except ApartError as apart:
            return apart
        if action is not None and not self._is_sharded:
            # the same arithmetic on the same batch: what is left to even out is the rounding of unlike machines
            for parameter in training.model.parameters():
                dist.broadcast(parameter.detach(), src=0)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What is in force and on trial."""
        return self._mitigation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None, actions: Sequence[Action]) -> None:
        """Continues from what `state_dict` gave, if anything, with the actions that were taken."""
        self._mitigation.load_state_dict(state, actions)


def _mean_over_ranks(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
