"""Are targets compared with outputs that can't be what they are?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.unscaled_targets import FAR_OFF
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_SAMPLES = 3  # one batch tells little of what targets are like


@dataclass(frozen=True)
class UnreachableTargets:
    r"""Finds a regression whose targets lie beyond the bounds of an activation that gives the outputs.

    A ReLU or softplus gives nothing below 0, a sigmoid what is between 0 and 1, a tanh between -1 and 1. With the
    bounds a and b, targets t and the mean of those of a batch it is a finding (`loss_mismatch`, `unreachable_targets`)
    where, with sums over all samples so far, three or more,

    .. math:: \sum (t - \mathrm{clip}(t, a, b))^2 > \mathrm{max\_beyond} \sum (t - \bar t)^2

    in all squared and absolute errors of the loss. More than the rest of the variance can't be explained by whatever
    weights; where it is all noise around what the bounds allow, that is meant. Targets that are far larger than all
    outputs are one of their own (`unscaled_targets`).

    Args:
        max_beyond: share of the variance, in (0, 1). By default 0.2: of standardised targets a ReLU leaves out 0.5, a
            tanh 0.15, with which one can do.

    Raises:
        ValueError: if the limit is out of its range.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> for step in range(3):
        ...     history.append(Row(step, scalars={"targets_beyond": 0.5, "target_deviation": 1.0, "residual_rms": 1.1}))
        >>> [(f.cause, f.evidence["targets_beyond"]) for f in UnreachableTargets().judge(history)]
        [('unreachable_targets', 0.5)]
    """

    max_beyond: float = 0.2

    def __post_init__(self) -> None:
        check_range("max_beyond", self.max_beyond, 0, 1)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        errors = history.scalar("residual_rms")
        known = np.flatnonzero(~np.isnan(errors))
        if len(known) < _SAMPLES or known[0] != 0 or not errors[0] <= FAR_OFF:
            return []
        shares = np.nan_to_num(history.scalar("targets_beyond")[known])
        variances = np.nan_to_num(np.square(history.scalar("target_deviation")[known]))
        # of targets most of which are next to zero a batch may hold nothing but their noise
        if not (shares * variances).sum() > self.max_beyond * variances.sum():
            return []
        share = float((shares * variances).sum() / variances.sum())
        return [
            Finding(
                kind=FindingKind.LOSS_MISMATCH,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                cause="unreachable_targets",
                evidence={"targets_beyond": share},
            )
        ]
