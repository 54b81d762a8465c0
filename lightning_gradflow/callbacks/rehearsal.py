"""The training step of a run, called on copies of its model and on a batch that all ranks share."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.copies import apart, check_memory, clip_of, loss_of, quiet_copy, step_of
from lightning_gradflow.callbacks.together import Together
from lightning_gradflow.callbacks.unsharded import gathered, whole_copy, write
from lightning_gradflow.history import History
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.coordinates import Coordinates
from lightning_gradflow.remedies.learning_rate import top_rate
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.training import CopiesTrained, Rehearsal, RehearsalError, Training

_COPIES = 3  # of a model that is put together: itself, the copy that is rehearsed, what is measured of it
_TRAINED = 5  # copies of a model that trains: itself, a gradient, what an optimizer remembers, a spare one
_STANDS_OUT = 10.0  # times the loss of another batch at the same weights


def shared(trainer: Trainer, given: tuple[Any, int]) -> tuple[Any, int] | None:
    """A batch and its number, those of rank zero where there are several; None where it can't be sent."""
    if trainer.world_size == 1:
        return given
    sent: list[tuple[Any, int] | None] = [_shareable(given)]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


def _shareable(batch: Any) -> Any:
    """The batch on the CPU; None where it can't be sent to other ranks."""
    try:
        moved = move_data_to_device(batch, torch.device("cpu"))
        pickle.dumps(moved)
    except Exception:
        return None
    return moved


def rehearsal(
    trainer: Trainer,
    module: LightningModule,
    given: tuple[Any, int],
    over: Callable[[], None],
    *,
    is_checked: bool = False,
) -> Rehearsal:
    """Makes training steps of a batch, on quiet copies of a module.

    Args:
        trainer: whose precision they run in, and with whose optimizers none of them steps.
        module: it is copied anew each time.
        given: the batch and its number.
        over: called at the end of each rehearsal, for what an optimizer's refused step has begun.
        is_checked: whether it is known that there is memory for it.
    """
    batch = move_data_to_device(given, module.device)

    @contextmanager
    def rehearse() -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        try:
            if not is_checked:
                check_memory(module, copies=2)
        except MemoryError as error:
            raise RehearsalError(str(error)) from error
        with apart(module), _no_step(trainer, over):
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


def pace(trainer: Trainer, module: LightningModule, given: Sequence[tuple[Any, int]]) -> CopiesTrained:
    """Trains copies of a module on a few batches in turn, from its present weights, and tells the losses.

    Args:
        trainer: of the run; one with a single optimizer, in automatic optimization and on one rank.
        module: it is copied anew each time, with the optimizer.
        given: the batches and their numbers.
    """
    batches = move_data_to_device(list(given), module.device)

    def losses(
        factor: float, steps: int, scaling: Mapping[str, Any] | None = None, max_ratio: float | None = None
    ) -> list[float]:
        try:
            check_memory(module, copies=_TRAINED)
            with apart(module):
                return _losses(trainer, module, batches, factor, steps, scaling, max_ratio)
        except Exception as error:
            raise RehearsalError(f"a copy could not be trained: {error}") from error

    return losses


def _losses(
    trainer: Trainer,
    module: LightningModule,
    batches: Sequence[tuple[Any, int]],
    factor: float,
    steps: int,
    scaling: Mapping[str, Any] | None,
    max_ratio: float | None,
) -> list[float]:
    twin, optimizer = quiet_copy(trainer, module, trainer.optimizers[0])
    coordinates = Coordinates()
    if scaling is not None:
        coordinates.load_state_dict(scaling)
        coordinates.attach(twin)
    top = top_rate(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor if math.isnan(top) else min(group["lr"], top * factor)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    scale, clip = trainer_facts.loss_scale(trainer, module.device), clip_of(trainer, optimizer)
    clipper = Clipper(Training(twin, [optimizer], History()), max_ratio=max_ratio) if max_ratio is not None else None
    losses = _usual([loss_of(trainer, twin, *batch) for batch in batches])
    found: list[float] = []
    for step in range(steps):
        loss = losses[step % len(losses)]()
        found.append(float(loss.detach()))
        if not math.isfinite(found[-1]):
            break
        optimizer.zero_grad()
        (loss if scale is None else loss * scale).backward()
        for parameter in parameters:
            if scale is not None and parameter.grad is not None:
                parameter.grad /= scale
        coordinates.before_step(optimizer)
        if clipper is not None:
            clipper.before_step(optimizer)
        if clip is not None:
            clip()
        optimizer.step()
    return found


def _usual(losses: Sequence[Callable[[], Tensor]]) -> Sequence[Callable[[], Tensor]]:
    """Those of batches that have no part in what is wrong with a run, if it is a batch that is.

    Left out are those whose loss, before any step, is not finite or more than ten times as far from 0 as the one in the
    middle. Which rate suits the others is the question: no rate suits a batch that is a mistake.
    """
    if len(losses) == 1:
        return losses
    sizes = [abs(float(loss().detach())) for loss in losses]  # with autograd: a loss may be made of gradients
    known = sorted(size for size in sizes if math.isfinite(size))
    most = _STANDS_OUT * known[(len(known) - 1) // 2] if known else math.inf
    return [loss for loss, size in zip(losses, sizes, strict=True) if size <= most] or losses


@contextmanager
def _no_step(trainer: Trainer, over: Callable[[], None]) -> Iterator[None]:
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
        over()


@contextmanager
def unsharded(
    live: Training,
    trainer: Trainer,
    module: LightningModule,
    given: tuple[Any, int],
    over: Callable[[], None],
    together: Together,
    tell: Callable[[str], None],
) -> Iterator[Training]:
    """The same run on a copy of which this process holds all weights; see `Training.whole`.

    The ranks agree on whether there is memory for it, on whether the copy was made and takes a training step, and on
    what has been written into it. Where one of them can't, none does: the run itself is given then, without a
    rehearsal, and that is said.

    Args:
        live: the run.
        trainer: of the run.
        module: its model, with parameters that FSDP2 has spread over ranks.
        given: the batch of rank zero and its number, on any device.
        over: see `rehearsal`.
        together: the meetings of the ranks.
        tell: says once what can't be done.

    Raises:
        ApartError: on every rank, if one of them has failed or does something else.
    """
    made = _put_together(trainer, module, given, over, together, tell)
    if made is None:
        yield live
        return
    twin, rehearse = made
    parameters, whole = dict(module.named_parameters()), dict(twin.named_parameters())
    trained = {id(p) for optimizer in live.optimizers for group in optimizer.param_groups for p in group["params"]}
    own = [whole[name] for name, parameter in parameters.items() if id(parameter) in trained]
    versions = {name: values._version for name, values in whole.items()}
    yield Training(twin, [torch.optim.SGD(own, lr=0.0)], live.history, rehearse, seed=live.seed)
    changed = [name for name, values in whole.items() if values._version != versions[name]]
    together.agree(repr(changed))
    write([(parameters[name], whole[name]) for name in changed], trainer.strategy.root_device)
    forget(live.optimizers, [parameters[name] for name in changed])


def _put_together(
    trainer: Trainer,
    module: LightningModule,
    given: tuple[Any, int],
    over: Callable[[], None],
    together: Together,
    tell: Callable[[str], None],
) -> tuple[LightningModule, Rehearsal] | None:
    """The copy, and what rehearses it; None on all ranks where one of them can't make it, or make a step with it."""
    meets_on = trainer.strategy.root_device
    places = list(dict.fromkeys((meets_on, torch.device("cpu"))))
    place, why = _place(trainer, module, places)
    place = together.worst(place)
    if place < len(places):
        tensors = gathered(module, places[place], meets_on)
        twin = rehearse = None
        try:
            twin = whole_copy(module, tensors).to(places[place])
            rehearse = rehearsal(trainer, twin, given, over, is_checked=True)
            with rehearse() as (_, run):
                run()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if not together.worst(int(bool(why))):
            assert twin is not None
            assert rehearse is not None
            return twin, rehearse
    why = why or "it failed on another rank"
    tell(f"lightning_gradflow: the whole model can't be rehearsed ({why}), so layers are drawn by the textbook.")
    return None


def _place(trainer: Trainer, module: LightningModule, places: list[torch.device]) -> tuple[int, str]:
    """Which is the first of these places with memory enough, and why it is no one before."""
    why = ""
    for i, device in enumerate(places):
        sharing = trainer.num_devices if device.type == "cpu" else 1
        try:
            check_memory(module, _COPIES * sharing, device)
        except MemoryError as error:
            why = str(error)
        else:
            return i, ""
    return len(places), why
