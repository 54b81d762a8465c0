"""Do hidden activations work at their bounds, and does that block the gradient?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import feature_evidence, inputs_jumped, is_measured, offending_features
from lightning_gradflow.detectors.known import first_values, layer_mask
from lightning_gradflow.detectors.onset import loss_rose, weight_growth
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.shut_gates import gate_mask, shut_gates
from lightning_gradflow.detectors.small_steps import MIN_REACH, too_small
from lightning_gradflow.detectors.update_sizes import ratios_of
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History

_WIDE = 0.7  # of the outputs, in most activations: from there on plain stacks learn far worse than with smaller weights
_HALF = 0.5  # is enough where the last layer is too large as well: most tanh stacks then end ten times as high
_LARGE_OUTPUT = 3.0  # rms: networks that learn start with less
_PATIENCE = 50  # steps: as long as for units that are dead
_OPEN = 0.5  # at most so many outputs are saturated in an activation that was well
_GROWN = 1.5  # times the weight norm: an odd batch saturates an activation too, and leaves the weights as they are
_SHUT = 0.01  # factor on the delta norm: of outputs that are wrong and at the bound, next to nothing comes back


@dataclass(frozen=True)
class SaturatedActivation:
    """Finds bounded activations (sigmoid, tanh, ...) that stand near their bounds and let no gradient through.

    Two signs must line up in each of the last three samples: the share of saturated outputs, and the factor by which
    the delta norm shrinks on its way back through the activation. One sample is enough where the activation was open a
    moment ago, the weights before it have grown by half since, and the loss has risen. Less is enough, 70 % and no
    shrinking, where most of at least two activations have had it from the start: such a network is all but made of
    switches, and the large weights between them hide what the activations hold back. 50 % of a single one are enough if
    the first outputs of the last layer differ between samples by more than 3: that layer is too large as well. Gates,
    whose output is multiplied with another signal, and activations behind the last layer are left out: they saturate by
    design. Yet none is made to be shut at the start: where most of the gates are, in the first sample, and the last
    layer is too large, they count like the others; and so does each that is shut then, where inputs are unscaled. And
    where all of them are shut, from the start and for good (see `shut_gates`), that is an alarm, whatever is learnt.

    Behind the last layer it is a finding only where the activation was shut from the start, lets at most 1 % of the
    gradient through, and no step gets anywhere for it (see `too_small`).

    It is an alarm as long as the run has not learnt anything, or where the loss rose with it. Saturation that lets
    the gradient through is info until it has lasted 50 steps and nothing was learnt: of what comes in, such an
    activation passes on little more than the sign. A drift is info where several optimizers work against each other,
    whose losses do not tell.

    The cause is `drift` where it was not so in the first samples; else `unscaled_inputs` in the first activation if the
    inputs are (see `offending_features`; where they were not measured, if no other activation saturates), else
    `weight_scale`.

    Of a recurrence that stands first the share is that of its gates which the input alone shuts; what that does to the
    gradient is not seen outside of it, and not asked for.

    Args:
        max_saturated: share of saturated outputs, in (0, 1]. By default 0.9.
        min_gain: factor on the delta norm below which the activation blocks the signal, in (0, 1). The default of 0.1
            is a third of what a tanh with 90 % of its outputs saturated and the others linear lets through.
        samples: samples in a row, in [1, inf). The default of 3 is reached at step 2.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1"), Point("act", "act", "tanh"), Point("fc2", "fc2")])
        >>> nan = np.nan
        >>> sick = {"saturated_fraction": np.array([nan, 0.99, nan]), "delta_norm": np.array([1e-3, 1.0, 1.0])}
        >>> history.append(Row(step=0, values=sick))
        >>> [(f.severity.value, f.layers) for f in SaturatedActivation(samples=1).judge(history)]
        [('warning', ('act',))]
    """

    max_saturated: float = 0.9
    min_gain: float = 0.1
    samples: int = 3

    def __post_init__(self) -> None:
        check_range("max_saturated", self.max_saturated, 0, 1, open_high=False)
        check_range("min_gain", self.min_gain, 0, 1)
        check_range("samples", self.samples, 1, float("inf"), open_low=False, whole=True)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        found = self._hidden(history) or self._output(history)
        return found or shut_gates(history, self.samples, _gains(history["delta_norm"]))

    def _output(self, history: History) -> list[Finding]:
        """An activation behind the last layer that was shut from the start, for which no step gets anywhere."""
        table, layers = history["saturated_fraction"], layer_mask(history)
        outputs = np.asarray(np.logical_or.accumulate(layers) & ~_before_a_layer(history))
        rows = np.flatnonzero(_known_rows(history, outputs))
        if len(rows) < self.samples or rows[-1] != len(history) - 1:
            return []
        chosen = np.concatenate([rows[: self.samples], rows[-self.samples :]])
        gains = _gains(history["delta_norm"][chosen])
        shut = (table[chosen] >= self.max_saturated) & (gains <= _SHUT)
        places = np.flatnonzero(outputs & shut.all(axis=0))
        if not places.size:
            return []
        # a prior that is rare stands near the bound as well, and learns: there the steps are as large as anywhere
        reach = next((found.evidence["reach"] for found in too_small(history, ratios_of(history), MIN_REACH)), None)
        if reach is None:
            return []
        first = int(places[0])
        shares = {"saturated_fraction": float(table[-1, first]), "activation_gain": float(gains[-1, first])}
        before = [int(np.flatnonzero(layers[:i])[-1]) for i in places]
        return [
            Finding(
                kind=FindingKind.SATURATED_ACTIVATION,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(dict.fromkeys(history.points[i].module for i in before)),
                cause="weight_scale",
                evidence={**shares, "reach": reach},
            )
        ]

    def _hidden(self, history: History) -> list[Finding]:
        table, hidden = history["saturated_fraction"], self._judged(history)
        rows = np.flatnonzero(_known_rows(history, hidden))
        if not rows.size or rows[-1] != len(history) - 1:
            return []
        recent = rows[-self.samples :]
        shares, early = (np.where(hidden, table[some], np.nan) for some in (recent, rows[: self.samples]))
        gains = _gains(history["delta_norm"][recent])
        over = np.nan_to_num(shares) >= self.max_saturated
        # how much gets past the gates of a recurrence is not seen outside of it
        blocks = over & (layer_mask(history) | (np.nan_to_num(gains, nan=1.0) <= self.min_gain))
        is_full = len(recent) == self.samples
        saturated, blocked = over.all(axis=0) & is_full, blocks.all(axis=0) & is_full
        sudden = self._sudden(history, shares, blocks[-1], recent)
        wide = _wide(np.concatenate([early, shares]), starts_large=_starts_large(history)) & is_full
        if not (saturated | sudden | wide).any():
            return []
        chosen = next(mask for mask in (blocked | sudden, wide, saturated) if mask.any())
        places = sorted(np.flatnonzero(chosen), key=lambda i: -shares[-1, i])
        worst, first = int(places[0]), int(min(places))
        at_start = float(np.nan_to_num(early[:, first]).min())
        from_start = bool(wide[first] or (at_start >= self.max_saturated and not sudden[first]))
        cause = _cause(history, shares[-1] >= min(self.max_saturated, _WIDE), first) if from_start else "drift"
        if cause == "drift" and inputs_jumped(history):
            cause = "unscaled_inputs"
        evidence = {"saturated_fraction": float(shares[-1, worst])}
        if np.isfinite(gains[-1, worst]):
            evidence["activation_gain"] = float(gains[-1, worst])
        well = np.flatnonzero(table[:, first] <= _OPEN)
        stops = blocked | wide | (saturated & self._lasts(history, rows))
        alarm = bool(stops.any()) and _stops(history, from_start, int(well[-1]) if well.size else None)
        return [
            Finding(
                kind=FindingKind.SATURATED_ACTIVATION,
                severity=Severity.WARNING if alarm or sudden.any() else Severity.INFO,
                step=history.rows[-1].step,
                layers=tuple(dict.fromkeys(history.points[i].module for i in places)),
                cause=cause,
                evidence=evidence | (feature_evidence(history) if cause == "unscaled_inputs" else {}),
            )
        ]

    def _judged(self, history: History) -> Bools:
        """(P,) the activations before a layer; gates only where weights or unscaled inputs shut them from the start."""
        before_a_layer, gates = _before_a_layer(history), gate_mask(history)
        first = np.where(before_a_layer & gates, first_values(history, "saturated_fraction"), np.nan)
        known = first[~np.isnan(first)]
        if known.size and _starts_large(history) and np.median(known) >= self.max_saturated:
            return before_a_layer
        if offending_features(history):
            return np.asarray(before_a_layer & (~gates | (first >= self.max_saturated)))
        return np.asarray(before_a_layer & ~gates)

    def _lasts(self, history: History, rows: npt.NDArray[np.intp]) -> Bools:
        """(P,) the activations that were saturated in all samples of the last 50 steps, if the run is that old."""
        last = history.steps[-1]
        recent = rows[history.steps[rows] >= last - _PATIENCE]
        # the sample before them says that it was there when they began, where none was taken at that very step
        recent = rows[max(0, len(rows) - len(recent) - 1) :]
        if history.steps[recent[0]] > last - _PATIENCE:
            return np.zeros(len(history.points), dtype=bool)
        return np.asarray((history["saturated_fraction"][recent] >= self.max_saturated).all(axis=0))

    def _sudden(self, history: History, shares: Floats, blocks: Bools, rows: npt.NDArray[np.intp]) -> Bools:
        """(P,) the activations that were open in one of the samples before, and which a step has closed."""
        sudden = np.zeros(len(blocks), dtype=bool)
        for i in np.flatnonzero(blocks & (shares[:-1] <= _OPEN).any(axis=0)):
            well = int(rows[:-1][shares[:-1, i] <= _OPEN][-1])
            sudden[i] = weight_growth(history, int(i), well) >= _GROWN and loss_rose(history, well)
        return sudden


def _before_a_layer(history: History) -> Bools:
    """(P,) the points behind which there is a layer, or which are one."""
    return np.asarray(np.logical_or.accumulate(layer_mask(history)[::-1])[::-1])


def _known_rows(history: History, hidden: Bools) -> Bools:
    """(R,) the rows in which it was measured at one of the hidden (P,) activations."""
    table = history["saturated_fraction"]

    def find(start: int) -> Bools:
        return np.asarray((~np.isnan(table[start:]) & hidden).any(axis=1))

    return history.facts.of_rows(("saturated", hidden.tobytes()), len(table), find)


def _wide(shares: Floats, *, starts_large: bool) -> Bools:
    """(P,) the activations that are partly saturated in each of the rows (R, P), if most of them are."""
    lowest = np.min(shares, axis=0)
    known = np.sort(lowest[~np.isnan(lowest)])
    if starts_large:
        return np.asarray(np.nan_to_num(lowest) >= _HALF, dtype=bool)
    if len(known) < 2 or known[(len(known) - 1) // 2] < _WIDE:
        return np.zeros(len(lowest), dtype=bool)
    return np.asarray(np.nan_to_num(lowest) >= _WIDE, dtype=bool)


def _starts_large(history: History) -> bool:
    """Whether the first outputs of the last layer differed by more than any usual initialisation makes."""
    layers = layer_mask(history)
    sizes = (first_values(history, "output_rms") * first_values(history, "output_spread"))[layers]
    known = sizes[np.isfinite(sizes)]
    return bool(known.size) and float(known[-1]) > _LARGE_OUTPUT


def _stops(history: History, from_start: bool, well: int | None) -> bool:
    """Whether the run does not learn with it; `well` is the last row in which it was not so."""
    if not from_start and history.scalar("optimizers")[-1] > 1:
        return False
    return not has_learnt(history) or (well is not None and loss_rose(history, well))


def _cause(history: History, saturated: Bools, first: int) -> str:
    """Why it is so from the start; `first` is the first place, in order of execution."""
    if any(point.op for point in history.points[:first]):
        return "weight_scale"
    if is_measured(history):
        return "unscaled_inputs" if offending_features(history) else "weight_scale"
    others = np.delete(saturated, first)
    known = np.delete(~np.isnan(history["saturated_fraction"][-1]), first)
    return "unscaled_inputs" if known.any() and not others.any() else "weight_scale"


def _gains(deltas: Floats) -> Floats:
    """(R, P) delta norms -> (R, P) factor on the way back through each point; NaN where it cannot be told."""
    usable = np.isfinite(deltas) & (deltas > 0)
    gains = np.full_like(deltas, np.nan)
    both = usable[:, 1:]  # an exact zero before a live point is a gain of zero, not a missing one
    gains[:, 1:][both] = deltas[:, :-1][both] / deltas[:, 1:][both]
    return gains
