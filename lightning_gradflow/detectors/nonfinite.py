"""Where did NaN or infinity begin?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_MIN_FINITE = 0.5  # of the losses between two samples: one bad batch among fifty is no fault of the run


@dataclass(frozen=True)
class NonfiniteGradient:
    """Finds NaN or infinity in the gradients, and the first layer in which it began.

    A loss that is not finite in most of the steps since the last sample counts too, finite as the gradients may be.

    Forward (`cause="forward"`): the first point, in order of execution, whose output is not finite. Otherwise the loss
    itself (`loss`), or the backward pass (`backward`): the last point whose delta is not finite, for errors travel from
    the loss towards the first layer.

    Under a gradient scaler a backward pass that overflows is no finding: the step is skipped and the scale halved, and
    the next may pass. It is one if the last two samples were not finite although the scale is below `min_scale`. What
    is not finite in the forward pass or the loss was so before the scale came in, and is found at once.

    Args:
        min_scale: scale of a gradient scaler below which a backward pass that is still not finite is found, in
            (0, inf). By default 1: below, the gradients would overflow without a scaler too, or there is a NaN that
            no scale mends. From the usual start of 65536 that is after 17 skipped steps, so it is told at step 32, or
            at the second sample where it begins later. A larger limit would find what the scaler is about to mend.

    Raises:
        ValueError: if `min_scale` is out of its range.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> broken = {"grad_nonfinite_fraction": np.array([1.0, 1.0]), "output_rms": np.array([0.3, np.inf])}
        >>> history.append(Row(step=0, values=broken))
        >>> [(f.cause, f.layers) for f in NonfiniteGradient().judge(history)]
        [('forward', ('fc2',))]
    """

    min_scale: float = 1.0

    def __post_init__(self) -> None:
        check_range("min_scale", self.min_scale, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        fractions = history["grad_nonfinite_fraction"]
        if not fractions.size:
            return []
        broken = np.asarray((fractions > 0).any(axis=1))
        # a rectifier may turn NaN into zero on the way back: the gradients are finite, and worth nothing
        broken |= np.array([_mostly_nonfinite(row.losses) for row in history.rows])
        if not broken[-1]:
            return []
        row = history.rows[-1]
        outputs, deltas = history["output_rms"][-1], history["delta_norm"][-1]
        modules = [point.module for point in history.points]
        loss = row.losses[-1] if row.losses.size else np.nan
        if np.isposinf(outputs).any():
            cause, layers = "forward", [modules[i] for i in np.flatnonzero(np.isposinf(outputs))]
        elif row.losses.size and not np.isfinite(loss):
            cause, layers = "loss", modules[-1:]
        else:
            began = [modules[i] for i in np.flatnonzero(np.isposinf(deltas))[::-1]]
            gradients = [history.layers[i] for i in np.flatnonzero(fractions[-1] > 0)[::-1]]
            cause, layers = "backward", [*began, *gradients]
            if self._may_pass(history, bool(broken[-2:-1].any())):
                return []
        return [
            Finding(
                kind=FindingKind.NONFINITE_GRADIENT,
                severity=Severity.CRITICAL,
                step=row.step,
                layers=tuple(dict.fromkeys(layers)),
                cause=cause,
                evidence={"nonfinite_layers": float((fractions[-1] > 0).sum()), "loss": float(loss)},
            )
        ]

    def _may_pass(self, history: History, was_broken: bool) -> bool:
        """Whether a gradient scaler left the step out and may still find a scale at which the next one passes."""
        row = history.rows[-1]
        scale = row.scalars.get("loss_scale", math.nan)
        if math.isnan(scale) or row.scalars.get("step_skipped") == 0 or _mostly_nonfinite(row.losses):
            return False  # no scaler, or one that let the step through, or a loss that it cannot mend
        return scale >= self.min_scale or not was_broken


def _mostly_nonfinite(losses: Floats) -> bool:
    return bool(losses.size) and float(np.isfinite(losses).mean()) < _MIN_FINITE
