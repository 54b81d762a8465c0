"""Does nothing get learnt because each layer makes strangers of neighbours?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.profile import DepthProfile, depth_profile, is_same_pass
from lightning_gradflow.detectors.standstill import from_the_start, learns_little
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import Floats, History, Ints

_FEWEST = 4  # layers: the scale of the first one may be meant, and so may that of the last


@dataclass(frozen=True)
class ChaoticLayers:
    """Finds a run that learns nothing behind layers each of which makes small differences far larger.

    What a layer, and what follows it, multiply the gradient by on its way back they multiply the difference between
    two inputs by on its way forward. Weights that are too large make outputs that are too large, and that is told at
    once. Where something bounds these, as a sine does, they are of a usual size, and noise: inputs that lie beside each
    other come out as strangers, and what is learnt of one says nothing of the other (`loss_plateau`, `weight_scale`).

    It is a finding where the gradient grows by more than `max_gain` from a layer to the one before, in the median of
    three layers or more, in the first sample and in the newest one; and where the run has learnt next to nothing since
    (see `learns_little`): its loss falls as the outputs, which are noise, become smaller.

    Args:
        max_gain: factor on the gradient, in [1, inf). By default 4: healthy networks start with up to 1.8.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Poole et al. 2016, Exponential expressivity in deep neural networks through transient chaos; Sitzmann et al.
        2020, Implicit neural representations with periodic activation functions.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history, names = History(), ["fc1", "fc2", "fc3", "fc4"]
        >>> history.layer_axis.merge(names)
        >>> history.add_points([Point(name, name) for name in names])
        >>> steep = {"delta_norm": np.array([1000.0, 100.0, 10.0, 1.0]), "spectral_norm": np.ones(4)}
        >>> history.append(Row(0, steep))
        >>> history.append(Row(60, steep, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in ChaoticLayers().judge(history)]
        [('weight_scale', ('fc2', 'fc3'))]
    """

    max_gain: float = 4.0

    def __post_init__(self) -> None:
        check_range("max_gain", self.max_gain, 1, float("inf"), open_low=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not learns_little(history):
            return []
        first, newest = depth_profile(history, 0), depth_profile(history)
        if first is None or newest is None or not is_same_pass(first, newest):
            return []
        if not min(_median_gain(first), _median_gain(newest)) > self.max_gain:
            return []
        at = _matrices(newest)
        layers = tuple(newest.points[i].module for i, gain in zip(at[1:-1], _gains(newest), strict=False) if gain > 1)
        return [from_the_start(history, "weight_scale", layers, {"layer_gain": _median_gain(newest)})]


def _matrices(profile: DepthProfile) -> Ints:
    """The points of the layers that multiply, and that a gradient reaches."""
    return np.flatnonzero(profile.usable & np.isfinite(profile.spectral_norm))


def _gains(profile: DepthProfile) -> Floats:
    """(n - 1,) by how much the gradient grows on its way back through each of these but the first."""
    deltas = profile.delta_norm[_matrices(profile)]
    return np.asarray(deltas[:-1] / deltas[1:])


def _median_gain(profile: DepthProfile) -> float:
    gains = _gains(profile)
    return float(np.median(gains)) if len(gains) + 1 >= _FEWEST else 0.0
