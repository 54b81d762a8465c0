"""What is read from the Trainer; the private attributes among it stand here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_gradflow.probes.ranks import Topology

_OFF_UNDER = ("XLAStrategy", "XLAFSDPStrategy", "SingleDeviceXLAStrategy")
_NO_GRADIENTS_UNDER = ("FSDPStrategy", "DeepSpeedStrategy")
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def unsupported(trainer: Any) -> str | None:
    """Why nothing can be measured in this training, or None."""
    name = _strategy(trainer, _OFF_UNDER)
    return f"tensors are lazy under {name}, and to read them would compile the model anew" if name else None


def without_gradients(trainer: Any) -> str | None:
    """Why gradients of parameters cannot be measured in this training, while the rest can, or None."""
    name = _strategy(trainer, _NO_GRADIENTS_UNDER)
    return f"{name} keeps them in flat shards that belong to no layer; ModelParallelStrategy does not" if name else None


def _strategy(trainer: Any, names: tuple[str, ...]) -> str | None:
    return next((kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in names), None)


def topology(trainer: Any) -> Topology:
    """How the ranks of the Trainer divide the work."""
    ranks = int(trainer.world_size)
    if ranks == 1:
        return Topology()
    # how many distinct batches there are is what Lightning gives to its DistributedSampler
    sampled = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    data = int(sampled.get("num_replicas", ranks))
    model = ranks // data
    return Topology(data, model, trainer.strategy.device_mesh["tensor_parallel"].get_local_rank() if model > 1 else 0)


def callbacks(trainer: Any) -> list[Any]:
    """The callbacks of a Trainer, in the order in which they are called."""
    return list(trainer.callbacks)


def is_dry_run(trainer: Any) -> bool:
    """Whether this is a `fast_dev_run`, which writes nothing."""
    return bool(trainer.fast_dev_run)


def logging_interval(trainer: Any) -> int:
    """The Trainer's `log_every_n_steps`; 50, Lightning's own default, for one that never logs."""
    return int(trainer.log_every_n_steps) or 50


def logged_step(trainer: Any) -> int:
    """The number of batches that stepped: the x axis of everything that Lightning logs, from 0."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)  # private; seen in 2.5.0 to 2.6.6


def window_is_complete(trainer: Any) -> bool:
    """Whether the present batch is the last one of its accumulation window."""
    return not trainer.fit_loop._should_accumulate()  # private; seen in 2.5.0 to 2.6.6


def skips_backward(trainer: Any) -> bool:
    """Whether this epoch makes no backward pass: the one in which weight averaging renews the BatchNorm statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))  # private; seen in 2.5.0 to 2.6.6


def loss_scale(trainer: Any, device: torch.device) -> Tensor | None:
    """The factor of the gradient scaler, as a scalar on the device; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    # its own way to hand the factor out makes a copy to the host
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def makes_no_step(trainer: Any, batch_had_backward: bool) -> bool:
    """Whether the optimizer is not called although its hook was: so under a scaler after a batch without a loss.

    The gradients of the batches before it in the window still carry the scale then, and are thrown away.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and trainer.lightning_module.automatic_optimization and not batch_had_backward


def takes_scaled_gradients(optimizer: Any) -> bool:
    """Whether an optimizer takes the gradients as the scaler left them, which fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # private; seen in torch 2.6 to 2.13


def batch_size(trainer: Any) -> int | None:
    """Samples in the present batch, two or more, where all loaders deal them out at random; None where it is not known.

    It is not of a stream, nor of a batch sampler of the user's own; and the last batch of an epoch may be smaller.
    """
    loaders = list(_loaders(trainer.train_dataloader))
    sizes = {_random_size(loader) for loader in loaders}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None or size < 2:
        return None
    is_whole = all(loader.drop_last or len(loader.sampler) % size == 0 for loader in loaders)
    return size if is_whole or not trainer.is_last_batch else None


def _loaders(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, (Mapping, list, tuple)):
        for part in loaders.values() if isinstance(loaders, Mapping) else loaders:
            yield from _loaders(part)
    else:
        yield loaders


def _random_size(loader: Any) -> int | None:
    if not isinstance(loader, DataLoader):
        return None
    sampler = loader.sampler
    is_random = isinstance(sampler, _RANDOM) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
    return loader.batch_size if is_random else None


def steps_per_epoch(trainer: Any) -> float:
    """Optimizer steps in an epoch, or NaN for a stream without an end."""
    batches = float(trainer.num_training_batches)
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.nan


def progress(trainer: Any, step: int) -> float:
    """Share of the planned steps that is done, in [0, 1]; NaN for a run without an end."""
    total = planned_steps(trainer)
    return min(1.0, (step + 1) / total) if total > 0 else math.nan


def planned_steps(trainer: Any) -> float:
    """Optimizer steps planned in the whole fit; NaN for a run without an end."""
    planned = [float(trainer.max_steps)] if trainer.max_steps and trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        planned.append(trainer.max_epochs * steps_per_epoch(trainer))
    return min((steps for steps in planned if math.isfinite(steps)), default=math.nan)


def has_schedule(trainer: Any) -> bool:
    """Whether a scheduler that Lightning steps may change the learning rate in the course of the run."""
    return bool(trainer.lr_scheduler_configs)


def learning_rate(trainer: Any) -> float:
    """The largest learning rate of all parameter groups, or NaN where an optimizer has none."""
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group]
    return max((float(rate) for rate in rates), default=math.nan)


def normalised_updates(trainer: Any) -> float:
    """1 where every optimizer scales its updates by the size of the gradient, as Adam and its kin do, else 0.

    They are known by their settings: an `eps` beside a second moment, two `betas`, or the `etas` of Rprop.
    """
    known = [bool({"eps", "betas", "etas"} & set(optimizer.defaults)) for optimizer in trainer.optimizers]
    return float(bool(known) and all(known))


def falling_updates(trainer: Any) -> float:
    """1 where every optimizer divides by the sum of all squared gradients so far, as Adagrad does, else 0.

    Its first step is as large as the learning rate in each entry, and the steps fall by themselves from there on.
    """
    known = ["initial_accumulator_value" in optimizer.defaults for optimizer in trainer.optimizers]
    return float(bool(known) and all(known))


def run_directory(trainer: Any) -> Path:
    """Where the files of this run lie, by the rule that Lightning's own ModelCheckpoint follows.

    `trainer.log_dir` is not asked: it is a collective, and this is called on rank zero alone.
    """
    for logger in trainer.loggers:
        own = getattr(logger, "log_dir", None)
        if own is not None:
            return Path(own)
        if logger.save_dir is not None:
            return Path(logger.save_dir, str(logger.name), str(logger.version))
    return Path(trainer.default_root_dir)
