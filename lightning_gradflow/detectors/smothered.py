"""How much of what the inputs differ by reaches any layer, together with a gradient to learn it by?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lightning_gradflow.detectors.profile import depth_profile, in_order
from lightning_gradflow.detectors.standstill import is_judged, still_falls
from lightning_gradflow.history import History

_PLANNED = 1e4  # steps of a run without an end
_MOMENTUM = 10.0  # times as fast as plain SGD, with a momentum of 0.9
_WELL = 0.1  # share: no more than this is lost in a handful of layers of any usual initialisation
_FEWEST = 3  # layers
_SAMPLES = 3  # in a row


def best_share(history: History, row: int) -> float:
    r"""What the best placed layer gets of the inputs' differences and of the gradient; NaN where it can't be told.

    With :math:`\delta_l` the delta norm at the output of layer l, L the last one, and :math:`s_l` the share of its
    output that differs between samples (`output_spread`),

    .. math:: \max_l \; s_{l - 1} \, \delta_l / \delta_L, \qquad s_0 = 1

    The part of a layer's gradient that tells one sample from another has this size, beside the part that all samples
    have in common. It is near 1 where either the gradient comes back to the first layers or the inputs get through to
    the last ones: one of both is enough to learn by. In a plain stack whose weights are too small for its depth both
    are lost, at the same rate, and then no layer is well placed.

    Layers are taken in order of execution. Where branches run beside each other that is not what a layer was fed by,
    which makes the share too large rather than too small.

    References:
        Schoenholz et al. 2017, Deep information propagation (the depth scales of correlations and of gradients).
    """
    source = history.rows[row]
    if "output_spread" not in source.values:
        return math.nan
    return history.facts.of_row("best share", source.step, lambda: _best_share(history, row))


def _best_share(history: History, row: int) -> float:
    profile = depth_profile(history, row)
    if profile is None:
        return math.nan
    spreads = in_order(history.rows[row].values["output_spread"], history.point_axis.order)
    known = dict(zip((point.name for point in history.points), spreads, strict=True))
    layers = [i for i in np.flatnonzero(profile.usable) if profile.points[i].is_layer]
    if len(layers) < _FEWEST:
        return math.nan
    deltas = profile.delta_norm[layers] / profile.delta_norm[layers[-1]]
    fed = np.array([1.0, *(known[profile.points[i].name] for i in layers[:-1])])
    return float(np.max(fed * deltas)) if np.isfinite(fed).all() else math.nan


def is_smothered(history: History) -> bool:
    """Whether a run had time to learn, and all along too little of what its inputs differ by was left to learn from.

    A step lowers a quadratic loss by a share of the square of `best_share` at best, ten times that with a momentum of
    0.9: where `10 * steps * share^2 < 1` in the planned run, plain SGD does not get there. It must be so in the first
    sample and in the newest three. What an optimizer that evens the updates out can do about it, it has done by then.
    """
    if not is_judged(history) or still_falls(history):
        return False
    return _is_small(history, range(1)) and _is_small(history, range(len(history) - _SAMPLES, len(history)))


def was_smothered(history: History, start: int) -> bool:
    """Whether so little is left in the newest three samples, and was not in the row `start`."""
    newest = range(max(0, len(history) - _SAMPLES), len(history))
    return best_share(history, start) >= _WELL and _is_small(history, newest)


def _is_small(history: History, rows: Iterable[int]) -> bool:
    planned = float(np.nan_to_num(history.scalar("planned_steps")[-1])) or _PLANNED
    return all(best_share(history, row) <= 1 / math.sqrt(_MOMENTUM * planned) for row in rows)
