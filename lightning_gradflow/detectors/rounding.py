"""Are the steps lost in the rounding of the weights?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import newest_known
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import is_judged, steps_at_full_rate, still_falls
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

MAX_LOST = 0.5
"""Share of what a step is to gain: with more of it lost the run is half as fast at best."""


@dataclass(frozen=True)
class RoundedSteps:
    """Finds weights in bf16 or fp16 that steps cannot move, where nothing is learnt.

    A step below half of the spacing of the numbers around a weight is rounded away, and so are all that follow: they do
    not add up. In bfloat16 that is a step of 1/512 to 1/256 of the weight, in float16 of 1/4096 to 1/2048; Adam at a
    rate of 1e-4 moves no weight above 0.05 in bfloat16. To first order a step gains the sum of gradient times step, so
    that what is lost of a layer is

        unchanged_fraction = sum of |gradient| where the step changed nothing / sum of |gradient|.

    What is left is the worse for it: noise makes large steps, which pass, and what all batches agree on small ones.
    It is a finding if the median layer loses more than `max_lost`, in the median of the samples since the learning rate
    last rose, and if there was time to learn, nothing was learnt and the loss does not fall. Small weights
    do move: where these are enough, as at the end of most trainings in pure bf16, all is well and nothing is said.
    Not judged: weights in float32, as under mixed precision; several optimizers.

    Args:
        max_lost: in (0, 1). By default 0.5, where a run is half as fast at best; of 32 small networks in pure bfloat16
            those that lost more than 0.75 learnt about a third, or less, of what they learn in float32.

    Raises:
        ValueError: if `max_lost` is out of its range.

    References:
        Zamirai et al. 2020, Revisiting BFloat16 training; Micikevicius et al. 2018, Mixed precision training.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1"])
        >>> history.append(Row(60, {"unchanged_fraction": np.array([0.96])}, losses=np.full(61, 2.3)))
        >>> [(str(f.kind), f.cause, f.evidence["unchanged_fraction"]) for f in RoundedSteps().judge(history)]
        [('update_ratio', 'rounding', 0.96)]
    """

    max_lost: float = MAX_LOST

    def __post_init__(self) -> None:
        check_range("max_lost", self.max_lost, 0, 1)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        lost = lost_share(history)
        if not lost > self.max_lost or not is_judged(history, young=math.inf):
            return []
        if has_learnt(history) or still_falls(history):  # rounding at random loses no step in the long run
            return []
        newest = newest_known(history, "unchanged_fraction")
        shares: Floats = np.nan_to_num(newest) if newest is not None else np.empty(0)
        worst = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > self.max_lost]
        return [
            Finding(
                kind=FindingKind.UPDATE_RATIO,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(history.layers[i] for i in worst),
                cause="rounding",
                evidence={"unchanged_fraction": lost},
            )
        ]


def lost_share(history: History) -> float:
    """Share of what a step is to gain that rounding takes from the median layer; NaN where no weight is in 16 bits.

    The median of the samples since the learning rate last rose.
    """
    table = history["unchanged_fraction"]
    if not table.size:
        return math.nan
    table = table[history.steps >= history.steps[-1] - steps_at_full_rate(history)]
    medians = [np.median(row[~np.isnan(row)]) for row in table if not np.isnan(row).all()]
    return float(np.median(medians)) if medians else math.nan
