"""Why does the loss stand still? Asked once in a plateau, on a copy of the model and on batches of the run."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Collection, MutableMapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradflow.border import Border
from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.copies import (
    apart,
    bytes_of,
    can_rehearse,
    check_memory,
    clip_of,
    loss_of,
    quiet_copy,
)
from lightning_gradflow.callbacks.repeats import without_repeats
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.probes.loss_line import loss_line, pack
from lightning_gradflow.probes.pairing import pairing

PART = "the search for the cause of a plateau"
BATCHES = 16
"""Batches that the loss line is measured on: with fewer, those of four samples do not tell a direction from noise."""
WAITED = 48
"""Batches that are waited for: weak targets, such as labels of which 80 % are drawn at random, show only in many."""

_AGAIN = 2  # times as many steps: another plateau of the same run is looked into too, and all of it stays cheap
_COPIES = 6  # of the parameters: the copy, where it started, the step, a gradient, their mean, a spare one
_TARGETS = ("label", "target")  # in the name of an entry of a batch, or all of it
_MOST_SAMPLES = 2048  # of more batches than are needed, to save time
_MOST_BYTES = 1 << 28  # of the same, to save memory
_TOO_MANY_BYTES = 1 << 30  # of the batches without which it would be less sure
_FEWEST = 4  # batches: with fewer nothing is measured
_MOST_SECONDS = 60.0  # that the run waits for an answer


class Why:
    """Keeps batches once a plateau without a known cause is suspected, and measures with them what could be the cause.

    It is not asked under manual optimization, with several optimizers, or with several ranks.

    Args:
        history: tells when it was measured last.
        border: catches the errors of user code that does not bear a copy.
        is_able: whether the training is of a kind that can be copied.
        suspects: asked once for each row, whether there may be nothing to learn; it makes no finding by itself.
    """

    def __init__(
        self, history: History, border: Border, *, is_able: bool, suspects: Callable[[History], bool] = lambda _: False
    ) -> None:
        self._history = history
        self._border = border
        self._is_able = is_able
        self._suspects = suspects
        self._looked = -1
        self._is_asked = False
        self._seen = 0
        self._step = -1
        self._kept: deque[tuple[Any, int]] = deque(maxlen=WAITED)
        self.is_ready = False

    def asks(self, finding: Finding) -> bool:
        """Whether a finding has to wait, because its cause is about to be measured."""
        if finding.kind is not FindingKind.LOSS_PLATEAU or finding.cause != "unknown":
            return False
        self._ask(finding.step)
        return self._is_asked

    def _ask(self, step: int) -> None:
        if self._is_able and not self._border.is_off(PART) and not self._is_asked and self._is_due(step):
            self._is_asked, self._seen, self._step = True, 0, step

    def _is_due(self, step: int) -> bool:
        measured = [row.step for row in self._history.rows if "loss_line" in row.scalars]
        return not measured or step >= _AGAIN * measured[-1]

    def _look(self) -> None:
        """Asks by itself where the newest row is suspicious."""
        newest = self._history.rows[-1].step if self._history.rows else -1
        if newest == self._looked:
            return
        self._looked = newest
        if (
            self._is_able
            and self._is_due(newest)
            and self._border.run(PART, self._suspects, self._history, default=False)
        ):
            self._ask(newest)

    def batch_start(self, step: int, batch: Any = None, batch_idx: int = 0, *, keep: bool = True) -> None:
        """Takes notice of a batch, and keeps a reference to it unless `keep` is False."""
        if not self._is_asked:
            self._look()
        if not self._is_asked:
            return
        # a sample begins with the first batch of a step, not in the middle of an accumulation window
        self.is_ready |= self._seen >= WAITED - 1 and step > self._step
        self._seen, self._step = self._seen + 1, step
        if keep:
            self._kept.append((batch, batch_idx))
            while len(self._kept) > BATCHES and not _is_small(self._kept):
                self._kept.popleft()
            while len(self._kept) > 1 and bytes_of(self._kept) > _TOO_MANY_BYTES:
                self._kept.popleft()
        else:
            self._kept.clear()

    def drop(self) -> None:
        """Lets go of the batches."""
        self._is_asked = self.is_ready = False
        self._kept.clear()

    def answer(self, trainer: Trainer, module: LightningModule) -> list[float]:
        """The packed numbers of the loss line; without any where it could not be measured."""
        batches = list(self._kept)
        self.drop()
        found: dict[str, float] = {}
        return pack(self._border.run(PART, _measure, trainer, module, batches, default=found))


def is_able(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the training is of a kind that can be tried out on a copy.

    Not with several ranks: a training step may meet the others, and no two ranks would make as many calls of it.
    """
    if trainer.world_size > 1 or not module.automatic_optimization or len(trainer.optimizers) != 1:
        return False
    return can_rehearse(module) and not isinstance(trainer.optimizers[0], torch.optim.LBFGS)


def _measure(trainer: Trainer, module: LightningModule, batches: list[tuple[Any, int]]) -> dict[str, float]:
    if len(batches) < _FEWEST:
        return {}
    check_memory(module, _COPIES)
    with apart(module):
        return _measure_copy(trainer, module, batches)


def _measure_copy(trainer: Trainer, module: LightningModule, batches: list[tuple[Any, int]]) -> dict[str, float]:
    twin, optimizer = quiet_copy(trainer, module, trainer.optimizers[0])
    loss_scale = trainer_facts.loss_scale(trainer, module.device)
    scale = 1.0 if loss_scale is None else float(loss_scale)
    of = partial(loss_of, trainer, twin, check=_until(time.monotonic() + _MOST_SECONDS))
    losses = [of(batch, at) for batch, at in batches[-BATCHES:]]
    dealt = [(batch, _dealt(batch), at) for batch, at in without_repeats(_of_one_epoch(batches))]
    pairs = [(of(batch, at), of(other, at)) for batch, other, at in dealt if other is not None]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    paired = pairing(pairs, parameters, scale)
    return paired | loss_line(
        losses,
        optimizer,
        clip=clip_of(trainer, optimizer),
        loss_scale=scale,
        normalised=trainer_facts.normalised_updates(trainer) > 0,
    )


def _until(deadline: float) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {_MOST_SECONDS:.0f} s")

    return check


def _is_small(kept: Collection[tuple[Any, int]]) -> bool:
    """Whether so many batches cost little time and memory."""
    batches = [[leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)] for batch, _ in kept]
    samples = sum(max((len(t) for t in tensors if t.dim()), default=1) for tensors in batches)
    return samples <= _MOST_SAMPLES and bytes_of(kept) <= _MOST_BYTES


def _of_one_epoch(batches: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """The longest stretch without a new epoch: batches that share samples agree on them, noise or not."""
    stretches: list[list[tuple[Any, int]]] = [[]]
    for batch, at in batches:
        if stretches[-1] and at <= stretches[-1][-1][1]:
            stretches.append([])
        stretches[-1].append((batch, at))
    return max(stretches, key=len)


def _dealt(batch: Any) -> Any:
    """The batch with its targets dealt to other samples; None where it is not known what they are.

    Of a list or tuple everything but the first part is taken for targets, of a dictionary what is named so.
    """
    if isinstance(batch, MutableMapping):
        parts: dict[Any, Any] = dict(batch)
        targets = [name for name in parts if any(word in str(name).lower() for word in _TARGETS) or name == "y"]
    elif isinstance(batch, (list, tuple)):
        parts = dict(enumerate(batch))
        targets = [at for at in parts if at > 0]
    else:
        return None
    sizes = {name: len(part) for name, part in parts.items() if isinstance(part, Tensor) and part.dim()}
    samples = max((size for name, size in sizes.items() if name not in targets), default=0)
    dealt = {name: parts[name].roll(samples // 2, 0) for name in targets if sizes.get(name) == samples}
    if samples < 2 or not dealt:
        return None
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        copied.update(dealt)
        return copied
    items = list({**parts, **dealt}.values())
    return type(batch)._make(items) if hasattr(batch, "_make") else type(batch)(items)
