"""Does nothing get learnt because the inputs are not of the size that weights are made for?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import (
    contrast,
    deviations,
    feature_evidence,
    large_from_start,
    offending_features,
)
from lightning_gradflow.detectors.known import input_point, known_rows, layer_mask, newest_known
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import (
    keeps_residual,
    present_loss,
    steps_at_full_rate,
    steps_needed,
    still_falls,
)
from lightning_gradflow.detectors.unscaled_targets import never_near
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_TAKEN_UP = 0.03  # of the usual size; usual networks hand on more than a tenth
_LARGE_STEP = 0.1  # share of its weights that one step changes: ten times what is usual at the start of a run
_OVERGROWN = 3.0  # times the norm of the first weights: a ninth of the square is left of them
_USUAL_GAIN = 0.5  # largest singular value; most initialisations give 0.6 to 3
_ENOUGH = 16  # losses
_BEYOND = 10.0  # deviations of the targets: outputs that are larger at first are so by the size of the inputs


@dataclass(frozen=True)
class UnscaledInputs:
    """Finds inputs that the first layer cannot tell apart, where nothing is learnt.

    A step of gradient descent on `W x + b` changes the output for another input x' by `1 + x . x'` times what it is
    asked for. With mean m and deviation s of each feature, what all inputs have in common counts `1 + sum m^2` in that,
    and what tells them apart `sum s^2`. Their ratio is the contrast,

        contrast = sum s^2 / (1 + sum m^2),

    the number of features where they are standardised, 1 for one-hot vectors and about 10 for pixels in [0, 1]. Descent
    on the common part takes up the step size that it can bear, so that what is to be learnt is slower by the contrast,
    and with Adam by its root. It is a finding if all of these hold:

    - the contrast is below `min_contrast`, in the first sample and in the newest one; or the inputs are too large (see
      `offending_features`), and have been so from the start: so large that the first layer gives the same for all;
    - no layer takes the inputs up: of no output is the part that differs between samples above 3 % of the usual size.
      A normalisation brings it there, weights that were made for such inputs do, and so does training in time. What
      dropout does is no sign of it: while nothing is learnt, only what stands in front of the first one counts;
    - there was time to learn: `patience` steps, or 20 % of the planned ones if that is more (300 at most), since the
      learning rate last rose;
    - nothing is learnt: not by 5 % of the loss from the start, or nothing more since the middle of the run.

    Inputs that are too large do harm in another way: the first steps are so large that they
    overwrite the weights, and those that come out of it are too large for any later step to change. The loss says
    little there, for it starts as far above what a constant gives as the inputs are too large. It is a finding if all
    of these hold:

    - the inputs are unscaled, and have been so from the start;
    - a step has changed a tenth of a layer's weights or more, and those of the median layer have three times the norm
      that they started with, which was no unusually small one;
    - the gradient at the output is at least half of the first one: a constant leaves as much, whatever the labels;
    - there was time to learn, and the loss has not fallen by 2 % since the middle of the run.

    In a regression they may leave the weights as they are, and make outputs far beyond the targets: the run is spent on
    the way back from there. It is a finding if the inputs are unscaled, and have been so from the start; the first
    outputs and their error had ten times the deviation of the targets (`compared_rms`, `residual_rms`,
    `target_deviation`) or more; and no sample of a fifth of the planned steps (300 where nobody knows how many) had an
    error below that deviation, which a constant leaves.

    Not judged: several optimizers, whose losses play against each other; inputs of which the spread is below the
    rounding of single precision, for nothing can be done about these; inputs that were not measured.

    Args:
        min_contrast: in [0, 1). The default of 1e-4 is a single feature with a deviation of 0.01, or at 100 deviations
            from 0: from there on SGD is slower by four decades, Adam by two.
        patience: steps, in [1, inf). By default 50: by then a network on standardised inputs has learnt something.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        LeCun et al. 1998, Efficient BackProp, sections 4.3 and 5.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1")])
        >>> history.add_features(1)
        >>> values = {"input_rms": [1e-4], "input_deviation": [1e-4], "output_rms": [0.5], "output_spread": [1e-4]}
        >>> row = {name: np.array(value) for name, value in values.items()}
        >>> history.append(Row(step=50, values=row, losses=np.full(51, 2.3)))
        >>> [(str(f.kind), f.cause, f.layers) for f in UnscaledInputs().judge(history)]
        [('loss_plateau', 'unscaled_inputs', ('fc1',))]
    """

    min_contrast: float = 1e-4
    patience: int = 50

    def __post_init__(self) -> None:
        check_range("min_contrast", self.min_contrast, 0, 1, open_low=False)
        check_range("patience", self.patience, 1, float("inf"), open_low=False, whole=True)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows or history.scalar("optimizers")[-1] > 1:
            return []
        return self._alike(history) or self._overgrown(history) or self._far_off(history)

    def _alike(self, history: History) -> list[Finding]:
        """Inputs that differ too little."""
        rows = np.flatnonzero(known_rows(history, "input_deviation"))
        if not rows.size:
            return []
        is_even = all(contrast(history, row) < self.min_contrast for row in (rows[0], rows[-1]))
        is_large = large_from_start(history) and bool(offending_features(history))
        if not (is_even or is_large) or not taken_up(history) < _TAKEN_UP or not self._had_time(history):
            return []
        if has_learnt(history) and still_falls(history):
            return []
        if not is_even:
            return [] if has_learnt(history) else [self._finding(history, feature_evidence(history))]
        mean, deviation = deviations(history, rows[-1])
        evidence = {
            "input_deviation": float(np.sqrt(np.mean(np.square(deviation)))),
            "input_mean": float(np.sqrt(np.mean(np.square(mean)))),
        }
        return [self._finding(history, evidence)]

    def _overgrown(self, history: History) -> list[Finding]:
        """Inputs so large that the first steps have overwritten the weights, and nothing can make up for that."""
        if not self._had_time(history) or not large_from_start(history) or not offending_features(history):
            return []
        if not _weights_grew(history) or not keeps_residual(history) or still_falls(history):
            return []
        return [self._finding(history, feature_evidence(history))]

    def _far_off(self, history: History) -> list[Finding]:
        """Inputs so large that the outputs of a regression start far beyond the targets, and are no better since."""
        if not large_from_start(history) or not offending_features(history):
            return []
        names = ("compared_rms", "residual_rms", "target_deviation")
        output, error, deviation = (float(history.scalar(name)[0]) for name in names)
        # outputs that start at the mean of the targets are large as well
        if not (output >= _BEYOND * deviation and error >= _BEYOND * deviation and never_near(history)):
            return []
        sizes = {"output_rms": output, "target_deviation": deviation}
        return [self._finding(history, feature_evidence(history) | sizes)]

    def _finding(self, history: History, evidence: dict[str, float]) -> Finding:
        at = input_point(history)
        return Finding(
            kind=FindingKind.LOSS_PLATEAU,
            severity=Severity.WARNING,
            step=history.rows[-1].step,
            layers=(history.points[at].module,) if at is not None else (),
            cause="unscaled_inputs",
            evidence={
                "steps": float(steps_at_full_rate(history)),
                "loss": present_loss(history),
                **evidence,
            },
        )

    def _had_time(self, history: History) -> bool:
        enough = np.isfinite(history.losses).sum() >= _ENOUGH
        return bool(enough) and steps_at_full_rate(history) >= steps_needed(history, self.patience)


def taken_up(history: History) -> float:
    """How much of the usual size differs between samples, in the output of the layer where most does; NaN: not known.

    Of an output it is the part around the batch mean, over the whole; and of one that is small in itself, over 1.
    While nothing is learnt only the layers in front of the first dropout are asked: it makes samples differ too. Nor is
    the last one: that it has brought what all share down to a constant is no sign of more.
    """
    spread, size = (newest_known(history, name) for name in ("output_spread", "output_rms"))
    if spread is None or size is None:
        return math.nan
    asked = layer_mask(history)
    names, dropped_at = [point.module for point in history.points], history.dropped_at
    if dropped_at in names and not has_learnt(history):
        asked = asked & (np.arange(len(names)) < names.index(dropped_at))
    if asked.sum() > 1 and keeps_residual(history):
        asked = asked & (np.arange(len(asked)) < np.flatnonzero(asked)[-1])
    parts = (spread * np.minimum(size, 1.0))[asked]
    parts = parts[~np.isnan(parts)]
    return float(parts.max()) if parts.size else math.nan


def _weights_grew(history: History) -> bool:
    """Whether steps have left next to nothing of the weights that the median layer started from.

    The usual steps at the start of a run change a hundredth of them. To grow is the way out for weights that started
    too small: these do not count.
    """
    first = known_rows(history, "weight_norm").argmax()
    norms, ratios, usual = history["weight_norm"], history["update_ratio"], history["spectral_norm"][first]
    with np.errstate(all="ignore"):
        growth = norms[-1] / norms[first]
    growth = growth[np.isfinite(growth) & (usual >= _USUAL_GAIN)]
    was_large = bool((np.nan_to_num(ratios) >= _LARGE_STEP).any())
    return was_large and growth.size > 0 and bool(np.median(growth) >= _OVERGROWN)
