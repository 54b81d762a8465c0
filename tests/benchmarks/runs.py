"""Trains a case once, watched by `GradFlow` and by what the published rules need, and judges a recorded run anew."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_gradflow import GradFlow, GradFlowWarning
from lightning_gradflow.border import Border
from lightning_gradflow.callbacks.why import Why, is_able
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History
from lightning_gradflow.recorder import Recorder

from .alarms import Alarm
from .record import Record, Watcher
from .zoo import HEALTHY, SICK, Case

EVERY_N_STEPS = 10
"""Steps between two samples of ours."""

CASES: dict[str, Case] = {**SICK, **HEALTHY}


@dataclass(frozen=True)
class Run:
    """One training of a case, as it was recorded.

    Args:
        case: name of the case.
        seed: its seed.
        findings: what `GradFlow` found, in order, without suggestions.
        told: the step at which each of them was told, which may be after the sample that it was found in.
        history: the state of the history.
        record: what the published rules look at.
        explains: whether a plateau of this training waits until the loss line has been measured.
        crash: the error that ended the training, or nothing.
        faults: what was told of the monitor itself, such as a part that was switched off.
        seconds: time of the training, with all that watched it.
    """

    case: str
    seed: int
    findings: tuple[Finding, ...]
    told: tuple[int, ...]
    history: Mapping[str, Any]
    record: Record
    explains: bool = False
    crash: str = ""
    faults: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Steps that were made."""
        return len(self.record)

    @property
    def alarms(self) -> list[Alarm]:
        """What people were warned of."""
        told = zip(self.findings, self.told, strict=True)
        return [Alarm(step, frozenset({f.kind.value}), f.layers, f.cause) for f, step in told if f.severity.is_alarm]


class _Clock(L.Callback):
    """Notes at which step each finding was told; stands after `GradFlow` among the callbacks."""

    def __init__(self, flow: GradFlow) -> None:
        self.told: list[int] = []
        self.explains = False
        self._flow = flow
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.explains = is_able(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.note()

    def note(self) -> None:
        """All that is new was told just now."""
        self.told += [self._step] * (len(self._flow.findings) - len(self.told))


def train(name: str, seed: int) -> Run:
    """Trains a case to its end, or until it dies."""
    case = CASES[name]
    flow = GradFlow(every_n_steps=EVERY_N_STEPS, report=False, console=False)
    clock, watcher = _Clock(flow), Watcher()
    crash = ""
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always")
        try:
            case.fit(seed, callbacks=[*case.trainer_kwargs.get("callbacks", ()), flow, clock, watcher])
        except Exception as error:  # a training may die of its fault; what was told before counts
            crash = f"{type(error).__name__}: {error}"
    clock.note()
    return Run(
        case=name,
        seed=seed,
        findings=tuple(replace(finding, suggestions=()) for finding in flow.findings),
        told=tuple(clock.told),
        history=flow.history.state_dict(),
        record=watcher.record,
        explains=clock.explains,
        crash=crash,
        faults=tuple(str(w.message) for w in caught if w.category is GradFlowWarning),
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def quiet() -> Any:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@cache
def default_detectors() -> tuple[Detector, ...]:
    """The detectors of a `GradFlow` with its default arguments, in their order."""
    found: list[Detector] = []
    for part in GradFlow().parts():
        found += [detector for detector in part.detectors(False) if detector not in found]
    return tuple(found)


def replay(state: Mapping[str, Any], detectors: Sequence[Detector], *, explains: bool = False) -> tuple[Finding, ...]:
    """What `detectors` find in a recorded run, row by row as in the training itself.

    Two things differ from a training with these detectors. A layer or point that ran late has its column, of NaN, from
    the first row on. And the loss line was measured at the plateau that was found then, not at one that is found now.

    Args:
        state: the history of the run.
        detectors: judge it.
        explains: as in `Run`.
    """
    whole = History()
    whole.load_state_dict(state)
    border = Border()
    recorder = Recorder(detectors, border, suggest=False)
    recorder.tells = False
    axes = {part: state[part] for part in ("layers", "points", "point_order", "features")}
    recorder.history.load_state_dict({**History().state_dict(), **axes})
    why = Why(recorder.history, border, is_able=explains)
    recorder.holds = why.asks
    for row in whole.rows:
        if "loss_line" in row.scalars:
            why.drop()
        recorder.add(row, row.step)
    if whole.rows:
        last = whole.rows[-1].step
        rest = whole.losses[whole.loss_steps > last]
        recorder.close(last + len(rest), rest, float("nan"), float("nan"))
    return recorder.findings


def rejudged(run: Run, detectors: Sequence[Detector]) -> Run:
    """The run with what `detectors` find in it; a finding counts as told at the sample that it was found in."""
    findings = replay(run.history, detectors, explains=run.explains)
    return replace(run, findings=findings, told=tuple(finding.step for finding in findings))


def save(run: Run, folder: Path) -> None:
    """Keeps a run for later."""
    folder.mkdir(parents=True, exist_ok=True)
    with _file(run.case, run.seed, folder).open("wb") as file:
        pickle.dump(run, file)


def is_kept(name: str, seed: int, folder: Path) -> bool:
    """Whether `save` kept the run."""
    return _file(name, seed, folder).exists()


def load(name: str, seed: int, folder: Path) -> Run:
    """A run that `save` kept."""
    with _file(name, seed, folder).open("rb") as file:
        run: Run = pickle.load(file)
    return run


def _file(name: str, seed: int, folder: Path) -> Path:
    return folder / f"{name}-{seed}.pickle"


def prepare_process() -> None:
    """Small tensors: threads would only get in each other's way."""
    torch.set_num_threads(1)
