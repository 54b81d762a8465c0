"""The mitigator's part in a fit: it is asked after each sample, and acts between two steps, on all ranks alike."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.copies import apart, can_rehearse, check_memory, copy_of, quiet_copy, step_of
from lightning_gradflow.findings import Action
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.remedies.snapshot import size
from lightning_gradflow.remedies.training import Rehearsal, RehearsalError, Training, of_one_process
from lightning_gradflow.remedies.trial import Decision, Mitigation
from lightning_gradflow.sinks.words import action_line

PART = "the mitigator"
_AVERAGES = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_SNAPSHOTS = 4  # of the start, the last good one, one of which it is not known yet, and of before an action
_LARGE = 1 << 30  # bytes of snapshots that people are told of


class Treating:
    """Drives a `Mitigation` in a fit.

    With several ranks a decision waits for the next sample, in which all ranks are known to have decided the same. They
    then act on the batch of rank zero, with the same random numbers, and take over its weights.

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
        self._mitigation.start(self._training(trainer, module, rehearse=None))

    def batch_start(self, batch: Any, batch_idx: int) -> None:
        """Copies a batch of a sample, before the training step may change it in place."""
        self._batch = (copy_of(batch), batch_idx)

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
        rehearse = self._rehearsal(trainer, module, batch) if decision.what == "act" else None
        training = self._training(trainer, module, rehearse)
        action, error = None, None
        try:
            action = self._mitigation.carry_out(decision, training)
        except Exception as raised:
            error = raised
        if trainer.world_size > 1:
            error = self._even_out(training, action, error, trainer.strategy.root_device)
        if error is not None:
            self._mitigation.undo(training)
            raise error
        if action is not None:
            self._recorder.act(self._mitigation.actions, action)
            rank_zero_info(f"lightning_gradflow: {action_line(action)}")

    def decide(self, trainer: Trainer, module: LightningModule) -> None:
        """Looks at the newest row."""
        said, history = self._recorder.said, self._recorder.history
        step = trainer_facts.logged_step(trainer)
        self._mitigation.keep_good(said, self._training(trainer, module, rehearse=None))
        self._decision = self._mitigation.decide(said, history, trainer_facts.progress(trainer, step))
        is_remedy = any(action.kind == "clip" for action in self._mitigation.actions)
        for said_once in (self._mitigation.clipping_advice if is_remedy else "", self._mitigation.forbidden):
            if said_once and said_once not in self._told:
                self._told.add(said_once)
                self._border.tell(f"lightning_gradflow: {said_once}")

    def end(self) -> None:
        """The fit is over, or died."""
        self._batch = self._decision = None
        self._mitigation.end()

    def _training(self, trainer: Trainer, module: LightningModule, rehearse: Rehearsal | None) -> Training:
        history = self._recorder.history
        # the rest is the same on all ranks: they rehearse with the same batch
        averaged = _mean_over_ranks if self._is_sharded and trainer.world_size > 1 else of_one_process
        return Training(module, trainer.optimizers, history, rehearse, averaged, seed=len(history))

    def _rehearsal(self, trainer: Trainer, module: LightningModule, given: tuple[Any, int] | None) -> Rehearsal | None:
        if given is None or self._is_sharded or not can_rehearse(module):
            return None
        shared = [_shareable(given)] if trainer.world_size > 1 else [given]
        if trainer.world_size > 1:
            dist.broadcast_object_list(shared, src=0)
        batch = _moved(shared[0], module.device)
        if batch is None:
            return None

        @contextmanager
        def rehearse() -> Iterator[tuple[nn.Module, Callable[[], None]]]:
            try:
                check_memory(module, copies=2)
            except MemoryError as error:
                raise RehearsalError(str(error)) from error
            with apart(module), self._no_step(trainer):
                try:
                    (twin,) = quiet_copy(trainer, module)
                except Exception as error:
                    raise RehearsalError(f"the model can't be copied: {error}") from error
                step = step_of(trainer, twin, *batch)

                def run() -> None:
                    try:
                        step()
                    except Exception as error:
                        raise RehearsalError(f"the training step failed on a copy: {error}") from error

                yield twin, run

        return rehearse

    @contextmanager
    def _no_step(self, trainer: Trainer) -> Iterator[None]:
        """A training step that gets at the run's own optimizers, past `self.optimizers()`, can't step with them."""

        def refuse(*_: Any) -> None:
            raise RuntimeError("it steps with the optimizers of the Trainer")

        own = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "register_step_pre_hook")]
        hooks = [optimizer.register_step_pre_hook(refuse) for optimizer in own]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._mitigation.batch_end()  # the step that was refused had begun

    def _even_out(
        self, training: Training, action: Action | None, error: Exception | None, device: torch.device
    ) -> Exception | None:
        """Lets all ranks go on from the same weights; gives the error of this rank, or of having done otherwise."""
        done = (action.kind, action.layers, action.outcome) if action is not None else None
        digest = zlib.crc32(repr(done).encode()) if error is None else -1
        extremes = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, smallest = extremes.tolist()
        if error is None and largest != -smallest:
            error = RuntimeError("a remedy failed on another rank, or did something else there")
        if error is None and action is not None and not self._is_sharded:
            # the same arithmetic on the same batch: what is left to even out is the rounding of unlike machines
            for parameter in training.model.parameters():
                dist.broadcast(parameter.detach(), src=0)
        return error

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


def _shareable(batch: Any) -> Any:
    """The batch on the CPU; None where it can't be sent to other ranks."""
    moved = _moved(batch, torch.device("cpu"))
    try:
        pickle.dumps(moved)
    except Exception:
        return None
    return moved


def _moved(batch: Any, device: torch.device) -> Any:
    return move_data_to_device(batch, device)
