"""The cells of a picture of the run: the values of a metric over depth and time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.history import Floats, History, Ints
from lightning_gradflow.metrics import METRICS

MAX_COLUMNS = 512
MAX_ROWS = 256


@dataclass(frozen=True)
class Grid:
    """What a heatmap shows, already as small as it is drawn.

    Args:
        names: (N,) a name for each row, first layer first. Where rows were merged, the first name and how many more.
        steps: (S,) the last optimizer step of each column.
        values: (N, S); of merged cells the largest, so that an infinite value is never lost. NaN = not measured.
    """

    names: tuple[str, ...]
    steps: Ints
    values: Floats


def grid(history: History, metric: str, max_columns: int = MAX_COLUMNS, max_rows: int = MAX_ROWS) -> Grid:
    """The values of a metric over depth and time, in order of execution, at most `max_rows` x `max_columns`.

    Fractions of points that have none (the output of a linear layer is not bounded) are left out.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2", "fc3"])
        >>> for step in range(5):
        ...     history.append(Row(step, {"grad_norm": np.array([1.0, 2.0, 3.0])}))
        >>> found = grid(history, "grad_norm", max_columns=2, max_rows=2)
        >>> found.names, found.steps, found.values.shape
        (('fc1', 'fc2 (+1)'), array([1, 4]), (2, 2))
    """
    # the losses after the last sample are a row of their own, in which nothing else was measured
    sampled = np.array([metric in row.values for row in history.rows], dtype=bool)
    values, names, steps = history[metric][sampled].T, list(history.names(metric)), history.steps[sampled]
    if METRICS[metric].axis == "points" and METRICS[metric].unit == "fraction":
        measured = np.flatnonzero(~np.isnan(values).all(axis=1))
        values, names = values[measured], [names[i] for i in measured]
    if 0 in values.shape:
        return Grid((), np.empty(0, dtype=np.int64), np.empty((0, 0)))
    columns, rows = _starts(values.shape[1], max_columns), _starts(values.shape[0], max_rows)
    values = np.fmax.reduceat(np.fmax.reduceat(values, columns, axis=1), rows, axis=0)
    counts = np.diff(np.append(rows, len(names)))
    labels = [names[at] if n == 1 else f"{names[at]} (+{n - 1})" for at, n in zip(rows, counts, strict=True)]
    return Grid(tuple(labels), steps[np.append(columns[1:], len(steps)) - 1], values)


def column_after(steps: Ints, step: int) -> float:
    """The left edge of the first column that was sampled after a step, in columns.

    Example:
        >>> column_after(np.array([0, 10, 20]), 10), column_after(np.array([0, 10, 20]), 25)
        (1.5, 2.5)
    """
    return float(np.searchsorted(steps, step, side="right")) - 0.5


def _starts(n: int, most: int) -> Ints:
    """Where each of at most `most` runs of about equal length begins."""
    runs = min(n, most)
    return (np.arange(runs, dtype=np.int64) * n) // runs


def shorten(names: tuple[str, ...], width: int = 32) -> list[str]:
    """Names that fit beside a picture: the common beginning goes first, then the middle.

    Example:
        >>> shorten(("model.blocks.0.attention", "model.blocks.1.attention"), width=16)
        ['0.attention', '1.attention']
        >>> shorten(("a_very_long_layer_name",), width=10)
        ['a_ve..name']
    """
    if len(names) > 1 and max(map(len, names)) > width:
        parts = [name.split(".") for name in names]
        shared = 0
        while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
            shared += 1
        names = tuple(".".join(p[shared:]) for p in parts)
    half = (width - 2) // 2
    return [name if len(name) <= width else f"{name[:half]}..{name[-half:]}" for name in names]
