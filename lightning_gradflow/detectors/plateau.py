"""Has the loss stopped to fall before anything was learnt?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.detectors.trend import mann_kendall, theil_sen
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_BLOCKS = 32
_FALLS = -1.645  # z of the Mann-Kendall test: a falling trend at 5 %, one-sided
_SMALL_LR = 0.1  # of the largest one so far: below, warm-up or the tail of a schedule explains a flat loss


@dataclass(frozen=True)
class LossPlateau:
    """Finds a loss that does not fall although the run has learnt next to nothing yet.

    The last `window` steps, in 32 block means, have no falling trend (Mann-Kendall) and less than `min_progress` of
    robust progress (Theil-Sen slope over the window / |median|); the same held half a window ago, and for the validation
    loss where there are values enough. Not judged: while the learning rate is below a tenth of its maximum, and with
    several optimizers, whose losses play against each other. A run that has learnt, and then stands, has converged:
    that is no finding.

    Args:
        window: steps in a window, in [32, inf); at least one epoch, and 32 values, are taken. By default 200: shorter windows take
            the noise of small batches for standstill.
        min_progress: relative progress over the window that counts as falling, in (0, 1). By default 1 %.
        min_learnt: share of the starting loss that must be gone for the run to count as having learnt, in (0, 1). By
            default 5 %: above what the first steps gain by mere calibration of the output bias.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Mann 1945; Sen 1968.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=399, losses=2.3 + 0.01 * np.sin(np.arange(400.0))))
        >>> [(str(f.kind), f.cause) for f in LossPlateau().judge(history)]
        [('loss_plateau', 'unknown')]
    """

    window: int = 200
    min_progress: float = 0.01
    min_learnt: float = 0.05

    def __post_init__(self) -> None:
        check_range("window", self.window, _BLOCKS, float("inf"), open_low=False)
        check_range("min_progress", self.min_progress, 0, 1)
        check_range("min_learnt", self.min_learnt, 0, 1)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows or history.scalar("optimizers")[-1] > 1:
            return []
        steps, losses = history.loss_steps, history.losses
        learning = np.isfinite(losses) & ~_at_small_lr(history, steps)
        if not learning.size or not learning[-1]:
            return []
        steps, losses = steps[learning], losses[learning]
        per_epoch = np.nan_to_num(history.scalar("steps_per_epoch")[-1])
        # where the loss is known at the samples only, a window has to be long enough to hold a value a block
        sparse = float(steps[-1] - steps[-min(_BLOCKS, len(steps))] + 1)
        window = max(float(self.window), per_epoch, sparse)
        if steps[-1] - steps[0] + 1 < 1.5 * window:
            return []
        progress = [self._progress(steps, losses, steps[-1] - back, window) for back in (0.0, window / 2)]
        start = float(np.mean(losses[: max(1, min(10, len(losses) // 10))]))
        now = float(np.median(losses[steps > steps[-1] - window]))
        if start - now > self.min_learnt * abs(start):
            return []
        if not all(p is not None and p < self.min_progress for p in progress) or self._validation_falls(history):
            return []
        return [
            Finding(
                kind=FindingKind.LOSS_PLATEAU,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                cause=_cause(history),
                evidence={"progress": float(progress[0] or 0.0), "steps": window, "loss": now},
            )
        ]

    def _progress(self, steps: Floats, losses: Floats, end: float, window: float) -> float | None:
        """Robust relative progress over the window that ends at `end`; None where it is too thin, 1 where it falls."""
        chosen = (steps <= end) & (steps > end - window)
        if chosen.sum() < _BLOCKS:
            return None
        blocks = np.array([block.mean() for block in np.array_split(losses[chosen], _BLOCKS)])
        level = abs(float(np.median(blocks)))
        gained = -theil_sen(np.arange(_BLOCKS, dtype=np.float64), blocks) * (_BLOCKS - 1)
        progress = gained / level if level > 0 else 0.0
        return max(progress, 1.0) if mann_kendall(blocks) < _FALLS and progress >= self.min_progress else progress

    def _validation_falls(self, history: History) -> bool:
        """Whether the validation loss, where it is known at four times or more, still falls."""
        values = history.scalar("val_loss")
        values = values[np.isfinite(values)][-8:]
        if len(values) < 4:
            return False
        slope = theil_sen(np.arange(len(values), dtype=np.float64), values)
        return -slope * (len(values) - 1) > self.min_progress * abs(float(np.median(values)))


def _at_small_lr(history: History, steps: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """(S,) where the learning rate was below a tenth of its maximum; False where it is not known."""
    rates = history.scalar("lr")
    known = np.isfinite(rates)
    if not known.any():
        return np.zeros(len(steps), dtype=bool)
    at = np.interp(steps, history.steps[known], rates[known])
    return np.asarray(at < _SMALL_LR * rates[known].max())


def _cause(history: History) -> str:
    """What else is wrong at the same time, for a plateau is a consequence."""
    if VanishingGradient().judge(history):
        return "vanishing_gradient"
    if any(finding.severity.is_alarm for finding in DeadUnits().judge(history)):
        return "dead_units"
    return "unknown"
