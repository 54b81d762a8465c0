"""From what the probes found to what a row holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_gradflow.history import MAX_CALLS, Axis, Floats, Ints
from lightning_gradflow.metrics import METRICS, measured

CLIP_WINDOW = 50
"""Samples that the share of clipped steps is taken over."""
_CLIPPED = 0.9999  # of the norm: what is left after clipping is below it; rounding alone never is


def columns(found: Mapping[str, Mapping[str, float]], axis: Axis[str]) -> dict[str, Floats]:
    """Turns name -> metric -> value into one array a metric, by the identity of the names.

    Example:
        >>> columns({"b": {"grad_norm": 2.0}}, Axis(["a", "b"]))
        {'grad_norm': array([nan,  2.])}
    """
    places: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for i, by_metric in enumerate(found.values()):
        for metric, value in by_metric.items():
            if metric not in places:
                places[metric], values[metric] = [], []
            places[metric].append(i)
            values[metric].append(value)
    there = {metric: (np.array(places[metric]), np.array(values[metric], dtype=np.float64)) for metric in places}
    return full_columns(list(found), there, axis)


def full_columns(names: Sequence[str], found: Mapping[str, tuple[Ints, Floats]], axis: Axis[str]) -> dict[str, Floats]:
    """The same out of metric -> (n,) places in `names` and (n,) values there.

    Example:
        >>> full_columns(["b"], {"grad_norm": (np.array([0]), np.array([2.0]))}, Axis(["a", "b"]))
        {'grad_norm': array([nan,  2.])}
    """
    identities = np.array([axis.identity(name) for name in names], dtype=np.int64)
    made: dict[str, Floats] = {}
    for metric in METRICS:
        if metric in found:
            at, values = found[metric]
            made[metric] = np.full(len(axis), np.nan)
            made[metric][identities[at]] = values
    return made


def by_identity(names: Sequence[str], found: Mapping[str, Floats], axis: Axis[str]) -> dict[str, Floats]:
    """The same out of metric -> (n,) values of `names`.

    Example:
        >>> by_identity(["b"], {"grad_norm": np.array([2.0])}, Axis(["a", "b"]))
        {'grad_norm': array([nan,  2.])}
    """
    everywhere = np.arange(len(names))
    return full_columns(names, {metric: (everywhere, values) for metric, values in found.items()}, axis)


def totals(
    layers: Mapping[str, Floats], clip_factor: float, clip_factors_before: Floats, scale: float
) -> dict[str, float]:
    """What concerns all layers together.

    Args:
        layers: metric -> (L,) values of the layers.
        clip_factor: total norm after clipping / before, or NaN.
        clip_factors_before: (R,) the same of the samples before.
        scale: the factor of the gradient scaler; NaN without one.

    Example:
        >>> totals({"grad_norm": np.array([3.0, np.nan, 4.0])}, 0.5, np.array([1.0]), math.nan)
        {'loss_scale': nan, 'grad_norm_total': 5.0, 'clip_factor': 0.5, 'clipped_fraction': 0.5}
    """
    found = {"loss_scale": scale}
    if "grad_norm" not in layers:
        return found
    found["grad_norm_total"] = float(np.sqrt(np.nansum(np.square(layers["grad_norm"]))))
    found["clip_factor"] = clip_factor
    known = clip_factors_before[np.isfinite(clip_factors_before)]  # rows of gradients alone have none
    factors = np.append(known[1 - CLIP_WINDOW :], clip_factor)
    factors = factors[np.isfinite(factors)]
    found["clipped_fraction"] = float((factors < _CLIPPED).mean()) if factors.size else math.nan
    if not math.isnan(scale):
        found["step_skipped"] = float((layers["grad_nonfinite_fraction"] > 0).any())
    return found


def mean(total: float, number: float) -> float:
    """The mean of what was summed over ranks; NaN where there was nothing."""
    return measured(total / number) if number else math.nan


def mean_loss(losses: Floats) -> float:
    """Non-finite losses were measured: their mean is infinite, not missing."""
    return measured(float(losses.mean())) if losses.size else math.nan


def evenly(calls: Floats) -> Floats:
    """(K,) -> at most 64 of the calls, evenly spread, the first and the last among them."""
    if len(calls) <= MAX_CALLS:
        return calls
    chosen: Floats = calls[np.rint(np.linspace(0, len(calls) - 1, MAX_CALLS)).astype(np.int64)]
    return chosen
