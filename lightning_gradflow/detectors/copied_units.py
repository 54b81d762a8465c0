"""Are there layers whose units are all copies of one another, and stay so?"""

from __future__ import annotations

import numpy as np

from lightning_gradflow.detectors.known import holders, known_rows
from lightning_gradflow.history import History

_ALIKE = 1e-3  # of their size: far above rounding, and a thousandth of what units that are drawn differ by
_PULLED_ALIKE = 0.1  # of the gradients': biases that are drawn make so little of a difference
_NEARLY = 0.1  # of the weights', behind the first step
_FEWEST = 2  # layers
_SAMPLES = 3  # in a row: of a matrix nothing else tells that it has units


def copied_layers(history: History) -> tuple[str, ...]:
    """The hidden layers whose units have the same weights and get all but the same gradient, in order of execution.

    Hardly any step makes them differ then: to whatever comes in, such a layer answers with one number, or with one and
    what biases that were drawn make of it, which is a tenth of the gradient or less. The last layer is left out, whose
    units learn what the targets tell, and so is one of which only the weights are alike: those behind it, drawn at
    random, or dropout make the gradients differ. Where the gradient is zero it is not known.

    Where all hidden layers have such weights in the first sample, two or more, nothing else is asked: what the first
    step has made of them is all that they differ by.

    A module of the user's own counts, behind the others, where a matrix of it has been so in three samples, along any
    axis: what comes from units that are copies has that axis as well.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> copies = {"unit_spread": np.zeros(2), "unit_grad_spread": np.array([0.0, 1.1])}
        >>> history.append(Row(step=1, values=copies))
        >>> copied_layers(history)
        ('fc1',)
    """
    found = _of_layers(history) if "unit_grad_spread" in history.rows[-1].values else []
    return tuple(dict.fromkeys([*found, *_with_matrices(history)]))


def _with_matrices(history: History) -> list[str]:
    """The modules of the user's own with a matrix made of copies."""
    rows = np.flatnonzero(known_rows(history, "matrix_spread"))[-_SAMPLES:]
    if len(rows) < _SAMPLES or rows[-1] != len(history) - 1:
        return []
    with np.errstate(invalid="ignore"):
        alike = np.asarray((history["matrix_spread"][rows] < _ALIKE).all(axis=0))
    return [name for name, is_alike in zip(history.layers, alike, strict=True) if is_alike]


def _of_layers(history: History) -> list[str]:
    weights, gradients = history["unit_spread"][-1], history["unit_grad_spread"][-1]
    called = [point.module for point in history.points if point.is_layer]
    outer = holders(called)
    inner = [name for name in called if name not in outer]
    places = {name: i for i, name in enumerate(history.layers)}
    hidden = [places[name] for name in inner[:-1] if name in places]
    with np.errstate(invalid="ignore"):
        alike = (weights < _ALIKE) & (gradients < _PULLED_ALIKE)
        nearly = weights < _NEARLY
    known = [i for i in hidden if np.isfinite(weights[i]) and np.isfinite(gradients[i])]
    # a step that a gradient scaler has skipped tells of no gradient
    is_first = len(known) >= _FEWEST and not np.isfinite(history["unit_grad_spread"][:-1, known]).any()
    if is_first and nearly[known].all():
        return [history.layers[i] for i in known]
    return [history.layers[i] for i in hidden if alike[i]]
