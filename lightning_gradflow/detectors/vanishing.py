"""Does the gradient die on its way to the first layers?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.profile import DepthProfile, depth_profile, recent_profiles
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_BOUNDED_DECAY = 6.0  # decades: what is left of usual gradients is then below Adam's eps of 1e-8
_PATIENCE = 50  # steps: of the runs that heal most do so in fewer
_ONE_PLACE = 0.5  # of all that is lost: then this place is the cause, whatever the others do
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

    Args:
        max_decay: decades that the signal may lose from the last to the first layer, in (0, 100). Almost every network
            that learns stays above the default of 4 decades, and plain stacks that lose more do not learn with SGD.
        critical_decay: decades from which it is critical whatever the optimizer, in [max_decay, 100). By default 8:
            what is left is then below the resolution of float32 beside the last layer.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Hochreiter 1991; Bengio et al. 1994; Glorot and Bengio 2010; Schoenholz et al. 2017.

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

    def __post_init__(self) -> None:
        check_range("max_decay", self.max_decay, 0, 100)
        check_range("critical_decay", self.critical_decay, self.max_decay, 100, open_low=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not is_vanishing(history, self.max_decay):
            return []
        profile = recent_profiles(history, 1)[0]
        if profile.step != history.rows[-1].step:
            return []
        weights, activations = profile.gains(of_layers=True), profile.gains(of_layers=False)
        usable = profile.usable
        top = profile.delta_norm[usable][-1]
        before_all = np.arange(len(usable)) < np.argmax(usable)
        underflowed = (profile.delta_norm == 0) & before_all
        evidence = {
            "span": profile.span,
            "slope": profile.slope,
            "points": float(usable.sum()),
            "underflowed_points": float(underflowed.sum()),
        }
        if weights.size:
            evidence["weight_gain"] = float(np.median(weights))
        if activations.size:
            evidence["activation_gain"] = float(np.median(activations))
        return [
            Finding(
                kind=FindingKind.VANISHING_GRADIENT,
                severity=self._severity(profile, history),
                step=profile.step,
                layers=profile.modules((usable & (profile.delta_norm < _LOST * top)) | underflowed),
                cause=_cause(profile),
                evidence=evidence,
            )
        ]

    def _severity(self, profile: DepthProfile, history: History) -> Severity:
        if has_learnt(history):
            return Severity.INFO
        if profile.span <= -self.critical_decay:
            return Severity.CRITICAL
        if not history.scalar("normalised_updates")[-1] > 0:
            return Severity.WARNING
        if profile.span <= -_BOUNDED_DECAY and _cause(profile) == "saturation":
            return Severity.WARNING
        return Severity.WARNING if self._lasts(history) else Severity.INFO

    def _lasts(self, history: History) -> bool:
        """Whether the decay has been there in every sample of the last 50 steps, and the run is that old."""
        last = history.rows[-1].step
        rows = [i for i, row in enumerate(history.rows) if row.step >= last - _PATIENCE]
        # the sample before them says that it was there when they began, where none was taken at that very step
        profiles = [depth_profile(history, i) for i in range(max(0, rows[0] - 1), len(history))]
        seen = [profile for profile in profiles if profile is not None]
        return seen[0].step <= last - _PATIENCE and all(profile.span <= -self.max_decay for profile in seen)


def is_vanishing(history: History, max_decay: float = 4.0) -> bool:
    """Whether the signal lost `max_decay` decades or more in the last two samples that have it, or in the only one."""
    profiles = recent_profiles(history, 2)
    return bool(profiles) and all(profile.span <= -max_decay for profile in profiles)


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
