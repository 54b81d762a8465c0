"""Runs on two ranks in which the mitigator acts."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies import treatments
from lightning_gradflow.remedies.trial import Mitigation
from tests.callbacks.treated import Doctor, Says

from .launcher import RANKS
from .rank import RANK, Answer, Task, fit, seen, watch
from .runs import Prepare, ddp, sharded, tensor_parallel, whole

STEPS = 100
ENDLESS = 10**9


class Stack(nn.Sequential):
    """Sigmoids through which hardly any gradient comes, with statistics that differ between the ranks."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.BatchNorm1d(64), nn.Linear(64, 16), nn.Sigmoid()]
        for _ in range(5):
            layers += [nn.Linear(16, 16), nn.Sigmoid()]
        super().__init__(*layers, nn.Linear(16, 10))


class Digits(Task):
    """Adam, so that there is a state to forget."""

    def __init__(self, prepare: Prepare | None = None, lr: float = 3e-3) -> None:
        super().__init__(Stack(), prepare)
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Sums(L.Callback):
    """A checksum of all weights after each batch; with shards, of those put together."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes it."""
        self.kept.append(_sum(pl_module))


def _sum(module: nn.Module) -> int:
    total = 0
    for parameter in module.parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total = zlib.crc32(tensor.contiguous().numpy().tobytes(), total)
    return total


def _data() -> DataLoader[tuple[Tensor, ...]]:
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x[:768], dtype=torch.float32) / 16, torch.tensor(y[:768]))
    sampler: DistributedSampler[Any] = DistributedSampler(data, RANKS, RANK, shuffle=False)
    return DataLoader(data, 32, sampler=sampler)


def run(
    monitor: L.Callback | None,
    strategy: Strategy,
    prepare: Prepare | None = None,
    steps: int = STEPS,
    **kwargs: Any,
) -> Answer:
    """One run; gives the checksums of its weights, what was done, and what was told."""
    L.seed_everything(1, verbose=False)
    sums = Sums()
    callbacks = [*([monitor] if monitor is not None else []), sums]
    trainer, told = fit(Digits(prepare, **kwargs), strategy, _data(), callbacks, max_epochs=-1, max_steps=steps)
    (optimizer,) = trainer.optimizers
    answer: Answer = seen(monitor) if monitor is not None else {}  # type: ignore[arg-type]
    return {
        **answer,
        "told": told,
        "sums": sums.kept,
        "hooks": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
    }


@dataclass(frozen=True)
class _Finds(Says):
    """Names layers of the stack."""

    layers: tuple[str, ...] = ("net.1", "net.3")

    def judge(self, history: History) -> list[Finding]:
        """The finding, if it is time."""
        return [replace(finding, layers=self.layers) for finding in super().judge(history)]


SLOW = _Finds(FindingKind.UPDATE_RATIO, "learning_rate_too_large")
BREAKS = _Finds(FindingKind.NONFINITE_GRADIENT, "unknown")
EXPLODES = _Finds(FindingKind.EXPLODING_GRADIENT, "unknown")
SICK = _Finds(layers=tuple(f"net.{i}" for i in range(1, 13, 2)))
STAYS_SICK = _Finds(end=ENDLESS)
NO_RATE = 0.0
"""So that no weight moves but by a remedy."""


def _doctor(*found: Any, **kwargs: Any) -> Doctor:
    return Doctor(*found, **{"every_n_steps": 2, **kwargs})


def _on_rank_1(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """A patch of a method on rank 1; on rank 0 the method is as it was, called through the same kind of patch."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, make(original) if RANK == 1 else original)


def _fails_from(calls: int) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        count = iter(range(ENDLESS))

        def method(*args: Any, **kwargs: Any) -> Any:
            if next(count) >= calls:
                raise ZeroDivisionError("on purpose")
            return original(*args, **kwargs)

        return method

    return make


def _decides_otherwise(original: Any) -> Any:
    return lambda *args, **kwargs: None


def failing_remedy() -> Answer:
    """New weights on rank 0, and on rank 1 an error half-way."""
    reinit = treatments._TREATMENTS["reinit"]

    def spoils(patient: Any) -> Any:
        done = reinit(patient)
        if RANK == 1:
            raise ZeroDivisionError("on purpose")
        return done

    with mock.patch.dict(treatments._TREATMENTS, reinit=spoils):
        return run(_doctor(STAYS_SICK), ddp(), None, 24)


def unlike_remedies() -> Answer:
    """New weights on rank 0, and a remedy that finds nothing to do on rank 1."""
    reinit = treatments._TREATMENTS["reinit"]
    with mock.patch.dict(treatments._TREATMENTS, reinit=lambda patient: reinit(patient) if RANK == 0 else None):
        return run(_doctor(STAYS_SICK), ddp(), None, 24)


def treated() -> Answer:
    """All of them."""
    with _on_rank_1(Mitigation, "decide", _decides_otherwise):
        otherwise = run(_doctor(STAYS_SICK), ddp(), None, 24)
    answers = {
        "suggested": run(watch(4, saturation=None), ddp()),
        "applied": run(watch(4, saturation=None, mitigate="apply"), ddp()),
        "plain": run(None, ddp(), None, 24),
        "broken": run(_doctor(BREAKS, allow=("rollback",)), ddp(), None, 24),
        "taken back": run(_doctor(STAYS_SICK, max_actions=1), ddp(), None, 48, lr=NO_RATE),
        "decides otherwise": otherwise,
    }
    del os.environ["LIGHTNING_GRADFLOW_RAISE"]
    answers |= {"failing remedy": failing_remedy(), "unlike remedies": unlike_remedies()}
    with _on_rank_1(Mitigation, "decide", _fails_from(8)):
        answers["failing decision"] = run(_doctor(SLOW, allow=("rollback",)), ddp(), None, 24)
    with _on_rank_1(Sampler, "end_batch", _fails_from(8)):
        answers["failing monitor"] = run(_doctor(SLOW, allow=("rollback",)), ddp(), None, 24)
    return answers


def treated_shards() -> Answer:
    """Weights in parts."""
    return {
        "applied": run(_doctor(SICK), sharded(), whole, 60),
        "broken": run(_doctor(BREAKS, allow=("rollback",)), sharded(), whole, 24),
        "clipped": run(_doctor(EXPLODES, allow=("clip",)), sharded(), whole, 24),
        "taken back": run(_doctor(STAYS_SICK, max_actions=1), sharded(), whole, 48, lr=NO_RATE),
        "cut": run(_doctor(STAYS_SICK), tensor_parallel(), _cut, 8),
    }


def _cut(net: nn.Module, mesh: Any) -> None:
    parallelize_module(net, mesh["tensor_parallel"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
