"""Has the loss stopped to fall before anything was learnt?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.dead_units import mostly_dead
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.trend import mann_kendall, steepest_fall, theil_sen
from lightning_gradflow.detectors.vanishing import is_vanishing
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

Bools = npt.NDArray[np.bool_]

_BLOCKS = 32
_SHIFTED = 0.01  # of the starting loss
_GROWTH = 1.5  # from one length of a stretch to the next
_SURE = 2.5  # z score of "no faster than this", twice running: healthy runs are judged at hundreds of samples
_FALLS = -1.645  # z of the Mann-Kendall test: a falling trend at 5 %, one-sided
_SMALL_LR = 0.1  # of the largest one so far: below, the tail of a schedule explains a flat loss
_LONG_EPOCH = 5  # windows: longer epochs are not waited for


@dataclass(frozen=True)
class LossPlateau:
    """Finds a loss that does not fall although the run has learnt next to nothing yet.

    progress = -slope * window / |median loss|, over 32 block means of a stretch of steps. What is judged is the most
    progress that the noise leaves room for (`steepest_fall`, so only the same phase of an epoch is compared where the
    epoch is known): it must be below `min_progress`, now and half a stretch ago. The stretch is the last `window`
    steps; where small batches make the loss too noisy to be sure, longer ones are tried, as far as the run goes back.

    It is a warning where another sign explains it, or where less than 1 % of the starting loss is gone. A loss that
    has clearly fallen by more, and stands, may have a large constant in it or little to learn from: that is info.

    Not judged: while the learning rate rises or is below a tenth of its maximum, while the validation loss falls or the
    training loss clearly rises, and with several optimizers, whose losses play against each other. A run that has
    learnt, and then stands, has converged: that is no finding. Blind where the loss has both signs, for progress has no
    scale there.

    Args:
        window: steps in the shortest stretch, in [32, inf); two epochs, where they are not long, and 32 values at least
            are taken. By default 200: in less, a slow start looks like standstill.
        min_progress: relative progress in `window` steps that counts as falling, in (0, 1). By default 1 %.
        min_learnt: share of the starting loss that must be gone for the run to count as having learnt, in (0, 1). By
            default 5 %: above what the first steps gain by mere calibration of the output bias.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Mann 1945; Sen 1968; Hirsch, Slack and Smith 1982.

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
        check_range("window", self.window, _BLOCKS, float("inf"), open_low=False, whole=True)
        check_range("min_progress", self.min_progress, 0, 1)
        check_range("min_learnt", self.min_learnt, 0, 1)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows or history.scalar("optimizers")[-1] > 1:
            return []
        steps, losses = history.loss_steps, history.losses
        finite = np.isfinite(losses)
        steps, losses = steps[finite], losses[finite]
        learning = _at_full_rate(history, steps)
        if not learning.size or not learning[-1]:
            return []
        if has_learnt(history, self.min_learnt, self.window):
            return []
        steps, losses = steps[learning], losses[learning]
        epoch = float(np.nan_to_num(history.scalar("steps_per_epoch")[-1]))
        length = self._standstill(steps, losses, epoch if epoch <= _LONG_EPOCH * self.window else 0.0)
        if length is None or self._validation_falls(history):
            return []
        stretch = steps > steps[-1] - length
        now = float(np.median(losses[stretch]))
        level = abs(now)
        moved = theil_sen(steps[stretch], losses[stretch]) * length
        cause = _cause(history)
        was_shifted = has_learnt(history, _SHIFTED, self.window)
        return [
            Finding(
                kind=FindingKind.LOSS_PLATEAU,
                severity=Severity.WARNING if cause != "unknown" or not was_shifted else Severity.INFO,
                step=history.rows[-1].step,
                cause=cause,
                evidence={"progress": -moved / level if level > 0 else 0.0, "steps": length, "loss": now},
            )
        ]

    def _standstill(self, steps: Floats, losses: Floats, epoch: float) -> float | None:
        """Length of the shortest stretch in which the loss surely stood still, twice running; None without one."""
        # where the loss is known at the samples only, a stretch has to be long enough to hold a value a block
        length = max(float(self.window), 2 * epoch, float(steps[-1] - steps[-min(_BLOCKS, len(steps))] + 1))
        while steps[-1] - steps[0] + 1 >= 1.5 * length:
            whole = epoch * math.ceil(length / epoch) if epoch else length
            most = [self._most_progress(steps, losses, steps[-1] - back, whole, epoch) for back in (0.0, length / 2)]
            # a loss that surely rises does not stand still: it may be one that is not meant to fall
            if max(most) < self.min_progress and min(most) > -self.min_progress:
                return length
            length *= _GROWTH
        return None

    def _most_progress(self, steps: Floats, losses: Floats, end: float, length: float, epoch: float) -> float:
        """The most relative progress in `window` steps that the noise leaves room for, in the stretch up to `end`."""
        chosen = (steps <= end) & (steps > end - length)
        if chosen.sum() < _BLOCKS or losses[chosen].min() <= 0 <= losses[chosen].max():
            return math.inf
        epochs = round(length / epoch) if epoch else 1
        per_epoch = max(1, _BLOCKS // epochs)
        count = per_epoch * min(epochs, _BLOCKS)
        place = np.ceil((steps[chosen] - end + length) / length * count).astype(np.int64) - 1
        sizes = np.bincount(place, minlength=count)
        filled = np.flatnonzero(sizes)
        blocks: Floats = (np.bincount(place, losses[chosen], count)[filled] / sizes[filled]).astype(np.float64)
        level = abs(float(np.median(blocks)))
        seasons = filled % per_epoch if epoch else np.zeros_like(filled)
        at = filled.astype(np.float64) * (length / count)
        fall = -steepest_fall(at, blocks, seasons, _SURE) * self.window
        return fall / level

    def _validation_falls(self, history: History) -> bool:
        """Whether the validation loss, where it is known at four times or more, still falls."""
        values = history.scalar("val_loss")
        values = values[np.isfinite(values)][-8:]
        if len(values) < 4 or mann_kendall(values) > _FALLS:
            return False
        slope = theil_sen(np.arange(len(values), dtype=np.float64), values)
        return -slope * (len(values) - 1) > self.min_progress * abs(float(np.median(values)))


def _at_full_rate(history: History, steps: Floats) -> Bools:
    """(S,) where the learning rate neither rose nor was below a tenth of its maximum; True where it is not known."""
    rates = history.scalar("lr")
    known = np.isfinite(rates)
    if not known.any():
        return np.ones(len(steps), dtype=bool)
    rates, at = rates[known], history.steps[known]
    after = np.minimum(np.searchsorted(at, steps), len(at) - 1)
    before = np.maximum(after - 1, 0)
    return np.asarray((rates[after] <= rates[before]) & (rates[after] >= _SMALL_LR * rates.max()))


def _cause(history: History) -> str:
    """What else is wrong at the same time, for a plateau is a consequence."""
    if is_vanishing(history):
        return "vanishing_gradient"
    if mostly_dead(history):
        return "dead_units"
    return "unknown"
