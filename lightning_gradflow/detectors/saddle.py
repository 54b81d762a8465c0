"""Are the first and the last layer both so small that each waits for the other to grow?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.known import holders, input_point, layer_mask
from lightning_gradflow.detectors.profile import depth_profile, in_order
from lightning_gradflow.detectors.standstill import steps_at_full_rate
from lightning_gradflow.history import Floats, History

Ends = tuple[str, str, float, float]
"""The first and the last layer with weights, and what each makes of the signal."""

_SMALL = 0.1  # factor: of one layer, weights that learn have four times as much, behind the inputs and before the loss
_NOTHING: Floats = np.empty(0)


@dataclass(frozen=True)
class Saddle:
    """What is left of the inputs behind the first layer, and of the gradient before the last one.

    Args:
        layers: the first and the last layer with weights.
        forward: rms of the first one's output / rms of what goes in.
        backward: norm of the gradient that reaches the first one's output / of that at the last one's.
        points: what the backward pass went through.
        wait: steps until they have grown to a usual size, at the pace of their fastest steps so far; NaN where no step
            was measured.
    """

    layers: tuple[str, str]
    forward: float
    backward: float
    points: int
    wait: float

    @property
    def span(self) -> float:
        """Decades that are lost between the inputs and the loss; negative."""
        return math.log10(self.forward * self.backward)


def saddle_of(history: History, max_decay: float) -> Saddle | None:
    r"""The saddle that the run starts near, if it starts near one and has not left it.

    Where the weights of two layers that follow each other are near zero, the gradient of each is the other's size: both
    stand still, whatever the learning rate of a healthy network may be. Of a scale :math:`\sigma` the way out takes
    :math:`\ln(1 / \sigma) / r` steps, where r is the relative growth in a step. Layers between them that a residual
    connection leads around make no difference, and the depth profile, which begins behind the first layer, sees nothing
    of it.

    Both factors must be below 0.1, and lose `max_decay` decades together, in the newest row and in the first. A last
    layer of zeros alone is well: its gradient is that of its inputs.

    Args:
        history: where to read.
        max_decay: decades, in (0, 100).

    References:
        Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks.
    """
    if not history.rows or history.scalar("optimizers")[-1] > 1 or _warms_up(history):
        return None
    first = history.facts.of_row("ends", history.rows[0].step, lambda: _ends_of(history, 0))
    if first is None or not _is_small(first, max_decay):
        return None
    newest, profile = _ends_of(history, len(history) - 1), depth_profile(history)
    if newest is None or profile is None or first[:2] != newest[:2] or not _is_small(newest, max_decay):
        return None
    start, end, forward, backward = newest
    places = [history.layers.index(name) for name in (start, end)]
    with np.errstate(all="ignore"):
        paces = np.sqrt(np.prod(history["update_ratio"][:, places], axis=1))
    known = paces[np.isfinite(paces) & (paces > 0)]
    wait = -math.log(forward * backward) / 2 / float(known.max()) if known.size else math.nan
    return Saddle((start, end), forward, backward, len(profile.points), wait)


def _warms_up(history: History) -> bool:
    """Whether the learning rate may still rise: the first steps then tell nothing of the pace."""
    return bool(history.scalar("lr_scheduled")[-1] == 1) and steps_at_full_rate(history) < 1


def _is_small(ends: Ends, max_decay: float) -> bool:
    *_, forward, backward = ends
    return 0 < forward <= _SMALL and 0 < backward <= _SMALL and forward * backward <= 10.0**-max_decay


def _ends_of(history: History, row: int) -> Ends | None:
    """The first and the last layer with weights of a row, and what each makes of the signal."""
    profile = depth_profile(history, row)
    if profile is None:
        return None
    outer = holders(point.module for point in profile.points)
    known = np.flatnonzero(profile.usable & np.isfinite(profile.spectral_norm))
    layers = [int(i) for i in known if profile.points[i].module not in outer]
    if len(layers) < 2:
        return None
    sizes = _sizes(history, row)
    first, last = layers[0], layers[-1]
    before = _inputs(history, row) if first == 0 else sizes.get(profile.points[first - 1].name, math.nan)
    forward = sizes.get(profile.points[first].name, math.nan) / before if before > 0 else math.nan
    backward = float(profile.delta_norm[first] / profile.delta_norm[last])
    return profile.points[first].module, profile.points[last].module, forward, backward


def _sizes(history: History, row: int) -> dict[str, float]:
    rms = in_order(history.rows[row].values.get("output_rms", _NOTHING), history.point_axis.order)
    return {point.name: float(size) for point, size in zip(history.points, rms, strict=True)}


def _inputs(history: History, row: int) -> float:
    layers = np.flatnonzero(layer_mask(history))
    if not layers.size or input_point(history) != layers[0]:
        return math.nan
    sizes = history["input_rms"][row]
    known = sizes[np.isfinite(sizes)]
    return float(np.sqrt(np.mean(np.square(known)))) if known.size else math.nan
