"""Where did NaN or infinity begin?"""

from __future__ import annotations

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

    Args:
        scaled_patience: samples in a row that must be non-finite where a gradient scaler is at work, in [1, inf). A
            scaler meets infinity on purpose and skips the step. The default of 5 allows it to halve its scale often
            enough to come from 65536 to where most networks are, since the first samples are dense.

    Raises:
        ValueError: if `scaled_patience` is out of its range.

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

    scaled_patience: int = 5

    def __post_init__(self) -> None:
        check_range("scaled_patience", self.scaled_patience, 1, float("inf"), open_low=False, whole=True)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        fractions = history["grad_nonfinite_fraction"]
        if not fractions.size:
            return []
        scaled = history.scalar("loss_scale")[-1] > 0
        needed = self.scaled_patience if scaled else 1
        broken = np.asarray((fractions > 0).any(axis=1))
        # a rectifier may turn NaN into zero on the way back: the gradients are finite, and worth nothing
        broken |= np.array([_mostly_nonfinite(row.losses) for row in history.rows])
        if len(broken) < needed or not broken[-needed:].all():
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


def _mostly_nonfinite(losses: Floats) -> bool:
    return bool(losses.size) and float(np.isfinite(losses).mean()) < _MIN_FINITE
