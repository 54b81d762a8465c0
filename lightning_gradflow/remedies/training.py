"""What a remedy is given of the run that it is to cure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_gradflow.history import History


class RehearsalError(Exception):
    """The training step could not be called by itself."""


class Rehearsal(Protocol):
    """Runs the training step on batches that the run gave, without a trace in the run."""

    def __call__(self) -> AbstractContextManager[tuple[nn.Module, Callable[[], None]]]:
        """A context with a module and a function that runs one forward pass of it.

        The module has the layers of the model under the same names, and their present weights; it is a copy where the
        model can be copied, else the model itself. Each call of the function runs the same batch with the same random
        numbers, with autograd on, in the mode in which the model trains. Afterwards random state and BatchNorm
        statistics are what they were. New weights are to be copied to the model by whoever opened the context.

        Raises:
            RehearsalError: if the model can't be copied, or its training step fails.
        """
        ...


class CopiesTrained(Protocol):
    """Trains a copy of the model on a few batches of the run, each time from its present weights."""

    def __call__(
        self, factor: float, steps: int, scaling: Mapping[str, Any] | None = None, max_ratio: float | None = None, /
    ) -> Sequence[float]:
        """The loss before each step that was made; the last one is not finite where the copy diverged.

        Args:
            factor: of the learning rate.
            steps: how many.
            scaling: the state of `Coordinates` in which the copy trains.
            max_ratio: of the `Clipper` with which it trains; None for none.

        Raises:
            RehearsalError: if no copy can be trained.
        """
        ...


def of_one_process(values: Tensor) -> Tensor:
    """The mean over the ranks where there is one: the values themselves.

    Example:
        >>> of_one_process(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return values


@dataclass(frozen=True)
class Training:
    """A run in the moment between two optimizer steps.

    Args:
        model: whose weights may be changed, in place.
        optimizers: those that train it.
        history: what was measured.
        rehearse: runs a forward pass on a batch of the run; None where the training step can't be called by itself.
        averaged: mean of a tensor over all ranks, a collective; the same tensor comes out on each.
        seed: the same on each rank, another one for each action.
        pace: trains copies of the model on a batch of the run; None where that can't be done by itself.
        unsharded: opens what `whole` gives, where the parameters are spread over ranks and can be put together.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    history: History
    rehearse: Rehearsal | None = None
    averaged: Callable[[Tensor], Tensor] = of_one_process
    seed: int = 0
    pace: CopiesTrained | None = None
    unsharded: Callable[[], AbstractContextManager[Training]] | None = None

    def whole(self) -> AbstractContextManager[Training]:
        """A context with a run of which this process holds all weights: this one, or a copy of it.

        Where parameters are spread over ranks, the copy has them put together, trains on nothing, and rehearses on the
        same batch on every rank. What is written into its model is written into the parts when the context ends
        without an error, from the first rank, and the optimizers forget what they know of it. All ranks have to open
        it, and to write into the same parameters.

        Example:
            >>> training = Training(nn.Linear(1, 1), [], History())
            >>> with training.whole() as same:
            ...     same is training
            True
        """
        return nullcontext(self) if self.unsharded is None else self.unsharded()
