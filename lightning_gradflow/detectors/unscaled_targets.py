"""Are the targets far larger than what the network gives?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import layer_mask, newest_values
from lightning_gradflow.detectors.standstill import LONGEST, PATIENCE, present_loss, steps_at_full_rate, steps_needed
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_FIRST = 10  # steps that tell how fast outputs grow
_RISEN = 3.0  # times the first loss
_TOLD = 3  # losses that tell so: one alone is that of a batch
_OFFSET = 3.0  # deviations of the targets that the first error is: their mean is what it is made of
_FAR = 10.0  # of the first error: what is less is made up soon
_WORSE = 1.5  # deviations: a constant leaves one
_GONE = 0.05  # of the first error: what is left of it then is no offset
_SHARE = 0.2  # of the planned steps
_ALIKE = 0.05  # share by which the sizes of some outputs and of all may differ


FAR_OFF = 30.0
"""Error, as a root mean square, of targets that outputs of size 1 are far from."""


@dataclass(frozen=True)
class UnscaledTargets:
    """Finds a regression whose targets are so large that the network would first have to grow its outputs.

    Outputs start with a size of 1. Where targets are prices or years, what a squared or absolute error is made of is as
    large as they are (`residual_rms`). With Adam, whose steps are of the size of the learning rate, it may take longer
    than the run to get there; with SGD the first steps, which grow with the error, are too large.

    It is a finding (`loss_mismatch`, `unscaled_targets`) if in the first sample the error was above `min_error` and
    more than ten times as large as the outputs that it is made of (`compared_rms`), and one of these is so: it still is
    when the run had time to learn something (`steps_needed`, or 300 steps where nobody knows how long the run will be);
    the outputs would not get to a tenth of it in the planned steps, if they went on to grow with the square of the
    steps, as behind a hidden layer; the losses of the first 50 steps are not finite any more, or three times the first.

    Targets such as 293 +- 8 have a mean far from 0 beside their deviation (`target_deviation`). On the way there all
    layers learn nothing else, and what they started with is lost. So it is a finding too if the first error was above
    10, and three deviations or more, and no sample of a fifth of the planned steps (300 where nobody knows how many)
    came within 1.5 deviations, for a constant leaves one, and a twentieth of the first error or more is left.

    Args:
        min_error: root mean square of outputs less targets, in (0, inf). By default 30: to that size a last layer grows
            in some hundred steps.
        min_times: how many times the outputs the error is, in (1, inf). By default 10: what is less is made up soon.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.5.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("out", "out")])
        >>> for step, given in ((0, 0.3), (60, 2.0)):
        ...     sizes = {"residual_rms": 500.0, "compared_rms": given, "planned_steps": 100.0}
        ...     history.append(Row(step, {"output_rms": np.array([given])}, sizes, losses=np.full(60, 250_000.0)))
        >>> [(f.cause, f.layers) for f in UnscaledTargets().judge(history)]
        [('unscaled_targets', ('out',))]
    """

    min_error: float = FAR_OFF
    min_times: float = 10.0

    def __post_init__(self) -> None:
        check_range("min_error", self.min_error, 0, float("inf"))
        check_range("min_times", self.min_times, 1, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        errors, outputs = history.scalar("residual_rms"), history.scalar("compared_rms")
        known = np.flatnonzero(~np.isnan(errors))
        if not known.size or known[0] != 0:
            return []
        error, output = float(errors[known[-1]]), float(outputs[known[-1]])
        is_far = self._is_far(errors[0], outputs[0]) and self._stays_far(history, error, output)
        if not is_far and not _lags(history):
            return []
        evidence = {"error": error, "output_rms": output, "steps": float(history.rows[-1].step)}
        deviation = float(history.scalar("target_deviation")[known[-1]])
        evidence |= {} if math.isnan(deviation) else {"target_deviation": deviation}
        return [
            Finding(
                kind=FindingKind.LOSS_MISMATCH,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=_layer_of(history, output),
                cause="unscaled_targets",
                evidence=evidence | {"loss": present_loss(history)},
            )
        ]

    def _stays_far(self, history: History, error: float, output: float) -> bool:
        """Whether outputs that were far smaller than the error still are, or will be, or have broken on the way."""
        steps, planned = steps_at_full_rate(history), _planned(history)
        at_the_end = output * (max(planned - history.rows[-1].step, 0.0) / steps + 1) ** 2 if steps else math.inf
        had_time = steps >= (steps_needed(history) if planned > 0 else LONGEST)
        had_time |= planned > 0 and steps >= _FIRST and self._is_far(error, at_the_end)
        return _has_broken(history) or (had_time and self._is_far(error, output))

    def _is_far(self, error: float, output: float) -> bool:
        return self.min_error < error < math.inf and error > self.min_times * output


def were_offset(history: History) -> bool:
    """Whether the targets of the first sample had a mean far from 0, and from the outputs, beside their deviation.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(0, {}, {"residual_rms": 293.0, "compared_rms": 0.3, "target_deviation": 8.0}))
        >>> were_offset(history)
        True
    """
    names = ("residual_rms", "compared_rms", "target_deviation")
    error, output, deviation = (float(values[0]) if (values := history.scalar(n)).size else math.nan for n in names)
    return _FAR * max(output, 1.0) < error < math.inf and error >= _OFFSET * deviation


def never_near(history: History, times: float = 1.0) -> bool:
    """Whether no sample of a fifth of the planned steps came near the targets; of 300 where nobody knows how many.

    Args:
        history: where to read; False where errors and deviations of targets are not known.
        times: deviations of the targets that are near, in (0, inf); a constant leaves one.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> for step, error in ((0, 40.0), (100, 3.0)):
        ...     said = {"residual_rms": error, "target_deviation": 1.0, "planned_steps": 500.0}
        ...     history.append(Row(step, {}, said))
        >>> never_near(history), never_near(history, 5.0)
        (True, False)
    """
    planned = _planned(history)
    enough = max(PATIENCE, _SHARE * planned) if planned > 0 else LONGEST
    if steps_at_full_rate(history) < enough:
        return False
    errors, deviations = history.scalar("residual_rms"), history.scalar("target_deviation")
    known = ~np.isnan(errors) & ~np.isnan(deviations)
    errors, deviations = errors[known], deviations[known]
    # targets that are alike in each batch, as neighbours in time, say little of how much they differ
    return errors.size > 0 and bool(deviations.min() > 0) and bool((errors > times * deviations).all())


def _lags(history: History) -> bool:
    """Whether a run is on the way to the mean of its targets after a fifth of its steps."""
    if not were_offset(history) or not never_near(history, _WORSE):
        return False
    errors = history.scalar("residual_rms")
    newest = errors[~np.isnan(errors)][-1]
    return bool(_GONE * errors[0] < newest < math.inf)


def _planned(history: History) -> float:
    return float(np.nan_to_num(history.scalar("planned_steps")[-1]))


def _has_broken(history: History) -> bool:
    """Whether a young run has diverged."""
    losses = history.losses
    if not losses.size or history.rows[-1].step > PATIENCE:
        return False
    newest = losses[1:][-_TOLD:]
    return not math.isfinite(losses[-1]) or (newest.size > 0 and float(np.median(newest)) > _RISEN * abs(losses[0]))


def _layer_of(history: History, output: float) -> tuple[str, ...]:
    """The layer whose output is as large as what is compared, the last of them; the last of all where none is."""
    layers = np.flatnonzero(layer_mask(history))
    sizes = newest_values(history, "output_rms")[layers]
    with np.errstate(all="ignore"):
        alike = layers[np.abs(sizes / output - 1) < _ALIKE]
    found = alike if alike.size else layers
    return (history.points[found[-1]].module,) if found.size else ()
