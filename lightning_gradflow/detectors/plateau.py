"""Has the loss stopped to fall before anything was learnt?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.plateau_causes import AGREE, cause_of, is_unpaired, line_of
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.small_steps import clipped_away
from lightning_gradflow.detectors.trend import mann_kendall, steepest_fall, theil_sen
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History

_BLOCKS = 32
_FIRST = 3  # losses: the next ones may have learnt already
_TRIFLE = 1e-4  # of the loss: batches differ by more, unless most of it is a constant
_CLEAR = 5.0  # times the noise of a batch
_SHIFTED = 0.01  # of the starting loss
_GROWTH = 1.5  # from one length of a stretch to the next
_SURE = 2.5  # z score of "no faster than this", twice running: healthy runs are judged at hundreds of samples
_FALLS = -1.645  # z of the Mann-Kendall test: a falling trend at 5 %, one-sided
_SMALL_LR = 0.1  # of the largest one so far: below, the tail of a schedule explains a flat loss
_STILL = 1e-3  # of the weights, in a whole window: healthy runs move as much in one step
_SLOW = 0.05  # in a window: so much is gained by learning noise by heart; it only leads to a measurement
_LEFT = 0.5  # of the starting loss: below, something was learnt
_LONG_EPOCH = 5  # windows: longer epochs are not waited for


@dataclass(frozen=True)
class LossPlateau:
    """Finds a loss that does not fall although the run has learnt next to nothing yet.

    progress = -slope * window / |median loss|, over 32 block means of a stretch of steps. What is judged is the most
    progress that the noise leaves room for (`steepest_fall`, so only the same phase of an epoch is compared where the
    epoch is known): it must be below `min_progress`, now and half a stretch ago. The stretch is the last `window`
    steps; where small batches make the loss too noisy to be sure, longer ones are tried, as far as the run goes back.

    Where the loss is too noisy for all of that, and the weights move by less than 0.1 % in `window` steps, it counts as
    standing still too; it is a finding then if longer steps are seen to help.

    The cause is the first that holds: a loss that was once driven above its start (`learning_rate_too_large`), a signal
    that vanishes, dead units, blocked saturated activations, updates below the precision of the weights
    (`learning_rate_too_small`), inputs that are all alike (`no_signal_in_data`). Else the loss along the update tells,
    which is measured once a plateau is suspected: a gain of 1 % on other batches at 1000 steps at once or more (0.1 %
    where the gradients have a common direction) is `learning_rate_too_small`; a loss that one step raises by 1 % and a
    tenth of it does not as much is `learning_rate_too_large`; gradients without a common direction are
    `no_signal_in_data`.

    Where labels are random, a loss above what a constant gives falls to it, and then on while samples are learnt by
    heart. So a run that keeps half of its starting loss and falls by less than 5 % in `window` steps, twice running, is
    suspected too (`suspects`): that makes it measured and no finding. It is `no_signal_in_data`, a warning, where that
    finds no relation between inputs and targets (see `pairing`): a gap below 15 %, and no agreement (z below 2.5).

    It is a warning where another sign explains it, or where less than 1 % of the starting loss is gone. A loss that
    has clearly fallen by more, and stands, may have a large constant in it or little to learn from: that is info, and
    so is one of unknown cause on whose gradients the batches agree.

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
        steps, losses = self._at_full_rate(history)
        if not steps.size or self._validation_falls(history):
            return []
        length, is_sure = None, False
        if not has_learnt(history, self.min_learnt, self.window):
            length = self._standstill(steps, losses, self._epoch(history))
            is_sure = length is not None
            if length is None and self._hardly_moves(history) and steps[-1] - steps[0] + 1 >= 1.5 * self.window:
                length = float(self.window)
        if not is_sure and is_unpaired(history) and self.suspects(history):
            shortest = self._shortest(steps, self._epoch(history))
            if (cause := cause_of(history)) == "no_signal_in_data":
                return [self._finding(history, steps, losses, shortest, cause, Severity.WARNING)]
        if length is None:
            return []
        cause = cause_of(history)
        if not is_sure and cause != "learning_rate_too_small" and not (cause == "unknown" and not line_of(history)):
            return []
        was_shifted = has_learnt(history, _SHIFTED, self.window) or not is_sure
        return [self._finding(history, steps, losses, length, cause, _severity(history, cause, was_shifted))]

    def suspects(self, history: History) -> bool:
        """Whether it is worth a measurement if there is anything to learn, although the loss may fall a little.

        Noise in the loss and learning by heart hide for long that nothing is learnt. What is asked here is only that
        the Theil-Sen slope is below 5 % in `window` steps, twice running, and that half of the starting loss is left.
        """
        if not history.rows or history.scalar("optimizers")[-1] > 1:
            return False
        steps, losses = self._at_full_rate(history)
        if not steps.size:
            return False
        length = self._shortest(steps, self._epoch(history))
        start = float(np.median(losses[: max(1, min(10, len(losses) // 10))]))
        if steps[-1] - steps[0] + 1 < 1.5 * length or losses.min() <= 0:
            return False
        if np.median(losses[steps > steps[-1] - length]) < _LEFT * start:
            return False
        for back in (0.0, length / 2):
            chosen = (steps <= steps[-1] - back) & (steps > steps[-1] - back - length)
            if chosen.sum() < _BLOCKS:
                return False
            at, blocks = (
                np.array([part.mean() for part in np.array_split(series[chosen], _BLOCKS)])
                for series in (steps, losses)
            )
            if abs(theil_sen(at, blocks)) * self.window >= _SLOW * np.median(blocks):
                return False
        return True

    def _finding(
        self, history: History, steps: Floats, losses: Floats, length: float, cause: str, severity: Severity
    ) -> Finding:
        stretch = steps > steps[-1] - length
        now = float(np.median(losses[stretch]))
        moved = theil_sen(steps[stretch], losses[stretch]) * length
        progress = -moved / abs(now) if now else 0.0
        return Finding(
            kind=FindingKind.LOSS_PLATEAU,
            severity=severity,
            step=history.rows[-1].step,
            cause=cause,
            evidence={"progress": progress, "steps": length, "loss": now, **line_of(history), **clipped_away(history)},
        )

    def _at_full_rate(self, history: History) -> tuple[Floats, Floats]:
        """The finite losses and their steps, at the learning rate that matters; none where the last one is not."""
        finite = np.isfinite(history.losses)
        steps, losses = history.loss_steps[finite], history.losses[finite]
        learning = _at_full_rate(history, steps)
        if not learning.size or not learning[-1]:
            return np.empty(0), np.empty(0)
        return steps[learning], losses[learning]

    def _epoch(self, history: History) -> float:
        """Steps of an epoch, 0 where they are not known or too many to wait for."""
        epoch = float(np.nan_to_num(history.scalar("steps_per_epoch")[-1]))
        return epoch if epoch <= _LONG_EPOCH * self.window else 0.0

    def _shortest(self, steps: Floats, epoch: float) -> float:
        # where the loss is known at the samples only, a stretch has to be long enough to hold a value a block
        return max(float(self.window), 2 * epoch, float(steps[-1] - steps[-min(_BLOCKS, len(steps))] + 1))

    def _hardly_moves(self, history: History) -> bool:
        """Whether no layer can have moved far enough for the loss to fall, however much noise there is in it."""
        recent = history.steps > history.steps[-1] - self.window
        ratios = history["update_ratio"][recent]
        known = ratios[np.isfinite(ratios)]
        return known.size > 0 and bool(known.max() * self.window < _STILL)

    def _standstill(self, steps: Floats, losses: Floats, epoch: float) -> float | None:
        """Length of the shortest stretch in which the loss surely stood still, twice running; None without one."""
        length = self._shortest(steps, epoch)
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


def _severity(history: History, cause: str, was_shifted: bool) -> Severity:
    """An alarm where a sign explains it, or next to nothing was learnt."""
    if cause in ("unknown", "no_signal_in_data") and _has_large_constant(history):
        return Severity.INFO
    if cause == "no_signal_in_data" and is_unpaired(history):
        return Severity.WARNING
    if cause == "unknown" and line_of(history).get("gradient_agreement", 0.0) >= AGREE:
        return Severity.INFO  # the batches agree on where to go: slow, but not in vain
    if cause in ("unknown", "no_signal_in_data") and was_shifted:
        return Severity.INFO  # data with little to learn look the same as data with nothing to learn
    return Severity.WARNING


def _has_large_constant(history: History) -> bool:
    """Whether the loss is a constant with little on top of it, of which a part was clearly learnt all the same.

    Beside 100,000 a fall by 2 is nothing, and so is the noise of the batches: then it is not the scale to measure by.
    """
    losses = history.losses[np.isfinite(history.losses)]
    if len(losses) < _BLOCKS:
        return False
    start, now = float(np.median(losses[:_FIRST])), float(np.median(losses[-_BLOCKS:]))
    noise = float(np.median(np.abs(np.diff(losses))))
    return noise < _TRIFLE * abs(now) and _CLEAR * noise < start - now < 10 * _TRIFLE * abs(now)
