"""How much of the signal dies on its way to the first layers, where, and of what."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.detectors.profile import DepthProfile, is_same_pass
from lightning_gradflow.detectors.underflow import MIN_HEADROOM, Underflow, underflow_of
from lightning_gradflow.history import Bools, Floats, History

MAX_DECAY = 3.0
"""Decades; plain networks that lose more do not learn with SGD in their first hundred steps, and do with Adam."""

LASTING_DECAY = 4.0
"""Decades: with less, an optimizer that evens the updates out is slow at times, and gets there."""

_SECTION = (
    2.0  # times the limit for the whole: healthy networks lose up to 4 decades in a section, sick ones 6.8 or more
)
_LOST = 0.01  # a layer that gets less than this share of what enters the section from behind is named
_ONE_PLACE = 0.5  # of all that is lost: then this place is the cause, whatever the others do
_SMALL_GAIN = 0.8  # of a layer and its activation together: weights at the critical scale for it reach 1
_SMALL_RELU_GAIN = 0.3  # a healthy ReLU lets half of the units through: sqrt(1 / 2)
_FAR_FROM_NORM = 0.25  # gain / largest singular value: 0.5 for a square matrix with independent entries
_NORMALISED = 0.25  # of the layers: a transformer has two in five or six
_SAMPLES = 3  # in a row
_EVEN = 0.05  # of the update ratio of the others: then the optimizer makes up for the small gradient


@dataclass(frozen=True)
class Decay:
    """A decay of the signal with depth, in the whole profile or in a section of it.

    Args:
        profile: the depth profile.
        start: its first point.
        stop: the point behind its last one.
        span: decades, negative; carried on through points that the number format lost.
        lost: (P,) points that the number format lost.
        choke: the one layer that stops it; empty where there is no such layer.
    """

    profile: DepthProfile
    start: int
    stop: int
    span: float
    lost: Bools
    choke: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer that stops the signal, if there is one, and those that next to nothing reaches, worst first."""
        profile = self.profile
        usable = profile.usable
        inside = np.zeros(len(usable), dtype=bool)
        inside[self.start : self.stop] = True
        top = profile.delta_norm[usable & inside][-1]
        lost = profile.modules((usable & inside & (profile.delta_norm < _LOST * top)) | self._underflowed)
        return tuple(dict.fromkeys((self.choke, *lost) if self.choke else lost))

    @property
    def evidence(self) -> dict[str, float]:
        """The decay, and what a layer and an activation multiply the gradient by."""
        weights, activations = self.gains(of_layers=True), self.gains(of_layers=False)
        points = self.profile.usable | self.lost
        found = {
            "span": self.span,
            "slope": self.profile.slope if self.is_whole else self.span / max(1, self.stop - self.start - 1),
            "points": float(points[self.start : self.stop].sum()),
            "underflowed_points": float(self._underflowed.sum()),
        }
        if weights.size:
            found["weight_gain"] = float(np.median(weights))
        if activations.size:
            found["activation_gain"] = float(np.median(activations))
        if weights.size:
            found["chi"] = (found["weight_gain"] * found.get("activation_gain", 1.0)) ** 2
        norms = self.profile.spectral_norm[self.start : self.stop]
        if not np.isnan(norms).all():
            found["spectral_norm"] = float(np.nanmedian(norms))
        reached, layers = self.profile.effective_depth
        return {**found, "effective_depth": float(reached), "layers": float(layers)}

    @property
    def is_whole(self) -> bool:
        """Whether it is the decay of the whole profile."""
        return self.stop - self.start == len(self.profile.points)

    def gains(self, of_layers: bool) -> Floats:
        """(G,) what the weights of the layers, or the activations, multiply the norm by, where it can be told."""
        chosen = [self.profile.points[i].is_layer == of_layers for i in range(self.start + 1, self.stop)]
        gains: Floats = self.profile.gains[self.start + 1 : self.stop][np.array(chosen, dtype=bool)]
        return np.asarray(gains[~np.isnan(gains)])

    @property
    def _underflowed(self) -> Bools:
        usable = self.profile.usable
        before_all = np.arange(len(usable)) < np.argmax(usable)
        return np.asarray(((self.profile.delta_norm == 0) & before_all) | self.lost)


def decay_of(underflow: Underflow, max_decay: float) -> Decay | None:
    """The decay of a profile, if it loses `max_decay` decades, twice as many in a section, or three at one layer."""
    profile = underflow.profile
    choke = profile.choke
    if choke is not None:
        before, behind = profile.delta_norm[:choke], profile.delta_norm[choke:]
        span = math.log10(before[profile.usable[:choke]].max() / np.median(behind[profile.usable[choke:]]))
        span = min(span, underflow.span)
        return Decay(profile, 0, len(profile.points), span, underflow.where, profile.points[choke].module)
    if underflow.span <= -max_decay:
        return Decay(profile, 0, len(profile.points), underflow.span, underflow.where)
    section = profile.section
    if section.span <= -_SECTION * max_decay:
        return Decay(profile, section.start, section.stop, section.span, np.zeros_like(underflow.where))
    return None


def recent_decay(history: History, max_decay: float, min_headroom: float) -> Decay | None:
    """The newest decay, if it was there in the last two samples that have a profile, or in the only one."""
    found: list[Underflow] = []
    for row in range(len(history) - 1, -1, -1):
        one = underflow_of(history, row, min_headroom)
        if one is not None and (not found or is_same_pass(one.profile, found[0].profile)):
            found.append(one)
        if len(found) == 2:
            break
    decays = [decay_of(one, max_decay) for one in found]
    return decays[0] if decays and None not in decays else None


def was_cut_off(history: History, start: int) -> bool:
    """Whether the signal came through in the row `start`, and four decades are lost in each of the newest three."""
    first = underflow_of(history, start, MIN_HEADROOM)
    if first is None or decay_of(first, MAX_DECAY / 2) is not None:
        return False
    newest = [underflow_of(history, row, MIN_HEADROOM) for row in range(start + 1, len(history))[-_SAMPLES:]]
    return len(newest) == _SAMPLES and all(
        one is not None and is_same_pass(one.profile, first.profile) and decay_of(one, LASTING_DECAY) is not None
        for one in newest
    )


def cause_of(decay: Decay) -> str:
    """Where most of the decay happens: in one place, in the activations, or in the weights.

    - `saturation`: in bounded activations. Also where no activation was seen, since it is written by hand, and the
      layers pass on far less than their largest singular value allows.
    - `dead_units`: in rectifiers that pass on far less than half of the units.
    - `weight_scale`: in the weights: a layer and its activation multiply the gradient by less than 0.8 (median), so
      that weights of another scale would carry it.
    - `depth`: each loses a little, there are just too many of them; or a quarter of the layers are normalisations, so
      that other weights would make no difference.
    """
    if decay.choke:
        return "weight_scale"
    gains = decay.profile.gains
    places = [i for i in range(decay.start + 1, decay.stop) if not math.isnan(gains[i])]
    if not places:
        return "unknown"
    points = [decay.profile.points[i] for i in places]
    kinds = ["weights" if p.is_layer else "bounded" if p.op in BOUNDED else "rectifier" for p in points]
    lost = -np.log(gains[places])
    by_kind = {kind: float(sum(x for x, k in zip(lost, kinds, strict=True) if k == kind)) for kind in set(kinds)}
    most = int(np.argmax(lost))
    is_one_place = bool(lost[most] >= _ONE_PLACE * lost[lost > 0].sum())
    worst = kinds[most] if is_one_place else max(sorted(by_kind), key=lambda kind: by_kind[kind])
    if worst == "bounded":
        return "saturation"
    if worst == "rectifier" and (is_one_place or by_kind[worst] > -np.log(_SMALL_RELU_GAIN) * kinds.count(worst)):
        return "dead_units"
    weights, activations = decay.gains(of_layers=True), decay.gains(of_layers=False)
    if not weights.size:
        return "unknown"
    if is_one_place:
        return "weight_scale"
    if not activations.size and _has_unseen_activations(decay):
        return "saturation"
    if _is_normalised(decay):
        return "depth"
    gain = float(np.median(weights)) * (float(np.median(activations)) if activations.size else 1.0)
    return "weight_scale" if gain < _SMALL_GAIN else "depth"


def is_evened_out(history: History, layers: Sequence[str]) -> bool:
    """Whether the optimizer moves `layers`, small or large as their gradient is, about as fast as the other layers.

    Seen from the updates of the last step that made any; where none were measured, from the kind of the optimizer.
    """
    chosen = {*layers}
    seen = {point.module for point in history.points}
    # what is measured as one, as attention with its projections, moves as one
    mine = np.array([_owner(name, seen) in chosen for name in history.layers], dtype=bool)
    for ratios in history["update_ratio"][::-1]:
        known = np.isfinite(ratios)
        if not (known & mine).any() or not (known & ~mine).any() or not np.nanmax(ratios[known]) > 0:
            continue
        here, there = np.median(ratios[known & mine]), np.median(ratios[known & ~mine])
        return bool(_EVEN * there <= here and _EVEN * here <= there)
    return bool(history.scalar("normalised_updates")[-1] > 0)


def _owner(name: str, modules: Collection[str]) -> str:
    """The innermost of some modules that a layer is, or is a part of; "" where there is none.

    Example:
        >>> _owner("attention.out", {"attention"}), _owner("attention_2.out", {"attention"})
        ('attention', '')
    """
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _is_normalised(decay: Decay) -> bool:
    """Whether many of the layers are normalisations, which have no matrix: then the scale of weights has no say."""
    layers = np.array([point.is_layer for point in decay.profile.points[decay.start : decay.stop]], dtype=bool)
    norms = decay.profile.spectral_norm[decay.start : decay.stop][layers]
    return not np.isnan(norms).all() and float(np.isnan(norms).mean()) >= _NORMALISED


def _has_unseen_activations(decay: Decay) -> bool:
    inside = slice(decay.start + 1, decay.stop)
    gains, norms = decay.profile.gains[inside], decay.profile.spectral_norm[inside]
    known = np.isfinite(gains) & np.isfinite(norms) & (norms > 0)
    return bool(known.any()) and float(np.median(gains[known] / norms[known])) < _FAR_FROM_NORM
