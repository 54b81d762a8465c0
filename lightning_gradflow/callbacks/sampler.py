"""One sampled optimizer step, from the first forward pass to the finished row."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.callbacks.instruments import Instruments
from lightning_gradflow.callbacks.pending import MAX_LOSSES, PendingLosses
from lightning_gradflow.callbacks.rows import mean, mean_loss
from lightning_gradflow.history import Floats, History, Row
from lightning_gradflow.probes.collector import paused_collector
from lightning_gradflow.probes.loss_line import unpack
from lightning_gradflow.probes.ranks import RankFailedError, Topology
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_NONE = np.empty(0)


class Sampler:
    """Turns what the probes measure in one step into a row. Between samples it keeps references to losses, no more.

    Every rank of a distributed run takes part in each sample. One that cannot measure any more is muted: it keeps the
    schedule, tells the others with the next sample, and so does not let them wait.

    Args:
        model: whose layers are measured.
        history: takes the names of layers and points.
        gradients: whether parameter gradients are read.
        activations: whether saturation and dead units are measured.
        window: samples in a row in which a unit must be silent to count as dead.
        topology: the ranks that train together.
        device: where they meet, which need not be where the parameters wait (offloading); by default where the first
            parameter is.
    """

    def __init__(
        self,
        model: nn.Module,
        history: History,
        *,
        gradients: bool = True,
        activations: bool = True,
        window: int = 3,
        topology: Topology | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._history = history
        self.device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self._transfer = Transfer(topology, self.device)
        self._instruments = Instruments(
            model, history, self._transfer, gradients=gradients, activations=activations, window=window
        )
        self._losses = PendingLosses()
        self._read: list[int] = []
        self._closures: dict[int, int] = {}
        self._scale: Tensor | None = None
        self._multiplier = 1.0
        self.backwards = self._backwards_before = 0
        self.is_muted = False
        self.is_agreed = True  # on what the ranks are about to do
        self.others_know = False  # that this rank, or another one, has failed
        self.step: int | None = None
        self._in_batch = False
        self.waited = 0  # batches since the sample was opened

    @property
    def is_open(self) -> bool:
        """Whether a step is being sampled."""
        return self.step is not None

    @property
    def gradients_only(self) -> bool:
        """Whether nothing but the size of the parameter gradients is read in it."""
        return self._instruments.gradients_only

    @property
    def last_step(self) -> int:
        """The step of the newest row; -1 before the first."""
        rows = self._history.rows
        return rows[-1].step if rows else -1

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part."""
        return self._transfer.is_alone

    @property
    def had_backward(self) -> bool:
        """Whether a backward pass came since the step began."""
        return self.backwards > 0

    @property
    def batch_had_backward(self) -> bool:
        """Whether a backward pass came since the present batch began."""
        return self.backwards > self._backwards_before

    @property
    def has_gradients(self) -> bool:
        """Whether an optimizer has stepped in this sample."""
        return bool(self._read)

    @property
    def stepped(self) -> tuple[int, ...]:
        """The identities of the optimizers that have stepped in this sample."""
        return tuple(self._read)

    def mute(self) -> None:
        """Measures no more, and leaves nothing behind; the other ranks learn of it with the next sample."""
        self._forget()
        self.is_muted = True

    # -- in the course of a step ----------------------------------------------------------------------------------

    def start_batch(
        self, step: int, *, gradients_only: bool = False, batch: Any = None, samples: int | None = None
    ) -> None:
        """The sampled step starts, or goes on with another batch; one without a backward pass is left behind.

        Args:
            step: its number.
            gradients_only: whether nothing but the size of the parameter gradients is read.
            batch: what `training_step` gets.
            samples: how many the batch has, where that is known and they come in random order.
        """
        if self._start(step):
            self._instruments.start_step(gradients_only)
        self._instruments.start_batch(batch, samples)

    def start_muted(self, step: int) -> None:
        """The same on a rank that has failed: at the end of the step the others are met."""
        self._start(step)

    def _start(self, step: int) -> bool:
        """Keeps the schedule; whether a step begins with this batch."""
        if self.step is None:
            self.waited = 0
        self.waited += 1
        begins = self.step is None or (step > self.step and not self.had_backward and not self._read)
        if begins:
            self.step = step
            self._read, self._closures, self.backwards = [], {}, 0
            self._scale, self._multiplier = None, 1.0
            self._instruments.clear()
        self._in_batch = True
        self._backwards_before = self.backwards
        return begins

    def before_backward(self, loss: Tensor | None = None) -> None:
        """A forward pass is over.

        Args:
            loss: what the backward pass starts from, where it is known.
        """
        self._instruments.before_backward(loss)

    def after_backward(self, more_to_come: bool, scale: Tensor | None = None) -> None:
        """A backward pass is over.

        Args:
            more_to_come: whether another forward pass of the same batch may follow (manual optimization).
            scale: the factor of the gradient scaler that it was made with.
        """
        self.backwards += 1
        self._instruments.after_backward(scale, more_to_come)

    def is_first_reading(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer is about to step for the first time in this sample.

        One that asks for the gradients again in the same step, as L-BFGS does, is read once.
        """
        key = id(optimizer)
        self._closures[key] = self._closures.get(key, 0) + 1
        if key in self._read:
            return False
        self._read.append(key)
        return True

    @paused_collector()
    def read_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        scale: Tensor | None,
        factor: float,
        raw: bool,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Reads the gradients that an optimizer is about to use.

        Args:
            optimizer: the one that is about to step.
            scale: the factor of the gradient scaler that this backward pass was made with.
            factor: turns the accumulated gradient into that of the mean loss over the batches that there were.
            raw: whether the gradients still carry the scale.
            optimizers: all that there are, so that what none of them holds can be told.
        """
        self._scale, self._multiplier = scale, factor
        multiplier: Tensor | float = factor
        if raw and scale is not None:
            multiplier = factor / scale.to(wide_dtype(self.device))
        number = self._read.index(id(optimizer))
        held = partial(_parameters, optimizers) if optimizers else None
        self._instruments.read_gradients(number, _parameters([optimizer]), held, multiplier)

    @paused_collector()
    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads what the step of an optimizer changed."""
        if id(optimizer) in self._read:
            closures = self._closures.get(id(optimizer), 1)
            self._instruments.after_optimizer_step(self._read.index(id(optimizer)), gradients_changed=closures > 1)

    def take_loss(self, step: int, loss: Tensor, factor: float = 1) -> None:
        """Keeps a reference to the loss of a batch, to be multiplied by `factor` later; nothing is computed."""
        self._losses.add(step, loss, factor)

    def end_batch(self, *, needs_backward: bool = False) -> None:
        """A batch is over and the step may not be: validation may come before the next.

        Args:
            needs_backward: whether one for which no backward pass was seen has no part in the step.
        """
        in_vain = needs_backward and not self.batch_had_backward
        self._in_batch = False
        self._instruments.end_batch(in_vain)

    def abandon_step(self) -> None:
        """No step will be made of the batches so far; the sample waits for the next."""
        self.backwards = self._backwards_before = 0

    def skip_batch(self) -> None:
        """The batch that was started is skipped, if there is one; the sample waits for the next."""
        if self._in_batch:
            self.end_batch()

    def drop(self) -> None:
        """Gives the present sample up, and leaves nothing behind."""
        self._forget()
        self.step = None

    def _forget(self) -> None:
        self._instruments.drop()
        self._transfer.drop()

    # -- after it ---------------------------------------------------------------------------------------------------

    @paused_collector()
    def finish(
        self,
        scalars: Mapping[str, float],
        validation: Tensor | None = None,
        decision: int = 0,
        *,
        sees_clipping: bool = True,
        line: Sequence[float] | None = None,
    ) -> Row:
        """The row of the present sample. One collective where there are several ranks, one copy from the device.

        Args:
            scalars: taken into the row as they are.
            validation: (2,) sum and number of the validation losses since the last row.
            decision: stands for what is about to be done; `is_agreed` then tells whether all ranks are about to do it.
            sees_clipping: whether the gradients were read before they were clipped.
            line: the packed numbers of the loss line, where it was measured; by all ranks or by none.

        Raises:
            RankFailedError: if another rank could not measure.
        """
        step = self.step if self.step is not None else 0
        self.step = None
        meetings = self._transfer.meetings
        try:
            self._instruments.hand_over()
            if self._scale is not None:
                self._transfer.put("loss scale", self._scale.reshape(1))
            self._transfer.share_numbers("decision", [float(decision)])
            if line is not None:
                self._transfer.share_numbers("loss line", line)
            host = self._fetch_with_losses(validation)
            self.is_agreed = host["decision"][0] == decision * self._transfer.topology.ranks
        except Exception:
            if self._transfer.meetings == meetings:  # the others are waiting
                self.report_failure()
            raise
        scale = float(host["loss scale"][0]) if "loss scale" in host else math.nan
        found = self._instruments.found(host, self._multiplier, scale, sees_clipping=sees_clipping)
        losses = self._losses.by_step(host.get("losses", _NONE), self._transfer.topology.ranks)
        numbers = {**scalars, "backward_passes": float(self.backwards), **found.scalars}
        numbers |= unpack(host["loss line"]) if "loss line" in host else {}
        numbers |= {"loss": mean_loss(losses), "val_loss": _validation(host)}
        return Row(
            step=step,
            values=found.values,
            scalars={name: value for name, value in numbers.items() if not math.isnan(value)},
            histograms=found.histograms,
            losses=losses,
            calls=found.calls,
            gradients_only=self.gradients_only,
        )

    def report_failure(self) -> None:
        """Takes part in the collective of this sample with nothing but the news that this rank has failed."""
        self._transfer.drop()
        self.step, self.others_know = None, True
        if not self.is_alone:
            with contextlib.suppress(RankFailedError):
                self._transfer.fetch(failed=True)

    def rest(self, validation: Tensor | None = None, *, together: bool = True) -> tuple[Floats, float]:
        """(n,) the losses of the steps since the last sample, and the mean of the validation losses since then.

        Args:
            validation: as for `finish`.
            together: whether all ranks are here; after an error they may not be.
        """
        host = self._fetch_with_losses(validation, together=together)
        ranks = self._transfer.topology.ranks if together else 1
        return self._losses.by_step(host.get("losses", _NONE), ranks), _validation(host)

    def _fetch_with_losses(self, validation: Tensor | None, *, together: bool = True) -> dict[Hashable, Floats]:
        share = self._transfer.share if together else self._transfer.put
        if self._losses or not self.is_alone:
            # ranks agree on lengths: one that never changes is agreed on once
            length = 0 if self.is_alone or not together else MAX_LOSSES
            share("losses", self._losses.stack(self.device, length))
        if validation is not None:
            share("validation", validation)
        if not together:
            return self._transfer.fetch_own()
        try:
            return self._transfer.fetch()
        except RankFailedError:
            self.others_know = True
            raise

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if nothing had happened: the losses since the last row, silent units."""
        # what a checkpoint holds comes from one rank, whose losses alone are not those of the run
        losses = self._losses.state_dict() if self.is_alone else []
        return {"losses": losses, **self._instruments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._losses.load_state_dict(state["losses"])
        self._instruments.load_state_dict(state)


def _validation(host: Mapping[Hashable, Floats]) -> float:
    return mean(*host.get("validation", (0.0, 0.0)))


def _parameters(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[nn.Parameter]:
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
