"""The bounded history that rows make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_gradflow.history.axis import Axis
from lightning_gradflow.history.facts import Facts
from lightning_gradflow.history.losses import LossTrace
from lightning_gradflow.history.rows import Floats, Ints, Point, Row
from lightning_gradflow.history.tables import Grown, Tables, pack, unpack
from lightning_gradflow.metrics import HISTOGRAM_BINS, METRICS, SCALARS


class History:
    """Every recent row, and old ones thinned: a run of a million steps costs the memory of a run of a thousand.

    The arrays it gives are read-only, and do not change when rows are added later.

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
        self.layer_axis: Axis[str] = Axis()
        self.point_axis: Axis[str] = Axis()
        self.feature_axis: Axis[str] = Axis()
        self._points: dict[str, Point] = {}
        self._losses = LossTrace(max_rows)
        self._facts = Facts()
        self._versions: tuple[int, ...] = ()
        self._set([], Tables())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are kept, oldest first."""
        return self.facts.of_now("rows", lambda: tuple(self._rows))

    @property
    def steps(self) -> Ints:
        """(R,) optimizer step of each row."""
        return self._steps.rows

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules that own parameters, in order of execution; those that never ran stand after their parent or last."""
        return self.layer_axis.names

    @property
    def points(self) -> tuple[Point, ...]:
        """Layer outputs and activations, in order of execution."""
        return self.facts.of_names("points", lambda: tuple(self._points[name] for name in self.point_axis.names))

    def names(self, metric: str) -> tuple[str, ...]:
        """The names of the columns of `self[metric]`: layers, points or features, whichever the metric has."""
        return self._axis(metric).names

    def __getitem__(self, metric: str) -> Floats:
        """(R, L), (R, P) or (R, F) values of a metric; NaN where it was not measured.

        Columns stand in order of execution, features in the order of the input.
        """
        axis = self._axis(metric)
        return self.facts.of_now(("table", metric), lambda: self._tables.in_order(metric, axis.order, axis.version))

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
        """(R,) values of a scalar; NaN where a row has none.

        Raises:
            KeyError: if it is none of `lightning_gradflow.metrics.SCALARS`, and no row has it.
        """
        if name not in self._scalars:
            if name not in SCALARS and not any(name in row.scalars for row in self._rows):
                hint = " (a metric: history[name])" if name in METRICS else ""
                raise KeyError(f"scalar must be one of {sorted(SCALARS)}, got {name!r}{hint}")
            self._scalars[name] = Grown(np.array([row.scalars.get(name, np.nan) for row in self._rows], np.float64))
        return self._scalars[name].rows

    @property
    def input_layer(self) -> str | None:
        """The layer that the measured inputs go into, by the newest row that tells."""
        return self._layer_told("input_layer")

    @property
    def dropped_at(self) -> str | None:
        """The first layer whose output dropout has a part in, by the newest row that tells; None without dropout."""
        return self._layer_told("dropped_at")

    def _layer_told(self, scalar: str) -> str | None:
        told = self.scalar(scalar)
        told = told[~np.isnan(told)]
        if not told.size:
            return None
        names: dict[int, str] = dict(zip(self.layer_axis.order.tolist(), self.layers, strict=True))
        return names[int(told[-1])]

    def histogram(self, name: str) -> Ints:
        """(R, HISTOGRAM_BINS + 2) counts: exponent bins, exact zeros, non-finite entries; zeros if a row has none."""
        empty = np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
        return np.array([row.histograms.get(name, empty) for row in self._rows]).reshape(-1, HISTOGRAM_BINS + 2)

    @property
    def loss_steps(self) -> Floats:
        """(S,) step at the middle of each entry of `losses`."""
        return self._losses.steps

    @property
    def losses(self) -> Floats:
        """(S,) training loss: step by step at the start of the run and where it is recent, as means between the two."""
        return self._losses.losses

    @property
    def facts(self) -> Facts:
        """What was found out about the history as it is, so that it is not asked again at each row."""
        versions = (self.layer_axis.version, self.point_axis.version, self.feature_axis.version)
        if versions != self._versions:
            self._versions, self._facts = versions, Facts()
        return self._facts

    def share_names(self, other: History) -> None:
        """Takes over the axes of another history, whose names are its own or came after them: new ones come to both."""
        self.layer_axis, self.point_axis, self.feature_axis = other.layer_axis, other.point_axis, other.feature_axis
        self._points = other._points

    def add_points(self, sequence: Sequence[Point]) -> None:
        """Takes in the points of one forward pass, in order of execution."""
        for point in sequence:
            self._points.setdefault(point.name, point)
        self.point_axis.merge([point.name for point in sequence])

    def add_features(self, number: int) -> None:
        """Takes in the features of an input, named "0", "1", ...; one with more of them makes the axis longer."""
        if number > len(self.feature_axis):
            self.feature_axis.merge([str(i) for i in range(number)])

    def append(self, row: Row) -> None:
        """Adds the newest row; its values are copied.

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
        self.facts.grown()
        self._rows.append(replace(row, values=self._tables.append(row.values)))
        self._steps.append(row.step)
        for name, scalars in self._scalars.items():
            scalars.append(row.scalars.get(name, np.nan))
        if len(self._rows) > self._max_rows:
            recent = len(self._rows) - self._max_rows // 2
            kept = [*_thin(self.steps[:recent].tolist(), self._max_rows // 4), *range(recent, len(self._rows))]
            facts = self.facts
            self._set([self._rows[i] for i in kept], self._tables.kept(kept))
            self._facts = facts
            facts.thinned(kept)
        self._losses.add(row.step, row.losses)

    def close(self, step: int, losses: Floats, val_loss: float = math.nan) -> None:
        """Takes what came after the newest row and was not sampled: it makes no row of its own.

        Args:
            step: the last step.
            losses: (n,) training loss of each step since the newest row, oldest first.
            val_loss: the last validation loss, or NaN where none came.
        """
        self.facts.grown()
        self._losses.add(step, losses)
        if self._rows and not math.isnan(val_loss):
            newest = self._rows[-1]
            self._rows[-1] = replace(newest, scalars={**newest.scalars, "val_loss": val_loss})
            self._scalars.pop("val_loss", None)

    def _set(self, rows: Sequence[Row], tables: Tables) -> None:
        """Takes rows, and the tables of their values, for all there is."""
        self._tables = tables
        self._rows = [replace(row, values=tables[i]) for i, row in enumerate(rows)]
        self._steps = Grown(np.array([row.step for row in rows], dtype=np.int64))
        self._scalars: dict[str, Grown[np.float64]] = {}
        self._facts = Facts()

    def _axis(self, metric: str) -> Axis[str]:
        if metric not in METRICS:
            hint = " (a scalar: history.scalar)" if any(metric in row.scalars for row in self._rows) else ""
            raise KeyError(f"metric must be one of {sorted(METRICS)}, got {metric!r}{hint}")
        axes = {"layers": self.layer_axis, "points": self.point_axis, "features": self.feature_axis}
        return axes[METRICS[metric].axis]

    def state_dict(self) -> dict[str, Any]:
        """The history as arrays, lists, strings and numbers; few arrays, however many rows there are."""
        histograms = sorted({name for row in self._rows for name in row.histograms})
        calls = sorted({name for row in self._rows for name in row.calls})
        return {
            "layers": [self.layer_axis.names, self.layer_axis.order.tolist()],
            "points": [[p.name, p.module, p.op] for p in self._points.values()],
            "point_order": list(self.point_axis.names),
            "features": len(self.feature_axis),
            "losses": self._losses.state(),
            "rows": [
                {"step": row.step, "scalars": dict(row.scalars), "gradients_only": row.gradients_only}
                for row in self._rows
            ],
            "values": self._tables.state_dict(),
            "row_losses": pack([row.losses for row in self._rows], np.float64),
            "histograms": {n: pack([row.histograms.get(n) for row in self._rows], np.int64) for n in histograms},
            "calls": {name: pack([row.calls.get(name) for row in self._rows], np.float64) for name in calls},
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
        self.add_features(state["features"])
        self._losses.load(state["losses"])
        losses = unpack(state["row_losses"], np.float64)
        histograms = {name: unpack(packed, np.int64) for name, packed in state["histograms"].items()}
        calls = {name: unpack(packed, np.float64) for name, packed in state["calls"].items()}
        rows = [
            Row(
                step=row["step"],
                scalars=dict(row["scalars"]),
                histograms={name: counts for name, every in histograms.items() if (counts := every[i]) is not None},
                losses=np.empty(0) if (own := losses[i]) is None else own,
                calls={name: norms for name, every in calls.items() if (norms := every[i]) is not None},
                gradients_only=row["gradients_only"],
            )
            for i, row in enumerate(state["rows"])
        ]
        self._set(rows, Tables.from_state(len(rows), state["values"]))


def _thin(steps: Sequence[int], limit: int) -> list[int]:
    """Indexes of the first row and of at most `limit` others, evenly spread over the steps."""
    gap = (steps[-1] - steps[0]) / limit
    kept = [0]
    for i, step in enumerate(steps):
        if i and step >= steps[kept[-1]] + gap:
            kept.append(i)
    return kept
