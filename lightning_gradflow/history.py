"""Rows of measurements and the bounded history they make."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_gradflow.metrics import HISTOGRAM_BINS, METRICS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Name = TypeVar("Name", bound=Hashable)

MAX_CALLS = 64
"""Calls of a point that a row keeps: of a longer loop as many, evenly spread, the first and the last among them."""


@dataclass(frozen=True)
class Point:
    """A place of the network where the signal is measured.

    Args:
        name: unique among the points.
        module: the module to name to people, as in `named_modules()`: the layer, the activation module, or for a
            functional activation the layer that it follows.
        op: the activation, such as `sigmoid`; empty for the output of a layer.
    """

    name: str
    module: str
    op: str = ""

    @property
    def is_layer(self) -> bool:
        """Whether it is the output of a module that owns parameters."""
        return not self.op


@dataclass(frozen=True)
class Row:
    """One sampled optimizer step, frozen. NaN = not measured here; inf = measured and not finite.

    Args:
        step: the optimizer step, from 0.
        values: metric name -> (L,), (P,) or (F,) float64, by the identity of the layer, point or feature (see `Axis`).
        scalars: such as `loss`, `lr`, `grad_norm_total`, `epoch`.
        histograms: histogram name -> (HISTOGRAM_BINS + 2,) counts.
        losses: training loss of each step since the row before, oldest first; (n,) with n >= 0.
        calls: name of a point that ran more than once in a forward pass -> (K,) delta norm of each call, in order of
            execution, K at most 64.
    """

    step: int
    values: Mapping[str, Floats] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Ints] = field(default_factory=dict)
    losses: Floats = field(default_factory=lambda: np.empty(0))
    calls: Mapping[str, Floats] = field(default_factory=dict)


class Axis(Generic[Name]):
    """Names that only grow in number and keep their identity (0, 1, 2, ...), with a separate order to show them in.

    A branch of the network that runs for the first time late gets the next identity, and stands in the order after
    the name that was executed before it.

    Example:
        >>> axis = Axis(["a", "c"])
        >>> axis.merge(["a", "b", "c"])
        >>> axis.names, axis.identity("b")
        (('a', 'b', 'c'), 2)
    """

    def __init__(self, names: Iterable[Name] = ()) -> None:
        self._identity: dict[Name, int] = {}
        self._order: list[Name] = []
        self.merge(list(names))

    def __len__(self) -> int:
        return len(self._order)

    @property
    def names(self) -> tuple[Name, ...]:
        """The names in order."""
        return tuple(self._order)

    @property
    def order(self) -> Ints:
        """(N,) identity of each name, in order."""
        return np.array([self._identity[name] for name in self._order], dtype=np.int64)

    def identity(self, name: Name) -> int:
        """The fixed number of a name."""
        return self._identity[name]

    def merge(self, sequence: Sequence[Name]) -> None:
        """Takes in the names of `sequence` that are new, each after the one that precedes it there."""
        before: Name | None = None
        for name in sequence:
            if name not in self._identity:
                self._identity[name] = len(self._identity)
                at = self._order.index(before) + 1 if before is not None else 0
                self._order.insert(at, name)
            before = name

    def reorder(self, sequence: Sequence[Name]) -> None:
        """Shows the names in the order of `sequence`, which must hold each of them once; identities stay."""
        if len(sequence) != len(self._order) or set(sequence) != set(self._order):
            raise ValueError("sequence must hold each name of the axis once")
        self._order = list(sequence)


class History:
    """Every recent row, and old ones thinned: a run of a million steps costs the memory of a run of a thousand.

    Args:
        max_rows: rows kept, in [8, inf). The last half of them are the most recent rows without a gap; the older ones
            are spread evenly over the run. The default of 1024 holds 50,000 steps at the usual interval of 50 before
            anything is thinned.

    Raises:
        ValueError: if `max_rows` is below 8.

    Example:
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.append(Row(step=0, values={"grad_norm": np.array([0.1, 0.2])}, scalars={"loss": 2.3}))
        >>> history["grad_norm"].shape, history.layers, history.scalar("loss")
        ((1, 2), ('fc1', 'fc2'), array([2.3]))
    """

    def __init__(self, max_rows: int = 1024) -> None:
        if max_rows < 8:
            raise ValueError(f"max_rows must be in [8, inf), got {max_rows!r}")
        self._max_rows = max_rows
        self._rows: list[Row] = []
        self.layer_axis: Axis[str] = Axis()
        self.point_axis: Axis[str] = Axis()
        self.feature_axis: Axis[str] = Axis()
        self._points: dict[str, Point] = {}
        self._losses: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are kept, oldest first."""
        return tuple(self._rows)

    @property
    def steps(self) -> Ints:
        """(R,) optimizer step of each row."""
        return np.array([row.step for row in self._rows], dtype=np.int64)

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules that own parameters, in order of execution; those that never ran stand after their parent or last."""
        return self.layer_axis.names

    @property
    def points(self) -> tuple[Point, ...]:
        """Layer outputs and activations, in order of execution."""
        return tuple(self._points[name] for name in self.point_axis.names)

    def names(self, metric: str) -> tuple[str, ...]:
        """The names of the columns of `self[metric]`: layers, points or features, whichever the metric has."""
        return self._axis(metric).names

    def __getitem__(self, metric: str) -> Floats:
        """(R, L), (R, P) or (R, F) values of a metric; NaN where it was not measured.

        Columns stand in order of execution, features in the order of the input.
        """
        axis = self._axis(metric)
        table = np.full((len(self._rows), len(axis)), np.nan)
        for i, row in enumerate(self._rows):
            values = row.values.get(metric)
            if values is not None:
                table[i, : len(values)] = values
        return table[:, axis.order]

    def calls(self, point: str) -> Floats:
        """(R, K) delta norm of each call of a point, in order of execution; NaN where there was no such call.

        It is the time axis of a cell in a loop, and tells the uses of a shared layer apart. A point that ran once has
        none (K = 0). Of a loop of more than 64 turns, which `self["calls"]` tells, 64 are kept, evenly spread.
        """
        kept = [row.calls.get(point, np.empty(0)) for row in self._rows]
        table = np.full((len(kept), max((len(calls) for calls in kept), default=0)), np.nan)
        for i, calls in enumerate(kept):
            table[i, : len(calls)] = calls
        return table

    def scalar(self, name: str) -> Floats:
        """(R,) values of a scalar; NaN where a row has none."""
        return np.array([row.scalars.get(name, np.nan) for row in self._rows], dtype=np.float64)

    def histogram(self, name: str) -> Ints:
        """(R, HISTOGRAM_BINS + 2) counts: exponent bins, exact zeros, non-finite entries; zeros if a row has none."""
        empty = np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
        return np.array([row.histograms.get(name, empty) for row in self._rows]).reshape(-1, HISTOGRAM_BINS + 2)

    @property
    def loss_steps(self) -> Floats:
        """(S,) step at the middle of each entry of `losses`."""
        return np.array([step for step, _, _ in self._losses], dtype=np.float64)

    @property
    def losses(self) -> Floats:
        """(S,) training loss: step by step at the start of the run and where it is recent, as means between the two."""
        return np.array([loss for _, loss, _ in self._losses], dtype=np.float64)

    def add_points(self, sequence: Sequence[Point]) -> None:
        """Takes in the points of one forward pass, in order of execution."""
        for point in sequence:
            self._points.setdefault(point.name, point)
        self.point_axis.merge([point.name for point in sequence])

    def add_features(self, number: int) -> None:
        """Takes in the features of an input, named "0", "1", ...; one with more of them makes the axis longer."""
        self.feature_axis.merge([str(i) for i in range(number)])

    def append(self, row: Row) -> None:
        """Adds the newest row.

        Raises:
            ValueError: if a metric is unknown or has more values than names, or the step is not above the last one.
        """
        unknown = sorted(set(row.values) - set(METRICS))
        if unknown:
            raise ValueError(f"values must be keyed by metrics in {sorted(METRICS)}, got {unknown}")
        if self._rows and row.step <= self._rows[-1].step:
            raise ValueError(f"step must be above {self._rows[-1].step}, got {row.step}")
        for metric, values in row.values.items():
            if len(values) > len(self._axis(metric)):
                raise ValueError(f"{metric} must have at most {len(self._axis(metric))} values, got {len(values)}")
        self._rows.append(row)
        if len(self._rows) > self._max_rows:
            recent = len(self._rows) - self._max_rows // 2
            self._rows = [*_thin_rows(self._rows[:recent], self._max_rows // 4), *self._rows[recent:]]
        self._add_losses(row.step, row.losses)

    def close(self, step: int, losses: Floats, val_loss: float = math.nan) -> None:
        """Takes what came after the newest row and was not sampled: it makes no row of its own.

        Args:
            step: the last step.
            losses: (n,) training loss of each step since the newest row, oldest first.
            val_loss: the last validation loss, or NaN where none came.
        """
        self._add_losses(step, losses)
        if self._rows and not math.isnan(val_loss):
            newest = self._rows[-1]
            self._rows[-1] = replace(newest, scalars={**newest.scalars, "val_loss": val_loss})

    def _add_losses(self, step: int, losses: Floats) -> None:
        n = len(losses)
        self._losses += [[step - n + 1 + i, float(loss), 1.0] for i, loss in enumerate(losses)]
        if len(self._losses) > 8 * self._max_rows:
            first, recent = self._max_rows // 4, len(self._losses) - 4 * self._max_rows
            old = _thin_losses(self._losses[first:recent], 2 * self._max_rows)
            self._losses = [*self._losses[:first], *old, *self._losses[recent:]]

    def _axis(self, metric: str) -> Axis[str]:
        if metric not in METRICS:
            hint = " (a scalar: history.scalar)" if any(metric in row.scalars for row in self._rows) else ""
            raise KeyError(f"metric must be one of {sorted(METRICS)}, got {metric!r}{hint}")
        axes = {"layers": self.layer_axis, "points": self.point_axis, "features": self.feature_axis}
        return axes[METRICS[metric].axis]

    def state_dict(self) -> dict[str, Any]:
        """The history as arrays, lists, strings and numbers."""
        return {
            "layers": [self.layer_axis.names, self.layer_axis.order.tolist()],
            "points": [[p.name, p.module, p.op] for p in self._points.values()],
            "point_order": list(self.point_axis.names),
            "features": len(self.feature_axis),
            "losses": [list(entry) for entry in self._losses],
            "rows": [
                {
                    "step": row.step,
                    "values": dict(row.values),
                    "scalars": dict(row.scalars),
                    "histograms": dict(row.histograms),
                    "losses": row.losses,
                    "calls": dict(row.calls),
                }
                for row in self._rows
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        names, order = state["layers"]
        self.layer_axis = Axis([name for _, name in sorted(zip(order, names, strict=True))])
        self.layer_axis.reorder(list(names))
        self._points = {name: Point(name, module, op) for name, module, op in state["points"]}
        self.point_axis = Axis(list(self._points))
        self.point_axis.reorder(list(state["point_order"]))
        self.feature_axis = Axis()
        self.add_features(state.get("features", 0))
        self._losses = [list(entry) for entry in state["losses"]]
        self._rows = [
            Row(
                step=row["step"],
                values={name: np.asarray(values, dtype=np.float64) for name, values in row["values"].items()},
                scalars=dict(row["scalars"]),
                histograms={name: np.asarray(counts, dtype=np.int64) for name, counts in row["histograms"].items()},
                losses=np.asarray(row["losses"], dtype=np.float64),
                calls={name: np.asarray(calls, dtype=np.float64) for name, calls in row["calls"].items()},
            )
            for row in state["rows"]
        ]


def _thin_rows(rows: list[Row], limit: int) -> list[Row]:
    """The first row and at most `limit` others, evenly spread over the steps."""
    gap = (rows[-1].step - rows[0].step) / limit
    kept = rows[:1]
    for row in rows[1:]:
        if row.step >= kept[-1].step + gap:
            kept.append(row)
    return kept


def _thin_losses(entries: list[list[float]], limit: int) -> list[list[float]]:
    """Merges neighbours to at most `limit` + 1 means over about equal numbers of steps.

    A loss that is not finite does not take its neighbours along: of such a pair the other one is kept.
    """
    target = sum(n for _, _, n in entries) / limit
    merged = [list(entries[0])]
    for step, loss, n in entries[1:]:
        last_step, last_loss, last_n = merged[-1]
        if last_n >= target:
            merged.append([step, loss, n])
        elif math.isfinite(loss) and math.isfinite(last_loss):
            total = last_n + n
            merged[-1] = [(last_step * last_n + step * n) / total, (last_loss * last_n + loss * n) / total, total]
        elif math.isfinite(loss):
            merged[-1] = [step, loss, n]
    return merged
