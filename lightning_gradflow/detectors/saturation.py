"""Do hidden activations work at their bounds, and does that block the gradient?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History


@dataclass(frozen=True)
class SaturatedActivation:
    """Finds bounded activations (sigmoid, tanh, ...) that stand near their bounds and let no gradient through.

    Two signs must line up in each of the last three samples: the share of saturated outputs, and the factor by which
    the delta norm shrinks on its way back through the activation. An activation behind the last layer is left out, and
    saturation that does let the gradient through is info: gates and outputs saturate by design.

    Args:
        max_saturated: share of saturated outputs, in (0, 1]. By default 0.9.
        min_gain: factor on the delta norm below which the activation blocks the signal, in (0, 1). The default of 0.1
            is a third of what a tanh with 90 % of its outputs saturated and the others linear lets through.
        samples: samples in a row, in [1, inf). The default of 3 is reached at step 2.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1"), Point("act", "act", "tanh"), Point("fc2", "fc2")])
        >>> nan = np.nan
        >>> sick = {"saturated_fraction": np.array([nan, 0.99, nan]), "delta_norm": np.array([1e-3, 1.0, 1.0])}
        >>> history.append(Row(step=0, values=sick))
        >>> [(f.severity.value, f.layers) for f in SaturatedActivation(samples=1).judge(history)]
        [('warning', ('act',))]
    """

    max_saturated: float = 0.9
    min_gain: float = 0.1
    samples: int = 3

    def __post_init__(self) -> None:
        check_range("max_saturated", self.max_saturated, 0, 1, open_high=False)
        check_range("min_gain", self.min_gain, 0, 1)
        check_range("samples", self.samples, 1, float("inf"), open_low=False, whole=True)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        table = history["saturated_fraction"]
        rows = np.flatnonzero(~np.isnan(table).all(axis=1))
        if len(rows) < self.samples or rows[-1] != len(history) - 1:
            return []
        recent = rows[-self.samples :]
        saturated = np.nan_to_num(table[recent]).min(axis=0) >= self.max_saturated
        layers = [i for i, point in enumerate(history.points) if point.is_layer]
        saturated[max(layers, default=-1) + 1 :] = False
        if not saturated.any():
            return []
        gains = _gains(history["delta_norm"][recent])
        blocked = saturated & (np.nan_to_num(gains, nan=1.0).max(axis=0) <= self.min_gain)
        chosen = blocked if blocked.any() else saturated
        over = sorted(np.flatnonzero(chosen), key=lambda i: -table[-1, i])
        worst = over[0]
        layers_before = sum(point.is_layer for point in history.points[:worst])
        from_start = np.nan_to_num(table[rows[: self.samples], worst]).min() >= self.max_saturated
        evidence = {"saturated_fraction": float(table[-1, worst])}
        if np.isfinite(gains[-1, worst]):
            evidence["activation_gain"] = float(gains[-1, worst])
        return [
            Finding(
                kind=FindingKind.SATURATED_ACTIVATION,
                severity=Severity.WARNING if blocked.any() else Severity.INFO,
                step=history.rows[-1].step,
                layers=tuple(dict.fromkeys(history.points[i].module for i in over)),
                cause=("unscaled_inputs" if layers_before <= 1 else "weight_scale") if from_start else "drift",
                evidence=evidence,
            )
        ]


def _gains(deltas: Floats) -> Floats:
    """(R, P) delta norms -> (R, P) factor on the way back through each point; NaN where it cannot be told."""
    usable = np.isfinite(deltas) & (deltas > 0)
    gains = np.full_like(deltas, np.nan)
    both = usable[:, 1:]  # an exact zero before a live point is a gain of zero, not a missing one
    gains[:, 1:][both] = deltas[:, :-1][both] / deltas[:, 1:][both]
    return gains
