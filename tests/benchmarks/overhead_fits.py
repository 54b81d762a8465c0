"""Whole fits of one network, plain and watched, and how long they and their steps took."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradflow import GradFlow, GradNormLogger
from lightning_gradflow.callbacks.base import Monitor
from tests.wandb_reader import read_run

from .cost_models import LoggingNorms, Model, Network

WARM_UP = {"long": 3, "steady": 33, "short": 17}
"""Steps at the beginning of a fit that are not counted as steps: torch takes its memory in the first ones.

Samples of everything are taken at steps 0, 1, 2, 4, 8, 16, 32, 50, 100, ...: of a steady fit the steps are counted in
which two of a hundred are such samples, as in the middle of a long run, and of a short one those without any.
"""
STEPS = {"long": 300, "steady": 133, "short": 32}
"""Steps of a fit."""
PLANNED = 1_000_000
"""Steps that a short fit is said to have before it: it stands for a piece out of the middle of a long run, in which
the picture of the run is drawn rarely."""
WATCHED = ("gradflow/", "gradients/", "parameters/", "grad_2.0_norm")
"""How the keys begin that those who watch give to a logger."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: what people read.
        twin: the name of the plain training that it is held against; its own name where it is one.
        callbacks: makes what watches.
        watch: what `wandb.watch` is to log, if it is called.
        kind: the module that is trained.
        length: `"long"`, which logs every 50 steps, or `"steady"` or `"short"`, which log at every step.
        to_wandb: whether its logger is W&B's, offline; else it writes CSV.
    """

    name: str
    twin: str
    callbacks: Callable[[], list[Monitor]] = list
    watch: str | None = None
    kind: type[Network] = Network
    length: str = "short"
    to_wandb: bool = False

    @property
    def is_plain(self) -> bool:
        return self.name == self.twin

    @property
    def is_long(self) -> bool:
        return self.length == "long"


def _everything() -> list[Monitor]:
    """Without page and summary, which come once in a fit: in one of some steps they would seem dear."""
    return [GradFlow(every_n_steps=1, report=False, console=False)]


def _gradients() -> list[Monitor]:
    return [GradNormLogger(every_n_steps=1)]


LONG, SHORT, WANDB = "plain", "plain, logged at every step", "plain, logged at every step to W&B"
STEADY = "plain, logged at every step, steady"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(LONG, LONG, length="long"),
        Arm("default", LONG, lambda: [GradFlow()], length="long"),
        Arm(STEADY, STEADY, length="steady"),
        Arm("gradients", STEADY, _gradients, length="steady"),
        Arm(SHORT, SHORT),
        Arm("every step", SHORT, _everything),
        Arm("grad_norm", SHORT, kind=LoggingNorms),
        Arm(WANDB, WANDB, to_wandb=True),
        Arm("every step, to W&B", WANDB, _everything, to_wandb=True),
        Arm("gradients, to W&B", WANDB, _gradients, to_wandb=True),
        Arm("watch gradients", WANDB, watch="gradients", to_wandb=True),
        Arm("watch all", WANDB, watch="all", to_wandb=True),
    )
}
"""All ways to train, by name; each stands behind the plain one that it is held against."""


@dataclass(frozen=True)
class Fit:
    """What one fit took.

    Args:
        wall: seconds of the call of `fit`.
        steps: seconds of each step.
        sampled: the steps that were watched.
        warm_up: steps at the beginning that are not counted.
        flush: bytes of history that a step gave to W&B for what was watched, over the steps that gave any; NaN where
            none did.
        findings: what was found, as `kind` and `cause`.
    """

    wall: float
    steps: tuple[float, ...]
    sampled: tuple[int, ...] = ()
    warm_up: int = WARM_UP["long"]
    flush: float = float("nan")
    findings: tuple[str, ...] = ()

    @property
    def mean_step(self) -> float:
        """Mean over the steps after the warm-up, sampled or not."""
        return float(np.mean(self.counted_steps))

    @property
    def counted_steps(self) -> tuple[float, ...]:
        """Seconds of the steps after the warm-up."""
        return self.steps[self.warm_up :]

    @property
    def counted(self) -> int:
        """Samples after the warm-up."""
        return sum(step >= self.warm_up for step in self.sampled)

    @property
    def own_sample(self) -> float:
        """Seconds that a sample adds to a step, by the other steps of this fit; NaN if all were sampled.

        The steps before and after a sample tell better what it costs than another fit does, minutes later.
        """
        extra, _ = self._extra()
        return float(np.median(extra)) if extra.size else float("nan")

    @property
    def own_overhead(self) -> float:
        """What the samples of this fit add to it, over as many steps without one; NaN if all were sampled."""
        extra, usual = self._extra()
        return float(np.sum(extra)) / (usual * len(self.counted_steps))

    def _extra(self) -> tuple[np.ndarray, float]:
        """(n,) what each sampled step took more than an unsampled one usually does, and what that is."""
        taken, sampled = np.array(self.steps), np.zeros(len(self.steps), dtype=bool)
        sampled[list(self.sampled)] = True
        taken, sampled = taken[self.warm_up :], sampled[self.warm_up :]
        usual = float(np.median(taken[~sampled])) if not sampled.all() else float("nan")
        return taken[sampled] - usual, usual


class Clock(L.Callback):
    """Notes when each step begins, and when the last one ends; comes before all other callbacks.

    Args:
        now: tells the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.times: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.times.append(self.now())

    def on_train_epoch_end(self, trainer, pl_module):
        self.times.append(self.now())

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of each step, with all that is done until the next one begins."""
        return tuple(np.diff(self.times).tolist())


class Stream(IterableDataset):
    """Batches without a length, so that Lightning takes `max_steps` for the plan."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@contextlib.contextmanager
def kept_quiet(folder: Path) -> Iterator[None]:
    """W&B offline and in a folder of its own; what Lightning and the callbacks say is not shown."""
    places = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
    ours = dict.fromkeys(places, str(folder / "wandb"))
    ours |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    before = {name: os.environ.get(name) for name in ours}
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    os.environ.update(ours)
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def fit(
    model: Model,
    arm: Arm,
    steps: int,
    then: Callable[[Sequence[Monitor], Path], None] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Fit:
    """Trains once.

    Args:
        model: what is trained.
        arm: how.
        steps: how many steps, more than the warm-up has.
        then: is given the monitors after the fit, and the folder, which goes away behind it.
        now: tells the time in seconds.
    """
    clock, monitors = Clock(now), arm.callbacks()
    module, batches = model.build(arm.kind), model.batches(steps)
    with tempfile.TemporaryDirectory() as name, kept_quiet(Path(name)):
        folder = Path(name)
        logger: Any = WandbLogger(project="cost", save_dir=folder) if arm.to_wandb else CSVLogger(folder)
        if arm.watch is not None:
            logger.watch(module, log=arm.watch, log_freq=1, log_graph=False)
        run = logger.experiment  # W&B takes a second to begin
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            max_steps=steps if arm.is_long else PLANNED,
            log_every_n_steps=50 if arm.is_long else 1,
            logger=logger,
            callbacks=[clock, *monitors],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DataLoader(Stream(batches), batch_size=None)
        gc.collect()
        began = now()
        trainer.fit(module, data)
        wall = now() - began
        flush = float("nan")
        if arm.to_wandb:
            run.finish()
            flush = bytes_per_flush(folder)
        if then is not None:
            then(monitors, folder)
    seen = monitors[0].history.steps.tolist() if monitors else range(0 if arm.is_plain else steps)
    found = [f"{finding.kind}: {finding.cause}" for monitor in monitors for finding in monitor.findings]
    return Fit(wall, clock.steps, tuple(seen), WARM_UP[arm.length], flush, tuple(found))


def bytes_per_flush(folder: Path) -> float:
    """Median over the rows of the one offline W&B run in a folder: its keys and values as JSON, of what was watched."""
    rows = [{key: value for key, value in row.items() if key.startswith(WATCHED)} for row in read_run(folder).history]
    sizes = [len(json.dumps(row)) for row in rows if row]
    return float(np.median(sizes)) if sizes else float("nan")


def floor(model: Model, repeats: int = 30) -> float:
    """Seconds that one read of every gradient takes, in float32, as a median."""
    module = model.build()
    inputs, targets = model.batches(1)[0]
    torch.nn.functional.cross_entropy(module(inputs).flatten(0, -2), targets.flatten()).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch._foreach_norm(gradients, 2, dtype=torch.float32)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))
