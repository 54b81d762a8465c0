"""Does the gradient die on its way to the first layers?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.profile import DepthProfile, is_same_pass, is_skipped, recent_profiles
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.underflow import MIN_HEADROOM, Underflow, recent_underflow, underflow_of
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_BOUNDED_DECAY = 6.0  # decades: what is left of usual gradients is then below Adam's eps of 1e-8
_PATIENCE = 50  # steps: of the runs that heal most do so in fewer
_ONE_PLACE = 0.5  # of all that is lost: then this place is the cause, whatever the others do
_FEW_LOST = 0.25  # of the layers: with fewer lost, most networks learn as they do in fp32
_MANY_LOST = 0.5  # of the layers: what has lost so many for 50 steps, and learnt nothing, hardly ever recovers
_LOST = 0.01  # a layer that gets less than this share of the last layer's signal is named
_SMALL_WEIGHT_GAIN = 0.3  # half of what the weakest init in common use gives (1 / sqrt(3), torch's own for Linear)
_SMALL_RELU_GAIN = 0.3  # a healthy ReLU lets half of the units through: sqrt(1 / 2)


@dataclass(frozen=True)
class VanishingGradient:
    """Finds a signal that shrinks exponentially with depth, whatever the size of the loss.

    The span of the depth profile (see `DepthProfile`) must be at or below `-max_decay` decades in the last two samples,
    or in the first: what is so at initialisation is said at once, a single odd batch later on is not enough.

    How bad it is depends on the optimizer. One that scales each update by the size of the gradient (Adam and its kin)
    moves the first layers all the same, and many such runs heal within their first hundred steps: between `max_decay`
    and `critical_decay` they get an info, which becomes a warning when the decay has lasted 50 steps and nothing was
    learnt. Bounded activations do not heal, since no weight makes their slope larger: there 6 decades are a warning at
    once. Plain SGD gets the warning at once, and a run that has learnt an info.

    The cause is where the loss of signal happens: in the activations (bounded ones: `saturation`; rectifiers:
    `dead_units`) or in the weights (`weight_scale` where their median gain is far below every usual initialisation,
    else `depth`: each layer loses a little, there are just too many of them).

    A short span is a finding too where the number format ends before the network does (`underflow`): in fp16 without a
    gradient scaler whatever is below 6e-8 becomes zero. It is so where the bits run out on the way to the first layers,
    and not where a weight of zeros, dead units or an unused branch stop the gradient, which happens at once. If the
    decay, carried on to the first layer, reaches `max_decay`, then a wider format would not help, and the cause is the
    ordinary one. It is an info until it has lasted 50 steps and nothing was learnt, then a warning where a quarter of
    the layers get nothing, and critical where half do: no optimizer can scale a zero. Where the delta goes from a few
    bits to zero in one step, a layer of zeros could be the reason as well as pooling, and nothing is said before. Where
    everything is zero from the loss on, in fp16 and with a loss that is not zero, it is critical in the second sample.

    Args:
        max_decay: decades that the signal may lose from the last to the first layer, in (0, 100). Almost every network
            that learns stays above the default of 4 decades, and plain stacks that lose more do not learn with SGD.
        critical_decay: decades from which it is critical whatever the optimizer, in [max_decay, 100). By default 8:
            what is left is then below the resolution of float32 beside the last layer.
        min_headroom: bits between the rms of a delta and the smallest number of its format, in (-20, 20), below which
            it counts as lost. By default -3: fewer than one entry in 64 is left then. Networks in fp16 still learn
            with all their layers at 0 bits, and with the first one at -2.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Hochreiter 1991; Bengio et al. 1994; Glorot and Bengio 2010; Schoenholz et al. 2017; Micikevicius et al. 2018.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(5)])
        >>> history.append(Row(step=0, values={"delta_norm": np.array([1e-8, 1e-6, 1e-4, 1e-2, 1.0])}))
        >>> [(f.severity.value, f.cause, f.layers) for f in VanishingGradient(max_decay=4).judge(history)]
        [('critical', 'weight_scale', ('fc0', 'fc1', 'fc2'))]
    """

    max_decay: float = 4.0
    critical_decay: float = 8.0
    min_headroom: float = MIN_HEADROOM

    def __post_init__(self) -> None:
        check_range("max_decay", self.max_decay, 0, 100)
        check_range("critical_decay", self.critical_decay, self.max_decay, 100, open_low=False)
        check_range("min_headroom", self.min_headroom, -20, 20)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        profiles = recent_profiles(history, 1)
        if not profiles or profiles[0].step != history.rows[-1].step:
            return []
        underflow = recent_underflow(history, self.min_headroom)
        if _decays(history, self.max_decay, self.min_headroom):
            return [self._of_decay(history, profiles[0], underflow)]
        if underflow is None:
            return []
        finding = self._of_underflow(history, underflow)
        return [finding] if underflow.is_sure or finding.severity.is_alarm else []

    def _of_decay(self, history: History, profile: DepthProfile, underflow: Underflow | None) -> Finding:
        newest = underflow_of(history, -1, self.min_headroom)
        span, lost = (profile.span, 0) if newest is None else (newest.span, newest.where)
        weights, activations = profile.gains(of_layers=True), profile.gains(of_layers=False)
        usable = profile.usable
        top = profile.delta_norm[usable][-1]
        before_all = np.arange(len(usable)) < np.argmax(usable)
        underflowed = ((profile.delta_norm == 0) & before_all) | lost
        evidence = {
            "span": span,
            "slope": profile.slope,
            "points": float((usable | lost).sum()),
            "underflowed_points": float(underflowed.sum()),
        }
        if weights.size:
            evidence["weight_gain"] = float(np.median(weights))
        if activations.size:
            evidence["activation_gain"] = float(np.median(activations))
        cause = _cause(profile)
        severities = [self._severity_of_decay(history, span, cause)]
        if underflow is not None:
            severities.append(self._severity_of_underflow(history, underflow))
        return Finding(
            kind=FindingKind.VANISHING_GRADIENT,
            severity=max(severities, key=lambda severity: severity.rank),
            step=profile.step,
            layers=profile.modules((usable & (profile.delta_norm < _LOST * top)) | underflowed),
            cause=cause,
            evidence=evidence,
        )

    def _of_underflow(self, history: History, underflow: Underflow) -> Finding:
        measured = ~np.isnan(underflow.profile.headroom)
        return Finding(
            kind=FindingKind.VANISHING_GRADIENT,
            severity=self._severity_of_underflow(history, underflow),
            step=history.rows[-1].step,
            layers=underflow.profile.modules(underflow.where),
            cause="underflow",
            evidence={
                "lost_share": float(underflow.where[measured].mean()),
                "points": float(measured.sum()),
                **({"headroom": underflow.headroom} if np.isfinite(underflow.headroom) else {}),
            },
        )

    def _severity_of_decay(self, history: History, span: float, cause: str) -> Severity:
        if has_learnt(history):
            return Severity.INFO
        if span <= -self.critical_decay:
            return Severity.CRITICAL
        if not history.scalar("normalised_updates")[-1] > 0:
            return Severity.WARNING
        if span <= -_BOUNDED_DECAY and cause == "saturation":
            return Severity.WARNING
        return Severity.WARNING if self._lasts(history, lambda one: one.span <= -self.max_decay) else Severity.INFO

    def _severity_of_underflow(self, history: History, underflow: Underflow) -> Severity:
        if underflow.share < _FEW_LOST or has_learnt(history):
            return Severity.INFO
        before = underflow_of(history, -2, self.min_headroom) if len(history) > 1 else None
        if before is not None and before.headroom == underflow.headroom == -math.inf:
            return Severity.CRITICAL  # no step can change a weight
        # a sample in which everything is zero tells nothing
        if not self._lasts(history, lambda one: bool(one.where.any()) or math.isnan(one.headroom)):
            return Severity.INFO
        return Severity.CRITICAL if underflow.share >= _MANY_LOST else Severity.WARNING

    def _lasts(self, history: History, is_so: Callable[[Underflow], bool]) -> bool:
        """Whether it was so in every sample of the last 50 steps, and the run is that old."""
        last = history.rows[-1].step
        rows = [i for i, row in enumerate(history.rows) if row.step >= last - _PATIENCE and not is_skipped(row)]
        # the sample before them says that it was there when they began, where none was taken at that very step
        found = [underflow_of(history, i, self.min_headroom) for i in range(max(0, rows[0] - 1), len(history))]
        seen = [one for one in found if one is not None and found[-1] and is_same_pass(one.profile, found[-1].profile)]
        return seen[0].profile.step <= last - _PATIENCE and all(is_so(one) for one in seen)


def is_vanishing(history: History, max_decay: float = 4.0, min_headroom: float = MIN_HEADROOM) -> bool:
    """Whether the signal does not reach the first layers: it decays on its way, or its number format ends.

    It decays if it lost `max_decay` decades or more in the last two samples that have it, or in the only one.
    """
    return _decays(history, max_decay, min_headroom) or recent_underflow(history, min_headroom) is not None


def _decays(history: History, max_decay: float, min_headroom: float) -> bool:
    found: list[Underflow] = []
    for row in range(len(history) - 1, -1, -1):
        one = underflow_of(history, row, min_headroom)
        if one is not None and (not found or is_same_pass(one.profile, found[0].profile)):
            found.append(one)
        if len(found) == 2:
            break
    return bool(found) and all(one.span <= -max_decay for one in found)


def _cause(profile: DepthProfile) -> str:
    """Where most of the decay happens: in one place, in the activations, or in the weights."""
    usable = profile.usable
    kinds: list[str] = []
    lost: list[float] = []
    for i in np.flatnonzero(usable[1:] & usable[:-1]) + 1:
        point = profile.points[i]
        kinds.append("weights" if point.is_layer else "bounded" if point.op in BOUNDED else "rectifier")
        lost.append(float(np.log(profile.delta_norm[i] / profile.delta_norm[i - 1])))
    if not lost:
        return "unknown"
    by_kind = {kind: sum(x for x, k in zip(lost, kinds, strict=True) if k == kind) for kind in set(kinds)}
    most = int(np.argmax(lost))
    is_one_place = lost[most] >= _ONE_PLACE * sum(x for x in lost if x > 0)
    worst = kinds[most] if is_one_place else max(sorted(by_kind), key=lambda kind: by_kind[kind])
    if worst == "bounded":
        return "saturation"
    if worst == "rectifier" and (is_one_place or by_kind[worst] > -np.log(_SMALL_RELU_GAIN) * kinds.count(worst)):
        return "dead_units"
    gains = np.exp(-np.array([x for x, kind in zip(lost, kinds, strict=True) if kind == "weights"]))
    if not gains.size:
        return "unknown"
    return "weight_scale" if is_one_place or float(np.median(gains)) < _SMALL_WEIGHT_GAIN else "depth"
