"""Does attention choose one position each from the start, whatever comes in?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import feature_evidence, offending_features
from lightning_gradflow.detectors.known import first_values, newest_values
from lightning_gradflow.detectors.large_weights import mean_sizes
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import is_past_chance
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

Bools = npt.NDArray[np.bool_]

_OUTLIER = 2.6  # times the mean size: 1.3 times the largest singular value of independent entries, as in `LargeWeights`


@dataclass(frozen=True)
class LoudScores:
    r"""Finds softmaxes inside of a network that stand at their bounds from the first sample on.

    The weight of a position falls by a factor of :math:`e^{-\Delta}` over a gap of :math:`\Delta` between two scores.
    Where, in half or more of the layers that hold a softmax or come before one, the largest score was more than
    `max_gap` above the next one in the median, and still is, nearly all of it goes to one position, which none but
    random weights have chosen, and no gradient comes through to choose another (`saturated_activation`, `score_scale`).
    Products of queries and keys of usual size with d entries have the deviation :math:`\sqrt d`, unless they are
    divided by that.

    A network that is clearly better than chance, or has learnt something, has learnt to choose; it is not judged. Nor
    are layers whose weights look trained, and the softmax behind the last one, which may be sure of what it says.
    Inputs that are unscaled make scores of any size: they are the cause then (`unscaled_inputs`), behind the last layer
    too.

    Args:
        max_gap: in (0, inf). By default 10: the next position gets less than a twenty-thousandth of the largest. Usual
            weights give 0.1 to 2, and 8 where a position asks for itself.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Vaswani et al. 2017, Attention is all you need, section 3.2.1; Zhai et al. 2023, Stabilizing Transformer
        training by preventing attention entropy collapse.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["attention", "fc"])
        >>> history.add_points([Point("attention", "attention"), Point("fc", "fc")])
        >>> history.append(Row(0, {"softmax_gap": np.array([20.0, np.nan])}))
        >>> [(f.cause, f.layers) for f in LoudScores().judge(history)]
        [('score_scale', ('attention',))]
    """

    max_gap: float = 10.0

    def __post_init__(self) -> None:
        check_range("max_gap", self.max_gap, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows:
            return []
        first, newest = first_values(history, "softmax_gap"), newest_values(history, "softmax_gap")
        loud = (first > self.max_gap) & (newest > self.max_gap)
        is_unscaled = bool(offending_features(history))
        if not is_unscaled:
            loud &= _is_inside(history) & ~_looks_trained(history)
        if not loud.any() or 2 * loud.sum() < np.isfinite(first).sum() or is_past_chance(history):
            return []
        if has_learnt(history):
            return []
        order = np.argsort(-np.where(loud, newest, -np.inf), kind="stable")[: int(loud.sum())]
        return [
            Finding(
                kind=FindingKind.SATURATED_ACTIVATION,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(history.layers[i] for i in order),
                cause="unscaled_inputs" if is_unscaled else "score_scale",
                evidence={
                    "softmax_gap": float(np.median(newest[loud])),
                    **(feature_evidence(history) if is_unscaled else {}),
                },
            )
        ]


def _is_inside(history: History) -> Bools:
    """(L,) the layers that are not the last one."""
    layers = [point.module for point in history.points if point.is_layer]
    return np.array([name not in layers[-1:] for name in history.layers], dtype=bool)


def _looks_trained(history: History) -> Bools:
    """(L,) the layers with a singular value that independent entries do not have."""
    norms = first_values(history, "spectral_norm")
    with np.errstate(all="ignore"):
        return np.asarray(np.isfinite(norms) & (norms > _OUTLIER * mean_sizes(history)))
