"""What every program of a rank needs: a module to train, a Trainer, and witnesses."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gradflow import GradFlow, GradFlowWarning, SaturationMonitor
from lightning_gradflow.metrics import HISTOGRAMS, METRICS

from .launcher import RANKS
from .nets import BATCH, data
from .runs import WINDOW, Prepare

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", str(RANKS)))
SCALARS = ("loss", "val_loss", "lr", "grad_norm_total", "clip_factor", "clipped_fraction", "loss_scale", "epoch")

Answer = dict[str, Any]


class Task(L.LightningModule):
    """A network, cross entropy and descent with momentum; logs nothing."""

    def __init__(self, net: nn.Module, prepare: Prepare | None = None) -> None:
        super().__init__()
        self.net = net
        self.prepare = prepare

    def configure_model(self) -> None:
        """Shards the network, once."""
        if self.prepare is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            assert self.device_mesh is not None
            self.prepare(self.net, self.device_mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of this rank's batch."""
        x, y = batch
        return F.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum, so that an update is not a multiple of the gradient."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Validated(Task):
    """Returns the loss of its validation too."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of this rank's batch."""
        return self.training_step(batch, batch_idx)


class Witness(L.Callback):
    """Keeps the whole weights before each batch, and after the last one."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(weights(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.kept.append(weights(pl_module))


class Collectives(L.Callback, TorchDispatchMode):
    """Counts the collectives of each step, those too that torch makes behind a DTensor's back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.at_start: list[int] = []

    @property
    def by_step(self) -> list[int]:
        """How many there were from the start of each batch to that of the next one."""
        return [after - before for before, after in itertools.pairwise([*self.at_start, self.total])]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func).partition(".")
        self.total += space == "c10d" or (space == "_c10d_functional" and not name.startswith(("wait", "_wrap")))
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.at_start.append(self.total)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class LocalLosses(L.Callback):
    """The losses of this rank alone."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(outputs["loss"].item())


class Saves(L.Callback):
    """Saves a checkpoint before the second epoch, between two samples."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


class Breaks(L.Callback):
    """Makes a method of ours raise from a batch on."""

    def __init__(self, owner: type, method: str, batch: int) -> None:
        self.patch = mock.patch.object(owner, method, side_effect=ZeroDivisionError("on purpose"))
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.patch.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.patch.stop()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """All of them, as they would be on one rank."""
    found = {}
    for name, parameter in module.named_parameters():
        tensor = parameter.detach()
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    return found


def numbers(module: nn.Module) -> list[list[float]]:
    """The weights as lists, to compare the ranks by."""
    return [tensor.flatten().tolist() for tensor in weights(module).values()]


def watch(every_n_steps: int = 1, **kwargs: Any) -> GradFlow:
    """A monitor that keeps still."""
    saturation = SaturationMonitor(window=WINDOW, max_dead=1.0, max_saturated=1.0)
    return GradFlow(every_n_steps, **{"saturation": saturation, "report": False, "console": False, **kwargs})


def loader(rows: int, replicas: int = RANKS, seed: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    """The batches of this rank. Lightning's own sampler would shuffle them."""
    dataset = TensorDataset(*data(rows, seed))
    # neighbours share a model in parts, and so their batches
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, replicas, RANK * replicas // WORLD, shuffle=False)
    return DataLoader(dataset, BATCH, sampler=sampler)


def fit(
    module: L.LightningModule,
    strategy: Strategy,
    train: DataLoader[tuple[Tensor, ...]],
    callbacks: Sequence[L.Callback],
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> tuple[L.Trainer, list[str]]:
    """A fit on both ranks; gives the Trainer, and the warnings of ours on this rank."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0}
    quiet |= {"use_distributed_sampler": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            accelerator="cpu", strategy=strategy, callbacks=list(callbacks), **{"devices": WORLD, **quiet, **kwargs}
        )
        validation = loader(8 * BATCH, seed=4) if isinstance(module, Validated) else None
        trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    ours = [w for w in told if issubclass(w.category, GradFlowWarning) or "lightning_gradflow" in w.filename]
    return trainer, [f"{w.category.__name__}: {w.message}" for w in ours]


def seen(flow: GradFlow) -> Answer:
    """Everything that a monitor measured and found."""
    history = flow.history
    return {
        "steps": history.steps.tolist(),
        "metrics": {m: {"names": history.names(m), "rows": history[m].tolist()} for m in METRICS},
        "calls": {point.name: history.calls(point.name).tolist() for point in history.points},
        "scalars": {name: history.scalar(name).tolist() for name in SCALARS},
        "histograms": {name: history.histogram(name).tolist() for name in HISTOGRAMS},
        "losses": dict(zip(history.loss_steps.tolist(), history.losses.tolist(), strict=True)),
        "findings": [asdict(finding) for finding in flow.findings],
        "actions": [asdict(action) for action in flow.actions],
    }
