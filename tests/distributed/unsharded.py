"""Runs under FSDP2 in which the mitigator measures: ``python -m tests.distributed.unsharded FOLDER``.

The test starts it as two ranks, and makes the same runs as one process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gradflow.callbacks import rehearsal
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies import reinit, trial
from tests.callbacks.treated import Doctor, Says

from . import rank
from .launcher import RANKS
from .rank import Answer, Task, fit, seen, watch, weights
from .runs import Prepare, sharded, whole
from .treated import Sums

STEPS = 12
ACTED = 6
"""The step at which all of them act: two ranks one sample after they have found something."""
_LIMIT = 220.0


def stack(norm: bool = True) -> nn.Sequential:
    """Sigmoids through which hardly any gradient comes; odd sizes leave the ranks with unequal parts."""
    layers: list[nn.Module] = [nn.BatchNorm1d(64) if norm else nn.Identity(), nn.Linear(64, 17), nn.Sigmoid()]
    for _ in range(7):
        layers += [nn.Linear(17, 17), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(17, 10))


class Reads(nn.Module):
    """Reads an image row by row, and forgets the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(8, 16, batch_first=True), nn.Linear(16, 10)
        with torch.no_grad():
            self.rnn.weight_hh_l0 *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.out(self.rnn(x.unflatten(1, (8, 8)))[0][:, -1])


def dying() -> nn.Sequential:
    """Most of its units are dead."""
    net = nn.Sequential(nn.Linear(64, 17), nn.ReLU(), nn.Linear(17, 17), nn.ReLU(), nn.Linear(17, 10))
    with torch.no_grad():
        net[2].bias[:12] = -20.0
    return net


def each(net: nn.Module, mesh: DeviceMesh, **kwargs: Any) -> None:
    """FSDP2 around each layer, and around the rest."""
    for layer in net.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh["data_parallel"], **kwargs)
    fully_shard(net, mesh=mesh["data_parallel"], **kwargs)


def grouped(net: nn.Module, mesh: DeviceMesh) -> None:
    """Two layers in one group, one that FSDP2 leaves alone, and a method that it wraps."""
    modules = list(net.children())
    fully_shard([modules[1], modules[3]], mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"], ignored_params=set(modules[5].parameters()))
    register_fsdp_forward_method(net, "forward")


@dataclass(frozen=True)
class Finds(Says):
    """Names all layers, in the row before the ranks act, or in which one process does."""

    def judge(self, history: History) -> list[Finding]:
        """The finding, if it is time."""
        at = ACTED - 2 if dist.is_initialized() else ACTED
        if history.rows[-1].step != at:
            return []
        layers = tuple(point.name for point in history.points)
        found = replace(self, start=0, end=ACTED + 1)
        return [replace(finding, layers=layers) for finding in Says.judge(found, history)]


@dataclass(frozen=True)
class Case:
    """One run in which no weight moves but by a remedy.

    Args:
        make: builds the network.
        prepare: shards it.
        kind: of what is found.
        cause: of it.
        remedy: what is done about it.
        scale: of the data.
    """

    make: Callable[[], nn.Module] = stack
    prepare: Prepare = whole
    kind: FindingKind = FindingKind.VANISHING_GRADIENT
    cause: str = "saturation"
    remedy: str = "reinit"
    scale: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_plain = partial(stack, norm=False)  # running statistics bear no bf16
_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

CASES = {
    "whole": Case(),
    "each layer": Case(prepare=each),
    "bf16": Case(_plain, partial(each, mp_policy=_BF16)),
    "not resharded": Case(prepare=partial(each, reshard_after_forward=False)),
    "offloaded": Case(prepare=partial(each, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "grouped": Case(prepare=grouped),
    "recurrence": Case(Reads, cause="recurrence"),
    "dead units": Case(dying, each, FindingKind.DEAD_UNITS, "unknown", "recycle"),
    "unscaled inputs": Case(dying, each, FindingKind.DEAD_UNITS, "unscaled_inputs", "scale_inputs", 1000.0),
}


class Digits(Task):
    """Adam, so that there is a state to forget."""

    def __init__(self, net: nn.Module, prepare: Prepare | None, lr: float) -> None:
        super().__init__(net, prepare)
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _data(scale: float = 1.0) -> DataLoader[tuple[Tensor, ...]]:
    """The batches of this rank; one process has those of the first."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(scale * torch.tensor(x[:768], dtype=torch.float32) / 16, torch.tensor(y[:768]))
    return DataLoader(data, 32, sampler=DistributedSampler(data, RANKS, rank.RANK, shuffle=False))


def case_answer(case: Case) -> tuple[Answer, dict[str, Tensor]]:
    """One of the cases, on two ranks or in one process; what was done, and all weights after it."""
    torch.manual_seed(1)
    alone = "RANK" not in os.environ
    doctor = Doctor(Finds(case.kind, case.cause), allow=(case.remedy,), every_n_steps=2)
    module = Digits(case.make(), None if alone else case.prepare, lr=0.0)
    strategy = SingleDeviceStrategy(torch.device("cpu")) if alone else sharded()
    kwargs = {"devices": 1} if alone else {}
    trainer, told = fit(module, strategy, _data(case.scale), [doctor], max_steps=STEPS, max_epochs=-1, **kwargs)
    forgot = [p for p in module.parameters() if float(trainer.optimizers[0].state[p]["step"]) < STEPS]
    return {**seen(doctor), "told": told, "forgot": len(forgot)}, weights(module)


def cured(make: Callable[[], nn.Module], prepare: Prepare) -> Answer:
    """A real run of the whole monitor."""
    torch.manual_seed(1)
    sums, flow = Sums(), watch(4, saturation=None, mitigate="apply")
    _, told = fit(Digits(make(), prepare, lr=3e-3), sharded(), _data(), [flow, sums], max_epochs=-1, max_steps=100)
    return {**seen(flow), "told": told, "sums": sums.kept}


class Validated(Digits):
    """Looks at the data first."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of this rank's batch."""
        return self.training_step(batch, batch_idx)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same data."""
        return _data()


class FromStart(Sums):
    """Of the weights before the first batch too."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes it."""
        self.on_train_batch_end(trainer, pl_module, None, None, 0)


def validated() -> Answer:
    """A run that goes back to its start, before which there was a validation."""
    torch.manual_seed(1)
    found = Finds(FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large")
    sums, doctor = FromStart(), Doctor(found, allow=("rollback",), every_n_steps=2)
    module = Validated(stack(), whole, lr=1.0)
    callbacks = [doctor, sums]
    _, told = fit(module, sharded(), _data(), callbacks, max_steps=STEPS, max_epochs=-1, num_sanity_val_steps=1)
    return {**seen(doctor), "told": told, "sums": sums.kept}


# -- one rank fails


def _raises(error: type[Exception]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise error("on purpose")

    return method


class FailsOnACopy(Digits):
    """Its training step fails on one rank where it is not the run that calls it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.identity = id(self)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of this rank's batch."""
        if rank.RANK == 1 and self.identity != id(self):
            raise ZeroDivisionError("on purpose")
        return super().training_step(batch, batch_idx)


FALLS_BACK: dict[str, tuple[Any, str, type[Exception]]] = {
    "memory": (rehearsal, "check_memory", MemoryError),
    "copy": (rehearsal, "whole_copy", ZeroDivisionError),
    "quiet copy": (rehearsal, "quiet_copy", ZeroDivisionError),
    "training step": (None, "", ZeroDivisionError),
}
"""Where one rank can fail so that all of them draw by the book."""
UNDONE: dict[str, tuple[Any, str, type[Exception]]] = {
    "snapshot": (trial.Snapshot, "take", ZeroDivisionError),
    "measuring": (reinit, "make_critical", ZeroDivisionError),
    "after it": (reinit, "Reinit", ZeroDivisionError),
    "end of it": (rehearsal, "repr", ZeroDivisionError),
}
"""Where one rank can fail so that all of them put back what they did."""


@contextmanager
def _broken_on_rank_1(owner: Any, name: str, error: type[Exception]) -> Any:
    """From the step on in which the ranks act."""
    with ExitStack() as patches:
        if owner is not None and rank.RANK == 1:
            patches.enter_context(mock.patch.object(owner, name, _raises(error), create=True))
        yield


def troubled(place: tuple[Any, str, type[Exception]]) -> Answer:
    """A run in which rank 1 fails when the ranks act."""
    torch.manual_seed(1)
    sums, doctor = Sums(), Doctor(Finds(), allow=("reinit",), every_n_steps=2)
    module = (FailsOnACopy if place[0] is None else Digits)(stack(), whole, 0.0)
    act = trial.Mitigation.carry_out

    def breaks(*args: Any) -> Any:
        with _broken_on_rank_1(*place):
            return act(*args)

    with mock.patch.object(trial.Mitigation, "carry_out", breaks):
        _, told = fit(module, sharded(), _data(), [doctor, sums], max_steps=STEPS, max_epochs=-1)
    return {**seen(doctor), "told": told, "sums": sums.kept}


def main(folder: str) -> None:
    """Makes all runs, and prints what this rank saw."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_LIMIT, exit=True)
    answer: Answer = {"cases": {}, "fails": {}}
    for name, case in CASES.items():
        answer["cases"][name], found = case_answer(case)
        torch.save(found, Path(folder) / f"{name} {rank.RANK}.pt")
    answer["cured"] = {
        "float32": cured(stack, each),
        "bf16": cured(_plain, partial(each, mp_policy=_BF16)),
    }
    answer["validated"] = validated()
    del os.environ["LIGHTNING_GRADFLOW_RAISE"]
    for name, place in (FALLS_BACK | UNDONE).items():
        answer["fails"][name] = troubled(place)
    print(json.dumps(answer), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while the other one's are still at work


if __name__ == "__main__":
    main(sys.argv[1])
