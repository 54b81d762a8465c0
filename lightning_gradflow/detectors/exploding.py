"""Does the gradient grow out of proportion, with depth or against the run's own past?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.decay import is_evened_out
from lightning_gradflow.detectors.inputs import feature_evidence, inputs_jumped, offending_features
from lightning_gradflow.detectors.known import input_point, skipped_rows
from lightning_gradflow.detectors.profile import depth_profile, in_order, is_skipped, recent_profiles
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import starts_with_embedding
from lightning_gradflow.detectors.zero_weights import may_be_blocked
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_MIN_PAST = 8  # rows before the run's own median means something
_LARGE_GAIN = 1.25  # of a layer and its activation together: weights at the critical scale for it reach 1
_EARLY = 50  # steps: inputs that were too large from the start have done their harm by then
_AT_START = 3  # samples
_NEWEST_LOSSES, _MIN_LOSSES = 5, 20
_BEYOND = 10.0  # times the range of all losses before: no batch does that three times in a row
_TINY = 1e-30
_NOTHING: Floats = np.empty(0)
_LARGE_OUTPUT = 30.0  # rms, and factor over the inputs: networks that learn start with outputs up to 3, and 12 times
_CERTAIN = 4.0  # decades: with less, an optimizer that evens the updates out learns


@dataclass(frozen=True)
class ExplodingGradient:
    """Finds a signal that grows exponentially with depth, and a gradient norm that leaves its own past far behind.

    With depth: the span of the depth profile is at or above `max_growth` decades in the last two samples, or in the
    first. Below 4 decades that is info where the optimizer moves all layers about as fast (`update_ratio` within a
    factor of 20), and at any size in a run that has learnt; else a warning.

    In time: the total gradient norm of the last two samples is above `max_jump` times the median of all before, and the
    loss is above all that it was: big gradients alone, with a loss that falls, are left alone. Where the inputs have
    become ten times as large with it one sample is enough, and they are the cause (`unscaled_inputs`). Steps that a
    gradient scaler skipped do not count: there the gradient was infinite because of the scale.

    In the loss: the median of the newest five is above all before by ten times their range, and the gradient is ten
    times as large as usual.

    At the start: the outputs of the last layer differ between samples by more than 30, and trainable layers make them
    30 times as large as the inputs; or the inputs are unscaled. The gradients of all weights are as much too large,
    whatever the span says, and a loss that falls from there has learnt nothing but a smaller output.

    Args:
        max_growth: decades that the signal may gain from the last to the first layer, in (0, 100). The default of 3 is
            the mirror image of the limit for vanishing gradients; networks that learn gain up to 2.4.
        max_jump: factor over the median of the run's own total norms, in (1, inf). The default of 1000 is far above
            what batches, warm-up and loss spikes do in runs that recover by themselves.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Pascanu et al. 2013, On the difficulty of training recurrent neural networks.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(5)])
        >>> history.append(Row(step=0, values={"delta_norm": np.array([1e8, 1e6, 1e4, 1e2, 1.0])}))
        >>> [(f.severity.value, f.cause, f.layers[0]) for f in ExplodingGradient().judge(history)]
        [('warning', 'weight_scale', 'fc0')]
    """

    max_growth: float = 3.0
    max_jump: float = 1000.0

    def __post_init__(self) -> None:
        check_range("max_growth", self.max_growth, 0, 100)
        check_range("max_jump", self.max_jump, 1, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        looks = (self._with_depth, self._in_time, self._at_start, self._in_loss)
        found = [finding for look in looks for finding in look(history)]
        return sorted(found, key=lambda finding: -finding.severity.rank)[:1]

    def _with_depth(self, history: History) -> list[Finding]:
        profiles = recent_profiles(history, 2) if not may_be_blocked(history) else []
        if not profiles or profiles[0].step != history.rows[-1].step:
            return []
        if not all(profile.span >= self.max_growth for profile in profiles):
            return []
        profile = profiles[0]
        top = profile.delta_norm[profile.usable][-1]
        layers = profile.modules(profile.usable & (profile.delta_norm > 100 * top))[::-1]
        if not layers:
            return []
        is_layer = np.array([point.is_layer for point in profile.points], dtype=bool)
        evidence = {"span": profile.span, "slope": profile.slope, "points": float(profile.usable.sum())}
        for name, where in (("weight_gain", is_layer), ("activation_gain", ~is_layer)):
            gains = profile.gains[where]
            if not np.isnan(gains).all():
                evidence[name] = float(np.nanmedian(gains))
        cause = self._cause(history, evidence.get("weight_gain", np.nan) * evidence.get("activation_gain", 1.0))
        if cause == "unscaled_inputs":
            evidence |= feature_evidence(history)
        heals = profile.span < _CERTAIN and is_evened_out(history, layers)
        return [
            Finding(
                kind=FindingKind.EXPLODING_GRADIENT,
                severity=Severity.INFO if heals or has_learnt(history) else Severity.WARNING,
                step=profile.step,
                layers=layers,
                cause=cause,
                evidence=evidence,
            )
        ]

    def _cause(self, history: History, gain: float) -> str:
        first = next(
            p
            for i, row in enumerate(history.rows)
            if not is_skipped(row) and (p := depth_profile(history, i)) is not None
        )
        is_new = history.rows[-1].step < _EARLY or inputs_jumped(history)
        if first.span < self.max_growth / 2 and is_new and offending_features(history):
            return "unscaled_inputs"
        if first.span < self.max_growth / 2:
            return "learning_rate_too_large"  # it was well at first, and the steps made it so
        return "weight_scale" if gain > _LARGE_GAIN else "depth"

    def _at_start(self, history: History) -> list[Finding]:
        """Outputs that no initialisation is meant to give: the loss spends the run on its way down from there."""
        if not 0 < len(history) <= _AT_START:
            return []
        profile = depth_profile(history, 0)
        if profile is None:
            return []
        first, order = history.rows[0], history.point_axis.order
        rms, share = (in_order(first.values.get(name, _NOTHING), order) for name in ("output_rms", "output_spread"))
        sizes = dict(zip((point.name for point in history.points), rms * share, strict=True))
        layers = [point for point in profile.points if point.is_layer and np.isfinite(sizes[point.name])]
        inputs = history["input_rms"][0]
        known = inputs[np.isfinite(inputs)]
        if len(layers) < 2:
            return []
        goes_in = input_point(history)
        is_first = goes_in is not None and goes_in <= history.points.index(layers[0])
        before = float(np.sqrt(np.mean(np.square(known)))) if known.size and is_first else sizes[layers[0].name]
        if starts_with_embedding(history):
            before = min(before, 1.0)  # an embedding is drawn with 1
        steps = {p.module: sizes[p.name] / max(sizes[b.name], _TINY) for b, p in pairwise(layers)}
        steps[layers[0].module] = sizes[layers[0].name] / max(before, _TINY)
        # a frozen layer is as its author wants it
        norms = in_order(first.values.get("grad_norm", _NOTHING), history.layer_axis.order)
        trained = {name for name, norm in zip(history.layers, norms, strict=True) if np.isfinite(norm)}
        growth = math.prod(step for name, step in steps.items() if name in trained or not trained)
        last = sizes[layers[-1].name]
        is_unscaled = bool(offending_features(history))
        if not (last > _LARGE_OUTPUT and (is_unscaled or growth > _LARGE_OUTPUT)):
            return []
        return [
            Finding(
                kind=FindingKind.EXPLODING_GRADIENT,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(sorted(steps, key=lambda name: -steps[name]))[:8],
                cause="unscaled_inputs" if is_unscaled else "weight_scale",
                evidence={
                    "output_rms": float(last),
                    "output_growth": float(growth),
                    **(feature_evidence(history) if is_unscaled else {}),
                },
            )
        ]

    def _in_loss(self, history: History) -> list[Finding]:
        """A loss that has left the range of all that it was, and stays there: what was learnt is gone."""
        total = history.scalar("grad_norm_total")
        usual = total[:-1][np.isfinite(total[:-1])]
        # a term that was added to the loss lifts it and leaves the gradients as they were
        if len(history) < _MIN_PAST or not usual.size or not total[-1] > _BEYOND * np.median(usual):
            return []
        steps, losses = history.loss_steps, history.losses
        # up to half of the newest are not enough to tell at the sample before, and are in its past now
        before = losses[(steps <= history.rows[-2].step) & np.isfinite(losses)][: -(_NEWEST_LOSSES // 2)]
        newest = losses[-_NEWEST_LOSSES:]
        if len(before) < _MIN_LOSSES or not np.isfinite(newest).all():
            return []
        low, high = float(before.min()), float(before.max())
        if not np.median(newest) > low + _BEYOND * (high - low):
            return []
        norms = history["grad_norm"][-1]
        return [
            Finding(
                kind=FindingKind.EXPLODING_GRADIENT,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(history.layers[i] for i in np.argsort(-np.nan_to_num(norms)) if np.isfinite(norms[i]))[:8],
                cause="unscaled_inputs" if inputs_jumped(history) else "unknown",
                evidence={
                    "loss": float(np.median(newest)),
                    "highest_loss": high,
                    **(feature_evidence(history) if inputs_jumped(history) else {}),
                },
            )
        ]

    def _in_time(self, history: History) -> list[Finding]:
        total, loss = history.scalar("grad_norm_total"), history.scalar("loss")
        known = np.isfinite(total) & ~skipped_rows(history)
        total, loss = total[known], loss[known]
        if len(total) < _MIN_PAST + 2 or not known[-1]:
            return []
        jumped = inputs_jumped(history)
        newest = 1 if jumped else 2  # with a reason at hand one sample is enough
        median = float(np.median(total[:-newest]))
        before = loss[:-newest][np.isfinite(loss[:-newest])]
        if median == 0 or not np.all(total[-newest:] > self.max_jump * median):
            return []
        if not loss[-1] > before.max(initial=-np.inf):
            return []
        norms = history["grad_norm"][-1]
        worst = [i for i in np.argsort(-np.nan_to_num(norms)) if np.isfinite(norms[i])]
        return [
            Finding(
                kind=FindingKind.EXPLODING_GRADIENT,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=tuple(history.layers[i] for i in worst[:8]),
                cause="unscaled_inputs" if jumped else "learning_rate_too_large",
                evidence={
                    "growth": float(total[-1] / median),
                    "grad_norm_total": float(total[-1]),
                    **(feature_evidence(history) if jumped else {}),
                },
            )
        ]
