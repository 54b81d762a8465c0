"""Where does the gradient fall below the smallest number of its format?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.profile import DepthProfile, depth_profile, in_order, is_same_pass, is_skipped
from lightning_gradflow.history import Bools, Floats, History

MIN_HEADROOM = -3.0
"""Bits; below, fewer than one entry in 64 is left: 2**-3 is the rms where every 64th is the smallest number."""

_EDGE = 1.0  # bits; in fp16 the last point before the zeros had -5 to 1 of them, in chains without pooling
_POOLED_EDGE = 8.0  # bits; an average over 32 x 32 places costs ten and a half at once, down to -3
_ALONE = 0.5  # of the layers: then the first sample is enough
_DEAD = 0.9  # share of dead units from which an activation is the reason itself
_MIN_USABLE = 4  # points: from fewer no decay can be carried on
_NARROW = -60.0  # log2(delta norm / 2**headroom): above it is fp16 (2**-24, times the root of the entries), below not
_FP16_FLOOR = -24.0  # log2 of the smallest number of fp16; every wider format goes far below
_WIDER = 125.0  # bits between the smallest numbers of fp32 and fp16, where autocast mixes the two


@dataclass(frozen=True)
class Underflow:
    """What a profile lost to its number format.

    Args:
        profile: the depth profile.
        where: (P,) the points at which less than `min_headroom` is left, and the format is the reason.
        is_sure: whether the last bits were seen to run out. Not so where the delta goes from a few bits to zero in one
            step through a layer, which pooling does, and a weight that was initialised with zeros too.
        headroom: bits that the delta has where it comes from the loss, at the last point that has any; -inf where none
            has.
    """

    profile: DepthProfile
    where: Bools
    is_sure: bool
    headroom: float

    @property
    def share(self) -> float:
        """Share of the layers that get nothing."""
        layers = np.array([point.is_layer for point in self.profile.points])
        return float(self.where[layers].mean()) if layers.any() else 0.0

    @property
    def span(self) -> float:
        """The span with the decay carried on through the points that were lost: what a wider format would hold."""
        usable = self.profile.usable
        if not self.where.any() or (usable & ~self.where).sum() < _MIN_USABLE:
            return self.profile.span
        return self.profile.slope * float((usable | self.where).sum() - 1)


def underflow_of(history: History, row: int, min_headroom: float = MIN_HEADROOM) -> Underflow | None:
    """What the row lost to its number format.

    Zeros alone prove nothing: a weight of zeros, dead units and an unused branch make them too, and they make them at
    once, out of a delta that stood well above the smallest number. Where the format ends, the bits run out: the last
    point before the zeros has next to none left.

    Args:
        history: where to read.
        row: index of the row, as for a list.
        min_headroom: bits below which a delta counts as lost.

    Returns:
        None where the row holds no delta norm or was skipped by a gradient scaler. Where everything is zero from the
        loss on, a loss that is not zero itself tells that fp16 (the row's `delta_floor`) is the reason; in any other
        format `where` is False throughout and `headroom` NaN, for the reason cannot be told.
    """
    source = history.rows[row]
    return history.facts.of_row(
        "underflow", (source.step, min_headroom), lambda: _underflow_of(history, row, min_headroom)
    )


def _underflow_of(history: History, row: int, min_headroom: float) -> Underflow | None:
    profile = None if is_skipped(history.rows[row]) else depth_profile(history, row)
    if profile is None:
        return None
    headroom = _narrow(profile, history.rows[row].scalars.get("loss_scale", math.nan))
    low = headroom < min_headroom
    known = np.flatnonzero(np.isfinite(headroom))
    where, is_sure = np.zeros(len(low), dtype=bool), True
    if not known.size and low.any() and _is_lost_at_once(history.rows[row].scalars):
        return Underflow(profile, low, True, -math.inf)
    shares = in_order(history.rows[row].values.get("dead_fraction", np.empty(0)), history.point_axis.order)
    dead = {history.points[i].name for i in np.flatnonzero(shares >= _DEAD)}
    for start, stop in _runs(low):
        seen = bool(np.isfinite(headroom[start:stop]).any())
        behind = known[known >= stop]
        if not behind.size and not seen:
            continue  # all is zero from the loss on
        point, left = (profile.points[behind[0]], headroom[behind[0]]) if behind.size else (None, -math.inf)
        if not seen and point is not None and point.name in dead:
            continue
        if seen or left <= _EDGE:
            where[start:stop] = True
        elif start == 0 and point is not None and point.is_layer and left <= _POOLED_EDGE:
            where[start:stop] = True
            is_sure = False
    return Underflow(profile, where, is_sure, float(headroom[known[-1]]) if known.size else math.nan)


def recent_underflow(history: History, min_headroom: float = MIN_HEADROOM) -> Underflow | None:
    """The newest underflow, if it was there in the last two samples that tell, or in the first in half of the layers.

    One that is not sure has to be there in two. A sample in which everything is zero tells nothing and is passed over.
    """
    found: list[Underflow] = []
    for row in range(len(history) - 1, -1, -1):
        one = underflow_of(history, row, min_headroom)
        if one is None or math.isnan(one.headroom) or (found and not is_same_pass(one.profile, found[0].profile)):
            continue
        if not one.where.any():
            return None
        found.append(one)
        if len(found) == 2:
            return found[0]
    return found[0] if found and found[0].is_sure and found[0].share >= _ALONE else None


def _narrow(profile: DepthProfile, scale: float) -> Floats:
    """(P,) the headroom in bits of fp16 throughout, where a part of the points is in fp16, as under autocast."""
    headroom = profile.headroom
    with np.errstate(divide="ignore", invalid="ignore"):
        base = np.log2(profile.delta_norm) - headroom + (math.log2(scale) if 0 < scale < math.inf else 0.0)
    is_wide = base < _NARROW  # neither, where the delta is zero or not finite
    if not (base > _NARROW).any():
        return headroom
    return np.where(is_wide & np.isfinite(base), headroom - _WIDER, headroom)


def _is_lost_at_once(scalars: Mapping[str, float]) -> bool:
    loss = scalars.get("loss", math.nan)
    return scalars.get("delta_floor", -math.inf) >= _FP16_FLOOR and math.isfinite(loss) and loss != 0


def _runs(low: Bools) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], low, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
