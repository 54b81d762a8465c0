"""What the published rules look at, taken down at every step of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.float64]

SIGMOID_EXTREMES = (-23.0, 16.99999)
TANH_EXTREMES = (-9.4999, 9.4999)


def measured(value: float) -> float:
    """A value as it is, or infinity for NaN, which stands for what was not measured."""
    return np.inf if np.isnan(value) else value


def table(columns: int) -> Callable[[], Floats]:
    """A factory of tables without a row."""
    return lambda: np.empty((0, columns))


@dataclass
class Record:
    """One training as the published rules see it: S steps, P parameter tensors, A ReLUs, B sigmoids and tanhs.

    NaN is what there was not at a step, infinity what was not finite. Activations are those that are modules: the
    hooks of the published tools see no others.

    Args:
        tensors: names of the parameter tensors, in order of registration.
        matrices: (P,) whether a tensor is a weight rather than a bias or a scale.
        recurrent: (P,) whether it carries a hidden state from one time step to the next.
        mean_abs: (S, P) mean absolute gradient.
        norm: (S, P) L2 norm of the gradient.
        zero: (S, P) share of gradient entries that are exactly zero.
        size: (P,) number of entries.
        update: (S, P) L2 norm of what the step changed over that of the tensor; matrices only.
        relus: names of the ReLUs.
        relu_flat: (S, A) share of outputs <= 0.
        relu_inactive: (S, A) share of units that are above 0 for less than one sample in a hundred.
        bounded: names of the sigmoids and tanhs.
        beyond_5: (S, B) share of inputs at or beyond +-5.
        saturated: (S, B) share of units that are within SageMaker's extremes for less than one sample in a hundred.
        loss: (S,) training loss.
        accuracy: (S,) share of right classes, where the output is one of class scores.
        epoch: (S,) number of the epoch.
        planned: steps of the whole training.
    """

    tensors: tuple[str, ...] = ()
    matrices: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    recurrent: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    size: Floats = field(default_factory=lambda: np.empty(0))
    mean_abs: Floats = field(default_factory=table(0))
    norm: Floats = field(default_factory=table(0))
    zero: Floats = field(default_factory=table(0))
    update: Floats = field(default_factory=table(0))
    relus: tuple[str, ...] = ()
    relu_flat: Floats = field(default_factory=table(0))
    relu_inactive: Floats = field(default_factory=table(0))
    bounded: tuple[str, ...] = ()
    beyond_5: Floats = field(default_factory=table(0))
    saturated: Floats = field(default_factory=table(0))
    loss: Floats = field(default_factory=lambda: np.empty(0))
    accuracy: Floats = field(default_factory=lambda: np.empty(0))
    epoch: Floats = field(default_factory=lambda: np.empty(0))
    planned: int = 0

    def __len__(self) -> int:
        return len(self.loss)


class Watcher(L.Callback):
    """Fills a record during a training, without changing it. It sees nothing that runs without gradient: validation."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {name: [] for name in (*_TABLES, "loss", "accuracy", "epoch")}
        self._record = Record()
        self._seen: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[str, ...]] = {}
        self._output: Any = None

    @property
    def record(self) -> Record:
        """All steps so far."""
        columns = {name: len(self._record.tensors) for name in _OF_TENSORS}
        columns |= {name: len(self._record.relus) for name in _OF_RELUS}
        columns |= {name: len(self._record.bounded) for name in _OF_BOUNDED}
        for name, rows in self._rows.items():
            shape = (len(rows), columns[name]) if name in columns else (len(rows),)
            setattr(self._record, name, np.array(rows, dtype=np.float64).reshape(shape))
        return self._record

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the tensors and the activations, and puts a hook on each of these."""
        record, named = self._record, dict(pl_module.named_parameters())
        cells = [m for m in pl_module.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
        hidden = {id(p) for cell in cells for name, p in cell.named_parameters() if name.startswith("weight_hh")}
        record.tensors = tuple(named)
        record.matrices = np.array([p.dim() >= 2 for p in named.values()], dtype=bool)
        record.recurrent = np.array([id(p) in hidden for p in named.values()], dtype=bool)
        record.size = np.array([p.numel() for p in named.values()], dtype=np.float64)
        record.planned = int(trainer.estimated_stepping_batches)
        self._parameters = list(named.values())
        modules = dict(pl_module.named_modules())
        record.relus = tuple(name for name, m in modules.items() if isinstance(m, nn.ReLU))
        record.bounded = tuple(name for name, m in modules.items() if isinstance(m, nn.Sigmoid | nn.Tanh))
        self._handles = [modules[name].register_forward_hook(self._relu(name)) for name in record.relus]
        self._handles += [modules[name].register_forward_hook(self._bounded(name)) for name in record.bounded]
        for whole in {pl_module, getattr(pl_module, "net", pl_module)}:
            self._handles.append(whole.register_forward_hook(self._whole()))
        self._begin()

    def _begin(self) -> None:
        self._gradients: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        self._seen = {}
        self._output = None

    # closures, not methods: a copy of the module must not copy the watcher too
    def _whole(self) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self._output = output

        return hook

    def _relu(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                flat = output.detach() <= 0
                self._seen[name] = torch.stack([flat.float().mean(), _idle(~flat)])

        return hook

    def _bounded(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                low, high = SIGMOID_EXTREMES if isinstance(module, nn.Sigmoid) else TANH_EXTREMES
                z = inputs[0].detach()
                self._seen[name] = torch.stack([(z.abs() >= 5).float().mean(), _idle((z > low) & (z < high))])

        return hook

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Reads gradients as they are before clipping, and keeps the weights."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for index, parameter in enumerate(self._parameters):
            if id(parameter) not in held:
                continue
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                self._gradients[index] = (gradient.to_dense() if gradient.is_sparse else gradient).float().clone()
            if self._record.matrices[index]:
                self._before[index] = parameter.detach().clone()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes a step; a batch whose gradient is only accumulated makes none."""
        if not (self._gradients or self._before):
            return
        numbers = self._numbers()
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        numbers["loss"] = np.nan if loss is None else measured(float(loss) * trainer.accumulate_grad_batches)
        numbers["accuracy"] = _accuracy(self._output, batch)
        numbers["epoch"] = trainer.current_epoch
        for name, rows in self._rows.items():
            rows.append(numbers[name])
        self._begin()

    def _numbers(self) -> dict[str, Any]:
        record = self._record
        numbers: dict[str, Any] = {name: np.full(len(record.tensors), np.nan) for name in _OF_TENSORS}
        at, gradients = list(self._gradients), list(self._gradients.values())
        if at:
            size = record.size[at]
            numbers["mean_abs"][at] = _norms(gradients, 1) / size
            numbers["norm"][at] = _norms(gradients, 2)
            numbers["zero"][at] = 1 - _norms(gradients, 0) / size
        kept = list(self._before)
        if kept:
            old = list(self._before.values())
            change = torch._foreach_sub([self._parameters[index].detach() for index in kept], old)
            numbers["update"][kept] = _norms(change, 2) / (_norms(old, 2) + 1e-9)
        for metrics, names in ((_OF_RELUS, record.relus), (_OF_BOUNDED, record.bounded)):
            pairs = [self._seen.get(name, _NOTHING).tolist() for name in names]
            numbers |= zip(metrics, np.array(pairs).reshape(-1, 2).T, strict=True)
        return numbers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the hooks away."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()


_OF_TENSORS = ("mean_abs", "norm", "zero", "update")
_OF_RELUS = ("relu_flat", "relu_inactive")
_OF_BOUNDED = ("beyond_5", "saturated")
_NOTHING = torch.full((2,), torch.nan)
_TABLES = _OF_TENSORS + _OF_RELUS + _OF_BOUNDED


def _norms(tensors: Sequence[Tensor], order: float) -> Floats:
    """A norm of each; what was measured and is not finite is infinite, for NaN says that nothing was measured."""
    found = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors), order)]).double()
    return found.nan_to_num(nan=np.inf).numpy()


def _idle(active: Tensor) -> Tensor:
    """Share of units, the channels of images and else the last axis, that are active in less than one per cent."""
    units = active.movedim(1, -1) if active.dim() == 4 else active
    return (units.reshape(-1, units.shape[-1]).float().mean(0) < 0.01).float().mean()


def _accuracy(output: Any, batch: Any) -> float:
    """Share of right classes in a batch of inputs and classes; NaN where it holds anything else."""
    if not (isinstance(output, Tensor) and isinstance(batch, list | tuple) and len(batch) == 2):
        return np.nan
    target = batch[1]
    if not isinstance(target, Tensor) or target.is_floating_point() or output.shape[:-1] != target.shape:
        return np.nan
    return float((output.argmax(-1) == target).float().mean())
