"""Trains a case once in one arm of the benchmark of cures, and keeps what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch

import lightning_gradflow
from lightning_gradflow import AutoMitigator, GradFlow, GradFlowWarning

from . import zoo
from .random_arm import RandomActor
from .runs import CASES, EVERY_N_STEPS, quiet
from .zoo import Case
from .zoo.outcomes import Losses, Outcome

TWIN = "twin"
"""The training without its fault, or a healthy one as it is, and nothing that watches it."""

ARMS: dict[str, dict[str, Any]] = {
    "none": {"mode": "suggest"},
    "random": {"mode": "suggest"},
    "clip": {"mode": "apply", "allow": ("clip",)},
    "auto": {"mode": "apply"},
}
"""Name of an arm -> arguments of its mitigator; beside that of `random` something else acts."""

_LENGTHS = ("total_steps", "T_max")  # the arguments of a schedule that say how long the run is to be


@dataclass(frozen=True)
class Deed:
    """An action: the step at which it was done, what it was, and what was decided about it."""

    step: int
    kind: str
    outcome: str


@dataclass(frozen=True)
class Course:
    """What came of one training.

    Args:
        case: name of the case.
        seed: its seed.
        arm: one of `ARMS`, or `TWIN`.
        start: loss, or score, at the start.
        end: the same at the end; infinite where the training died.
        deeds: what was done in it, in order.
        alarms: what was told in it, in order, as in `60 exploding_gradient (weight_scale)`.
        fingerprint: of all losses and of the weights at the end: the same where two trainings are, to the last bit.
        crash: the error that ended the training, or nothing.
        faults: what was told of the monitor itself, such as a part that was switched off.
        seconds: time of the training.
    """

    case: str
    seed: int
    arm: str
    start: float
    end: float
    deeds: tuple[Deed, ...] = ()
    alarms: tuple[str, ...] = ()
    fingerprint: str = ""
    crash: str = ""
    faults: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ends(self) -> Outcome:
        """As the zoo judges it."""
        return Outcome(self.start, self.end, self.seconds)


def budgeted(case: Case, budget: float) -> Case:
    """The case with `budget` times its steps, and epochs where it counts those."""
    kwargs = {
        name: round(budget * value) if name == "max_epochs" else value for name, value in case.trainer_kwargs.items()
    }
    return replace(case, max_steps=round(budget * case.max_steps), trainer_kwargs=kwargs)


def stretched(module: L.LightningModule, budget: float) -> L.LightningModule:
    """The module with a schedule as long as its run, where the schedule was written for the length of it."""
    schedule: Any = getattr(module, "schedule", None)
    if isinstance(schedule, partial):
        lengths = {name: round(budget * schedule.keywords[name]) for name in _LENGTHS if name in schedule.keywords}
        module.schedule = partial(schedule, **lengths)
    return module


def train(name: str, seed: int, arm: str, budget: float) -> Course:
    """Trains a case in one arm to its end, or until it dies."""
    case = budgeted(_followed(CASES[name], arm), budget)
    losses = Losses()
    watching: list[L.Callback] = []
    flow = actor = None
    if arm != TWIN:
        flow = GradFlow(EVERY_N_STEPS, mitigator=AutoMitigator(**ARMS[arm]), report=False, console=False)
        watching.append(flow)
    if flow is not None and arm == "random":
        actor = RandomActor(flow, f"{name}-{seed}")
        watching.append(actor)
    own = [*case.trainer_kwargs.get("callbacks", ()), *watching, losses]
    module: L.LightningModule | None = None
    crash = ""
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always")
        try:
            module = case.fit(seed, build=lambda s: stretched(case.build(s), budget), callbacks=own)
        except Exception as error:  # a training may die of its fault, or of a remedy
            crash = f"{type(error).__name__}: {error}"
    start, end = _ends(case, seed, module, losses.values)
    return Course(
        name,
        seed,
        arm,
        start,
        end,
        deeds=_deeds(flow, actor),
        alarms=tuple(f"{f.step} {f.kind} ({f.cause})" for f in flow.findings if f.severity.is_alarm) if flow else (),
        fingerprint=_fingerprint(module, losses.values),
        crash=crash,
        faults=tuple(str(w.message) for w in caught if w.category is GradFlowWarning),
        seconds=round(time.perf_counter() - began, 2),
    )


def _deeds(flow: GradFlow | None, actor: RandomActor | None) -> tuple[Deed, ...]:
    if actor is not None:
        return tuple(Deed(step, kind, "applied") for step, kind in actor.done)
    return tuple(Deed(action.step, action.kind, action.outcome) for action in flow.actions) if flow is not None else ()


def _followed(case: Case, arm: str) -> Case:
    return case.without_fault if arm == TWIN and case.twin is not None else case


def _ends(case: Case, seed: int, module: L.LightningModule | None, losses: list[float]) -> tuple[float, float]:
    """As in `zoo.outcomes`: a mean over 3 batches at the start and 20 at the end, or the score."""
    if case.score is not None:
        start = case.score(case.build(seed))
        return start, case.score(module) if module is not None else math.inf
    start = fmean(losses[:3]) if losses else math.nan
    return start, fmean(losses[-20:]) if module is not None and losses else math.inf


def _fingerprint(module: L.LightningModule | None, losses: list[float]) -> str:
    digest = hashlib.sha256(repr(losses).encode())
    for name, value in module.state_dict().items() if module is not None else ():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- what was trained before is not trained again -----------------------------------------------------------------


def sources(arm: str) -> str:
    """Of all that a training in an arm depends on.

    Without a remedy a training is the same with the package as without it, so a change there leaves those arms alone.
    """
    folders = [Path(zoo.__file__).parent]
    files = []
    if arm not in (TWIN, "none"):
        folders.append(Path(lightning_gradflow.__file__).parent)
        files += [Path(__file__), Path(__file__).with_name("random_arm.py")]
    files += sorted(file for folder in folders for file in folder.rglob("*.py"))
    return _hash(file.read_bytes() for file in files) + torch.__version__


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Shelf:
    """A folder of trainings; one that was made from other sources does not count."""

    folder: Path
    versions: dict[str, str]

    def kept(self, name: str, seed: int, arm: str, budget: float) -> Course | None:
        """The training, if there is one."""
        file = self._file(name, seed, arm, budget)
        if not file.exists():
            return None
        state = json.loads(file.read_text(encoding="utf-8"))
        if state.pop("version") != self.versions[arm]:
            return None
        deeds = tuple(Deed(**deed) for deed in state.pop("deeds"))
        return Course(**{**state, "deeds": deeds, **{name: tuple(state[name]) for name in ("alarms", "faults")}})

    def keep(self, course: Course, budget: float) -> None:
        """Keeps a training for later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {**asdict(course), "version": self.versions[course.arm]}
        file = self._file(course.case, course.seed, course.arm, budget)
        file.write_text(json.dumps(state), encoding="utf-8")

    def _file(self, name: str, seed: int, arm: str, budget: float) -> Path:
        return self.folder / f"{name}-{seed}-{arm}-{budget:g}.json"


def course(job: tuple[str, int, str, float], shelf: Shelf) -> Course:
    """One training in a process of its own, from the shelf or made now."""
    found = shelf.kept(*job)
    if found is None:
        found = train(*job)
        shelf.keep(found, job[-1])
    return found
