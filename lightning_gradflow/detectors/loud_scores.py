"""Does attention choose one position each from the start, whatever comes in?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import feature_evidence, offending_features
from lightning_gradflow.detectors.known import first_values, newest_values
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import is_past_chance
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_UNSCALED = 6.0  # gap that is enough where a reason is at hand


@dataclass(frozen=True)
class LoudScores:
    r"""Finds softmaxes inside of a network that stand at their bounds from the first sample on.

    The weight of a position falls by a factor of :math:`e^{-\Delta}` over a gap of :math:`\Delta` between two scores.
    Where, in half or more of the layers that hold a softmax or come before one, the largest score was more than
    `max_gap` above the next one in the median, and still is, nearly all of it goes to one position, which none but
    random weights have chosen, and no gradient comes through to choose another (`saturated_activation`, `score_scale`).
    Products of queries and keys of usual size with d entries have the deviation :math:`\sqrt d`, unless they are
    divided by that.

    A network that is clearly better than chance, or, where that is not known, has learnt something, has learnt to
    choose; it is not judged. Nor
    is the softmax behind the last layer, which may be sure of what it says. Inputs that are unscaled make scores of any
    size: they are the cause then (`unscaled_inputs`), from a gap of 6 on, and behind the last layer too.

    Args:
        max_gap: in (0, inf). By default 10: the next position gets less than a twenty-thousandth of the largest. Usual
            weights give 0.1 to 2, and 8 where a position asks for itself.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Vaswani et al. 2017, Attention is all you need, section 3.2.1; Zhai et al. 2023, Stabilizing Transformer
        training by preventing attention entropy collapse.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["attention", "fc"])
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
        is_unscaled = bool(offending_features(history))
        first, newest = (_gaps(history, of, is_unscaled) for of in (first_values, newest_values))
        max_gap = min(self.max_gap, _UNSCALED) if is_unscaled else self.max_gap
        loud = (first > max_gap) & (newest > max_gap)
        if not loud.any() or 2 * loud.sum() < np.isfinite(first).sum():
            return []
        # a cross-entropy that came down from wide scores to chance has learnt nothing
        is_of_classes = bool((history.scalar("score_classes") > 1).any())
        if is_past_chance(history) or (has_learnt(history) and not is_of_classes):
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


def _gaps(history: History, values: Callable[[History, str], Floats], with_outputs: bool) -> Floats:
    """(L,) of the softmaxes inside, or of those of outputs as well."""
    gaps = values(history, "softmax_gap")
    return np.fmax(gaps, values(history, "output_gap")) if with_outputs else gaps
