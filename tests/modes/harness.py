"""Runs a mode under the monitor and compares every number of its history with the reference."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_gradflow import FindingKind, GradFlow
from lightning_gradflow.history import History
from tests.benchmarks.zoo import quiet_trainer

from .modes import MODES, Mode
from .steps import CALLS, INPUT, PER_LAYER, PER_POINT, QUANTITIES, SCALARS, Numbers, Weights, numbers

FLOOR = 1e-3  # of the largest value of a row: what is smaller is measured against this
Rows = list[tuple[int, dict[str, float]]]  # step, and name of the layer, the point or the call -> value
EXPLOSIONS = (FindingKind.EXPLODING_GRADIENT, FindingKind.NONFINITE_GRADIENT)  # no mode has one


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        error: the largest relative error over steps and layers (or points); NaN where the quantity is missing in both,
            as it should be; inf where it is missing in one of them.
        worst: where that is, for people.
    """

    mode: str
    quantity: str
    reference: str
    error: float
    bar: float
    worst: str

    @property
    def holds(self) -> bool:
        return math.isnan(self.error) or self.error <= self.bar


@cache
def lines(name: str) -> tuple[Line, ...]:
    """All lines of a mode."""
    mode, run = MODES[name], _run(name)
    compared = {q: (mode.versus, *_compare(expected(name, q), _measured(run.history, q))) for q in QUANTITIES}
    compared["explosions found"] = ("none", *_compare_counts(0, run.explosions))
    if mode.compiled:
        alone = _fit(mode, monitored=False).graphs
        compared["compiled graphs"] = ("the run without the monitor", *_compare_counts(alone, run.graphs))
    return tuple(
        Line(name, quantity, versus, error, mode.bars.get(quantity, mode.bar), worst)
        for quantity, (versus, error, worst) in compared.items()
    )


def expected(name: str, quantity: str) -> Rows:
    """What should stand in the history of a mode."""
    return [(step, _present(row.get(quantity, {}))) for step, row in _expected(name)]


@cache
def _expected(name: str) -> list[tuple[int, Numbers]]:
    mode = MODES[name]
    weights = {parameter: weight.clone() for parameter, weight in _run(name).weights.items()}
    steps = mode.reference(weights, [mode.batches() for _ in range(mode.epochs)])
    return numbers(steps, lambda step: _is_sampled(step, mode.every_n_steps))


@dataclass(frozen=True)
class _Run:
    """What is left of a run."""

    history: History
    explosions: int
    graphs: int
    weights: Weights  # the initial ones


class _Initial(L.Callback):
    """Keeps the weights that the training starts from."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@cache
def _run(name: str) -> _Run:
    return _fit(MODES[name], monitored=True)


def _fit(mode: Mode, *, monitored: bool) -> _Run:
    flow = GradFlow(every_n_steps=mode.every_n_steps, report=False, console=False, mitigate="off")
    initial = _Initial()
    L.seed_everything(1, verbose=False)
    if mode.compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the monitor finds, and what torch has to say about odd ways of training
        module = mode.wrap(mode.module())
        callbacks = [initial, flow] if monitored else [initial]
        trainer = quiet_trainer(max_epochs=mode.epochs, callbacks=callbacks, **mode.trainer())
        trainer.fit(module, DataLoader(mode.batches(), batch_size=None))
    explosions = sum(finding.kind in EXPLOSIONS for finding in flow.findings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if mode.compiled else 0
    return _Run(flow.history, explosions, graphs, initial.weights)


def _is_sampled(step: int, interval: int) -> bool:
    return step & (step - 1) == 0 if step < interval else step % interval == 0


def _present(row: Mapping[str, float]) -> dict[str, float]:
    """Without what is missing, and without the prefix that a compiled module gives its parts."""
    return {name.replace("_orig_mod.", ""): float(v) for name, v in row.items() if not math.isnan(v)}


def _measured(history: History, quantity: str) -> Rows:
    if quantity in SCALARS:
        rows = [{"": value} for value in history.scalar(quantity)]
    elif quantity == CALLS:
        rows = [{} for _ in history.steps]
        for point in history.points:
            for row, values in zip(rows, history.calls(point.name), strict=True):
                row.update({f"{point.name}[{nth}]": value for nth, value in enumerate(values)})
    else:
        assert quantity in (*PER_LAYER, *PER_POINT, INPUT)
        rows = [dict(zip(history.names(quantity), row, strict=True)) for row in history[quantity]]
    return [(int(step), _present(row)) for step, row in zip(history.steps, rows, strict=True)]


def _compare(reference: Rows, measured: Rows) -> tuple[float, str]:
    """The largest relative error of all rows, and where it is.

    An error is relative to the value itself, or to a thousandth of the largest value of its row (all layers of one
    quantity at one step) where that is more: an entry near zero is a sum of rounding errors.
    """
    steps, found = [step for step, _ in reference], [step for step, _ in measured]
    if steps != found:
        return math.inf, f"rows of steps {found}, not {steps}"
    if not any(row for _, row in (*reference, *measured)):
        return math.nan, "missing in both"
    worst = (0.0, "")
    for (step, wanted), (_, row) in zip(reference, measured, strict=True):
        if wanted.keys() != row.keys():
            without, strange = sorted(wanted.keys() - row.keys()), sorted(row.keys() - wanted.keys())
            return math.inf, f"step {step}: missing {without}, should be missing {strange}"
        largest = max((abs(v) for v in wanted.values() if math.isfinite(v)), default=0.0)
        for name, value in wanted.items():
            error = _relative(row[name], value, FLOOR * largest)
            worst = max(worst, (error, f"step {step} {name}: {row[name]:.6g}, not {value:.6g}"))
    return worst


def _compare_counts(wanted: int, found: int) -> tuple[float, str]:
    return _compare([(0, {"": float(wanted)})], [(0, {"": float(found)})])


def _relative(measured: float, value: float, floor: float) -> float:
    if measured == value:
        return 0.0
    if not (math.isfinite(value) and math.isfinite(measured) and max(abs(value), floor) > 0):
        return math.inf
    return abs(measured - value) / max(abs(value), floor)
