"""Where in the history something was measured, found without looking at every row again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lightning_gradflow.history import Bools, Floats, History, Ints

ROOT = "(root)"
"""What the model itself is called, where it has parameters of its own."""

NEXT_TO_NOTHING = 1e-4
"""Of the largest gradient of a sample: the weights of a layer that gets no more are shut off."""

_FIRST = 8  # samples, of a run that may have thousands


def known_rows(history: History, metric: str) -> Bools:
    """(R,) the rows in which a metric was measured anywhere.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc"])
        >>> history.append(Row(0, {"grad_norm": np.array([np.nan])}))
        >>> history.append(Row(1, {"grad_norm": np.array([0.5])}))
        >>> known_rows(history, "grad_norm")
        array([False,  True])
    """
    table = history[metric]
    return history.facts.of_rows(
        ("known", metric), len(table), lambda start: np.asarray(~np.isnan(table[start:]).all(axis=1))
    )


def newest_known(history: History, metric: str) -> Floats | None:
    """(N,) the newest row in which a metric was measured anywhere; None where there is none."""
    rows = np.flatnonzero(known_rows(history, metric))
    return history[metric][rows[-1]] if rows.size else None


def how_often_known(history: History, metric: str) -> Ints:
    """(N,) in how many rows a metric was measured."""
    table = history[metric]
    return history.facts.so_far(
        ("how often", metric), len(table), lambda start: (~np.isnan(table[start:])).sum(axis=0), np.add
    )


def is_always(history: History, metric: str, value: float) -> Bools:
    """(N,) where a metric had this value in each row in which it was measured; True where it never was."""
    table = history[metric]

    def find(start: int) -> Bools:
        return np.asarray(((table[start:] == value) | np.isnan(table[start:])).all(axis=0))

    return history.facts.so_far(("always", metric, value), len(table), find, np.logical_and)


def newest_values(history: History, metric: str) -> Floats:
    """(N,) the last value that was measured; NaN where there is none."""
    return _end_values(history, metric, newest=True)


def first_values(history: History, metric: str) -> Floats:
    """(N,) the first value that was measured; NaN where there is none."""
    return _end_values(history, metric, newest=False)


def _end_values(history: History, metric: str, *, newest: bool) -> Floats:
    table = history[metric]

    def find(start: int) -> Floats:
        rows = table[start:][::-1] if newest else table[start:]
        return np.asarray(rows[np.argmax(~np.isnan(rows), axis=0), np.arange(rows.shape[1])])

    def join(earlier: Floats, later: Floats) -> Floats:
        first, second = (later, earlier) if newest else (earlier, later)
        return np.where(np.isnan(first), second, first)

    if not len(table):
        return np.full(table.shape[1], np.nan)
    return history.facts.so_far(("end", metric, newest), len(table), find, join)


def share_of_gradient(history: History, column: int) -> float:
    """The gradient of a layer over the largest of its sample, in the median of the first samples; NaN without any.

    Args:
        history: where to read.
        column: of the layer.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn", "fc"])
        >>> history.append(Row(0, {"grad_norm": np.array([0.01, 2.0])}))
        >>> share_of_gradient(history, 0)
        0.005
    """
    norms = history["grad_norm"][:_FIRST]
    with np.errstate(all="ignore"):
        shares = norms[:, column] / np.fmax.reduce(norms, axis=1)
    known = shares[np.isfinite(shares)]
    return float(np.median(known)) if known.size else np.nan


def layer_mask(history: History) -> Bools:
    """(P,) the points that are outputs of layers."""
    return history.facts.of_names(
        "layer mask", lambda: np.array([point.is_layer for point in history.points], dtype=bool)
    )


def input_point(history: History) -> int | None:
    """Which point is the output of the layer that takes the inputs: the first layer, where it is not told otherwise.

    Behind an embedding it is the first layer to which raw numbers go.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["emb", "fc"])
        >>> history.add_points([Point("emb", "emb"), Point("fc", "fc")])
        >>> history.append(Row(0, scalars={"input_layer": 1.0}))
        >>> input_point(history)
        1
    """
    layers = np.flatnonzero(layer_mask(history))
    name = history.input_layer
    if name is not None:
        layers = np.array([i for i in layers if history.points[i].module == name], dtype=np.int64)
    return int(layers[0]) if layers.size else None


def columns_of_layers(history: History) -> Ints:
    """(P,) for each point the place of its layer among the layers; -1 at activations, and where it is none of them."""
    return history.facts.of_names("columns of layers", lambda: _columns_of_layers(history))


def _columns_of_layers(history: History) -> Ints:
    places = {name: i for i, name in enumerate(history.layers)}
    return np.array([places.get(p.module, -1) if p.is_layer else -1 for p in history.points], dtype=np.int64)


def skipped_rows(history: History) -> Bools:
    """(R,) the steps that a gradient scaler left out (see `is_skipped`)."""
    return np.asarray(history.scalar("step_skipped") == 1)


def holders(names: Iterable[str]) -> set[str]:
    """The modules that hold others among these, by their names: each ends after them, and has their output.

    Example:
        >>> sorted(holders(["net.inp", "net.block.up", "net.block", "net"])), holders(["fc1", "(root)"])
        (['net', 'net.block'], {'(root)'})
    """
    names = list(names)
    parts = (name.split(".") for name in names)
    above = {".".join(part[:count]) for part in parts for count in range(1, len(part))}
    return {name for name in names if name in above or (name == ROOT and len(names) > 1)}
