"""Where did NaN or infinity begin?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.inputs import feature_evidence, inputs_jumped
from lightning_gradflow.detectors.known import known_rows
from lightning_gradflow.detectors.update_ratio import overwrites
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History

_EARLY = 50  # steps in which what overflows does so because of the inputs, where they are too large
_RISE = 10.0  # times the median of the losses before
_JUMP = 100.0  # times the median of the total norms before
_LAST = 5  # losses before the first one that is not finite
_MIN_FINITE = 0.5  # of the losses between two samples: one bad batch among fifty is no fault of the run


@dataclass(frozen=True)
class NonfiniteGradient:
    """Finds NaN or infinity in the gradients, and the first layer in which it began.

    A loss that is not finite in most of the steps since the last sample counts too, finite as the gradients may be.

    Weights that are NaN or infinite before the first step were never initialised, or loaded so (`initialisation`).
    Else, where the forward pass or the loss is not finite, the cause is what led there, if that is known: in the first
    50 steps inputs that are too large (`unscaled_inputs`); steps that were (`learning_rate_too_large`: the loss rose to
    ten times its median just before, the total norm to a hundred times its own, or a step was larger than the weights);
    weights that a step has made NaN or infinite (`optimizer_step`). Where none of these is known it is the forward pass
    itself (`forward`): the first point, in order of execution, whose output is not finite; or the loss (`loss`).

    Otherwise it is the backward pass (`backward`): the last point whose delta is not finite, for errors travel from the
    loss towards the first layer. A step that makes weights NaN or infinite out of finite gradients is found at once.

    Under a gradient scaler a backward pass that overflows is no finding: the step is skipped and the scale halved, and
    the next may pass. It is one if the last two samples were not finite although the scale is below `min_scale`. What
    is not finite in the forward pass or the loss was so before the scale came in, and is found at once.

    Args:
        min_scale: scale of a gradient scaler below which a backward pass that is still not finite is found, in
            (0, inf). By default 1: below, the gradients would overflow without a scaler too, or there is a NaN that
            no scale mends. From the usual start of 65536 that is after 17 skipped steps, so it is told at step 32, or
            at the second sample where it begins later. A larger limit would find what the scaler is about to mend.

    Raises:
        ValueError: if `min_scale` is out of its range.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> broken = {"grad_nonfinite_fraction": np.array([1.0, 1.0]), "output_rms": np.array([0.3, np.inf])}
        >>> history.append(Row(step=0, values=broken))
        >>> [(f.cause, f.layers) for f in NonfiniteGradient().judge(history)]
        [('forward', ('fc2',))]
    """

    min_scale: float = 1.0

    def __post_init__(self) -> None:
        check_range("min_scale", self.min_scale, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        fractions = history["grad_nonfinite_fraction"]
        if not fractions.size:
            return []
        broken = history.facts.of_rows("broken", len(history), lambda start: _broken(history, start))
        row = history.rows[-1]
        if not broken[-1]:
            spoilt = np.isposinf(history["update_norm"][-1])
            if not spoilt.any() or row.scalars.get("step_skipped") == 1:
                return []
            layers = [history.layers[i] for i in np.flatnonzero(spoilt)]
            reason = _what_led_there(history, len(history) - 1, jumps=True)
            return [_finding(history, reason or "optimizer_step", layers, fractions[-1])]
        where, layers = _where(history, fractions[-1])
        if where == "backward" and self._may_pass(history, bool(broken[-2:-1].any())):
            return []
        onset = len(broken) - int(np.argmin(np.append(broken[::-1], False)))
        reason = _what_led_there(history, onset, jumps=where != "backward")
        spoilt = np.isposinf(history["weight_norm"][onset])
        if history.steps[onset] == 0 and spoilt.any():
            layers = [history.layers[i] for i in np.flatnonzero(spoilt)]
            return [_finding(history, "initialisation", layers, fractions[-1], spoilt=len(layers))]
        # between two samples a bad batch spoils the weights just as a bad step does
        was_seen = onset > 0 and history.steps[onset] == history.steps[onset - 1] + 1
        if reason is None and was_seen and spoilt.any():
            reason, layers = "optimizer_step", [history.layers[i] for i in np.flatnonzero(spoilt)]
        unseen = reason is None and onset > 0 and not was_seen
        return [_finding(history, reason or where, layers, fractions[-1], spoilt=int(spoilt.sum()) if unseen else 0)]

    def _may_pass(self, history: History, was_broken: bool) -> bool:
        """Whether a gradient scaler left the step out and may still find a scale at which the next one passes."""
        row = history.rows[-1]
        scale = row.scalars.get("loss_scale", math.nan)
        if math.isnan(scale) or row.scalars.get("step_skipped") == 0 or _mostly_nonfinite(row.losses):
            return False  # no scaler, or one that let the step through, or a loss that it cannot mend
        return scale >= self.min_scale or not was_broken


def _broken(history: History, start: int) -> Bools:
    """(R,) the rows from one on in which the gradients are not finite, or most of the losses."""
    broken = np.asarray((history["grad_nonfinite_fraction"][start:] > 0).any(axis=1))
    # a rectifier may turn NaN into zero on the way back: the gradients are finite, and worth nothing
    return np.asarray(broken | [_mostly_nonfinite(row.losses) for row in history.rows[start:]], dtype=bool)


def _where(history: History, fractions: Floats) -> tuple[str, list[str]]:
    """In which part of the newest step it began, and the modules that show it, the first one first."""
    outputs, deltas = history["output_rms"][-1], history["delta_norm"][-1]
    modules = [point.module for point in history.points]
    losses = history.rows[-1].losses
    if np.isposinf(outputs).any():
        return "forward", [modules[i] for i in np.flatnonzero(np.isposinf(outputs))]
    if losses.size and not np.isfinite(losses[-1]):
        return "loss", modules[-1:]
    began = [modules[i] for i in np.flatnonzero(np.isposinf(deltas))[::-1]]
    return "backward", [*began, *(history.layers[i] for i in np.flatnonzero(fractions > 0)[::-1])]


def _what_led_there(history: History, onset: int, *, jumps: bool) -> str | None:
    """Why it went out of range at row `onset`: inputs or steps that are too large, or None.

    Args:
        history: where to read.
        onset: index of the row.
        jumps: whether jumps of gradients and weights count; before a pole of the backward pass the gradient grows too.
    """
    finite = np.isfinite(history.losses)
    bad = np.flatnonzero(~finite & (history.loss_steps > (history.steps[onset - 1] if onset else -1)))
    losses = history.losses[: bad[0] if bad.size else None]
    losses = losses[np.isfinite(losses)]
    before, last = np.abs(losses[:-_LAST] if len(losses) > _LAST else losses[:1]), np.abs(losses[-_LAST:])
    rose = bool(losses.size) and float(last.max()) > max(_RISE * float(np.median(before)), 2 * abs(float(losses[0])))
    inputs = feature_evidence(history)
    is_new = history.steps[onset] < _EARLY or inputs_jumped(history)
    if is_new and (rose or jumps) and inputs and np.isfinite([*inputs.values()]).all():
        return "unscaled_inputs"
    if rose or (jumps and (_jumped(history, onset) or overwrites(history, onset))):
        return "learning_rate_too_large"
    return None


def _jumped(history: History, onset: int) -> bool:
    """Whether the gradient of the last sample before row `onset`, or the learning rate in it, left its past behind."""
    totals, rates = history.scalar("grad_norm_total")[:onset], history.scalar("lr")
    totals = totals[np.isfinite(totals)]
    if len(totals) > _LAST and totals[-1] > _JUMP * float(np.median(totals[:-1])):
        return True
    return bool(history.steps[onset] >= _EARLY and rates[onset] > _RISE * np.max(rates[:onset], initial=0.0) > 0)


def _finding(history: History, cause: str, layers: Sequence[str], fractions: Floats, *, spoilt: int = 0) -> Finding:
    row = history.rows[-1]
    evidence = {"nonfinite_layers": float((fractions > 0).sum())}
    evidence["loss"] = float(row.losses[-1]) if row.losses.size else math.nan
    if spoilt:
        evidence["spoilt_layers"] = float(spoilt)
    if cause == "optimizer_step" and known_rows(history, "unchanged_fraction").any():
        evidence["weight_bits"] = 16.0
    return Finding(
        kind=FindingKind.NONFINITE_GRADIENT,
        severity=Severity.CRITICAL,
        step=row.step,
        layers=tuple(dict.fromkeys(layers)),
        cause=cause,
        evidence=evidence | (feature_evidence(history) if cause == "unscaled_inputs" else {}),
    )


def _mostly_nonfinite(losses: Floats) -> bool:
    return bool(losses.size) and float(np.isfinite(losses).mean()) < _MIN_FINITE
