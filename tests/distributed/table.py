"""How far the numbers of several ranks are from plain autograd in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launcher import launch
from .reference import Numbers, reference
from .runs import CROSSED, REPLICATED, RUNS, SHARDED

PROGRAM = "tests.distributed.program"

_LAYERS = ("grad_norm", "grad_rms", "grad_mean_abs", "grad_max_abs", "grad_zero_fraction", "grad_nonfinite_fraction")
_WEIGHTS = ("weight_norm", "update_norm", "update_ratio")
_POINTS = ("delta_norm", "call_delta", "output_rms", "output_spread", "in_graph", "saturated_fraction", "dead_fraction")
_SCALARS = ("loss", "grad_norm_total", "clip_factor")
QUANTITIES = (*_LAYERS, *_WEIGHTS, *_POINTS, "input_rms", *_SCALARS)
"""What is compared; `call_delta` stands for `history.calls(...)`."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        mode: The run.
        quantity: What was measured.
        reference: What it was compared with.
        error: Largest relative error over all steps and names; infinite where one side lacks a value.
        bar: What is allowed.
    """

    mode: str
    quantity: str
    reference: str
    error: float
    bar: float

    @property
    def holds(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.bar


def lines(mode: str, answer: Mapping[str, Any], folder: Path) -> list[Line]:
    """A line for each quantity of one run, out of the answer of rank 0 and the weights that it left in the folder."""
    run = RUNS[mode]
    expected = reference(run, torch.load(folder / f"{mode}.pt", weights_only=True))
    found = measured(answer)
    errors = {quantity: error(quantity, found, expected) for quantity in QUANTITIES}
    return [
        Line(mode, quantity, _source(quantity, run.replicas), errors[quantity], run.bar)
        for quantity in QUANTITIES
        if any(numbers.get(quantity) for numbers in [*expected, *found])
    ]


def measured(answer: Mapping[str, Any]) -> list[Numbers]:
    """What a run measured at each step, in the form of the reference; what was not measured is left out."""
    steps: list[Numbers] = [{} for _ in answer["steps"]]
    for quantity, table in answer["metrics"].items():
        _put(steps, quantity, table["rows"], table["names"])
    for point, rows in answer["calls"].items():
        _put(steps, "call_delta", rows, [f"{point} {call}" for call in range(len(rows[0]))])
    for name, values in answer["scalars"].items():
        _put(steps, name, [[value] for value in values], [""])
    return steps


def _put(steps: list[Numbers], quantity: str, rows: list[list[float]], names: list[str]) -> None:
    for numbers, row in zip(steps, rows, strict=True):
        known = {name: value for name, value in zip(names, row, strict=True) if not math.isnan(value)}
        numbers.setdefault(quantity, {}).update(known)


def error(quantity: str, found: list[Numbers], expected: list[Numbers]) -> float:
    """The largest relative error of a quantity; infinite where a step or a name is missing or too many."""
    if len(found) != len(expected):
        return math.inf
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        values, truth = mine.get(quantity, {}), theirs.get(quantity, {})
        if set(values) != set(truth):
            return math.inf
        worst = max([worst, *(_relative(values[name], truth[name]) for name in truth)])
    return worst


def _relative(value: float, truth: float) -> float:
    if value == truth:
        return 0.0
    return abs(value - truth) / abs(truth) if truth else math.inf


def _source(quantity: str, replicas: int) -> str:
    if quantity in _WEIGHTS:
        return "whole weights before and after the step"
    return "autograd in one process" + (", with all batches" if replicas > 1 else "")


def rows(folder: Path) -> list[Line]:
    """Trains all runs and compares them."""
    table = []
    for group, runs in (("replicated", REPLICATED), ("spread", SHARDED), ("crossed", CROSSED)):
        answer = launch(PROGRAM, group, str(folder), ranks=max(run.ranks for run in runs.values()))[0]
        for mode in runs:
            table += lines(mode, answer[mode], folder)
    return table


def markdown(table: list[Line]) -> str:
    """The table as people read it."""
    head = ["| mode | quantity | reference | largest relative error | bar | |", "|---|---|---|---|---|---|"]
    body = [
        f"| {line.mode} | `{line.quantity}` | {line.reference} | {line.error:.1e} | {line.bar:.0e} | "
        f"{'' if line.holds else 'missed'} |"
        for line in table
    ]
    return "\n".join([*head, *body])
