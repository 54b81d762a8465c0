"""The signal against depth: what vanishing and exploding are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.known import columns_of_layers
from lightning_gradflow.detectors.trend import theil_sen
from lightning_gradflow.history import Bools, Floats, History, Point, Row

_MIN_FOR_STEPS = 6  # points: in fewer one step may be all the depth there is
_LARGEST_STEP = 1.0  # decades that a point may lose in a section: what loses more is a branch, or one bad layer
_MIN_FOR_CHOKE = 3  # layers with weights, to say that one of them is unlike the others
_CHOKING = 0.01  # of the median largest singular value
_USABLE = 1e-3  # of the last layer's signal: the decay from which plain SGD learns no more


@dataclass(frozen=True)
class Section:
    """Neighbouring points of a profile, and the decades that the signal gains on its way back through them.

    Args:
        start: its first point.
        stop: the point behind its last one.
        span: decades; negative where the signal dies.
    """

    start: int
    stop: int
    span: float


@dataclass(frozen=True)
class DepthProfile:
    """The delta norms of one backward pass, in order of execution.

    Args:
        step: the optimizer step it was taken from.
        points: the P points that the pass went through, first layer first.
        delta_norm: (P,) their delta norms; 0 and inf are kept.
        slope: Theil-Sen slope of log10(delta norm) per point, towards the *first* layer; NaN without two usable points.
        span: `slope * (number of usable points - 1)`, in decades: negative where the signal dies on its way to
            the first layer, positive where it grows, near 0 where it arrives. Being a ratio it does not
            depend on the size of the loss.
        headroom: (P,) bits between each delta, as the backward pass held it, and the smallest number of its format;
            NaN where it was not measured.
        spectral_norm: (P,) the largest singular value of each layer's weights; NaN at activations, and where it was not
            measured.
    """

    step: int
    points: tuple[Point, ...]
    delta_norm: Floats
    slope: float
    span: float
    headroom: Floats
    spectral_norm: Floats

    @property
    def usable(self) -> Bools:
        """(P,) where the delta norm is finite and above zero."""
        return np.isfinite(self.delta_norm) & (self.delta_norm > 0)

    @property
    def gains(self) -> Floats:
        """(P,) factor by which the norm changes on its way back through each point; NaN where it can't be told."""
        gains = np.full(len(self.points), np.nan)
        both = self.usable[1:] & self.usable[:-1]
        gains[1:][both] = self.delta_norm[:-1][both] / self.delta_norm[1:][both]
        return gains

    @property
    def section(self) -> Section:
        """The stretch of neighbouring points that loses most: norms grow again where a normalisation stands before it.

        A point loses one decade at most, so that a branch beside the others does not make a section.
        """
        at = np.flatnonzero(self.usable)
        if len(at) < 2:
            return Section(0, len(self.points), 0.0)
        lost = np.minimum(np.diff(np.log10(self.delta_norm[at])), _LARGEST_STEP)
        total = np.concatenate([[0.0], np.cumsum(lost)])
        falls = total - np.minimum.accumulate(total)
        stop = int(np.argmax(falls))
        start = int(np.argmin(total[: stop + 1]))
        return Section(int(at[start]), int(at[stop]) + 1, -float(falls[stop]))

    @property
    def choke(self) -> int | None:
        """The one layer whose weights are next to nothing, and behind which the signal is: all before it gets a crumb.

        In a branch beside others the signal is well again before it; it must be small at every point before the layer.
        """
        norms = self.spectral_norm
        known = norms[np.isfinite(norms) & (norms > 0)]
        if len(known) < _MIN_FOR_CHOKE:
            return None
        for i in np.flatnonzero(norms < _CHOKING * np.median(known)):
            before, behind = self.delta_norm[:i][self.usable[:i]], self.delta_norm[i:][self.usable[i:]]
            if len(before) and len(behind) > 1 and before.max() < _USABLE * behind.min():
                return int(i)
        return None

    @property
    def effective_depth(self) -> tuple[int, int]:
        """How many layers get a usable signal, and how many were reached or should have been.

        Usable is a thousandth of the signal at the last layer or more. A layer that got zero or infinity counts as one
        that gets none.
        """
        layers = np.array([point.is_layer for point in self.points], dtype=bool)
        if not (layers & self.usable).any():
            return 0, int(layers.sum())
        last = self.delta_norm[layers & self.usable][-1]
        return int((layers & self.usable & (self.delta_norm >= _USABLE * last)).sum()), int(layers.sum())

    def modules(self, where: Bools) -> tuple[str, ...]:
        """The layers among the points at which `where` (P,) holds, the smallest delta norm first.

        Where none of them is the output of a layer, as in a module that multiplies with parameters of its own, they are
        the modules in which the activations run.
        """
        chosen = sorted(np.flatnonzero(where), key=lambda i: (self.delta_norm[i], i))
        layers = [self.points[i].module for i in chosen if self.points[i].is_layer]
        return tuple(layers or dict.fromkeys(self.points[i].module for i in chosen))


def recent_profiles(history: History, count: int) -> list[DepthProfile]:
    """The newest profile and those before it through the same part of the network, `count` at most, newest first.

    Where optimizers step by turns, as in a GAN, one step shows one network and the next another: they say nothing about
    each other. A step that a gradient scaler skipped tells nothing: it overflowed on the way, at a scale that no other
    step has.
    """
    found: list[DepthProfile] = []
    for row in range(len(history) - 1, -1, -1):
        profile = None if is_skipped(history.rows[row]) else depth_profile(history, row)
        if profile is not None and (not found or is_same_pass(profile, found[0])):
            found.append(profile)
        if len(found) == count:
            break
    return found


def is_same_pass(one: DepthProfile, other: DepthProfile) -> bool:
    """Whether two backward passes went through the same part of the network: through half of the points or more."""
    if one.points == other.points:
        return True
    here, there = set(one.points), set(other.points)
    return 2 * len(here & there) >= max(len(here), len(there))


def is_skipped(row: Row) -> bool:
    """Whether a gradient scaler met infinity in this step and left it out, which is what it is there for."""
    return row.scalars.get("step_skipped") == 1


def depth_profile(history: History, row: int = -1) -> DepthProfile | None:
    """The depth profile of a row, from the backward pass that went through the most points.

    With several backward passes in a step (manual optimization) norms of different losses must not be compared.
    With two or three usable points the span is simply the ratio of the first to the last. From six on, a single step
    that is larger than all the others counts as the next one: a branch beside the others makes one step, depth many.

    Args:
        history: where to read.
        row: index of the row, as for a list.

    Returns:
        The profile, or None where the row holds no delta norm.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(5)])
        >>> history.append(Row(step=0, values={"delta_norm": np.array([1e-8, 1e-6, 1e-4, 1e-2, 1.0])}))
        >>> round(depth_profile(history).span, 6)
        -8.0
    """
    if not history.rows or "delta_norm" not in history.rows[row].values:
        return None
    source = history.rows[row]
    return history.facts.of_row("depth profile", source.step, lambda: _depth_profile(history, source))


def _depth_profile(history: History, source: Row) -> DepthProfile | None:
    order = history.point_axis.order
    deltas = in_order(source.values["delta_norm"], order)
    passes = in_order(source.values.get("backward_pass", np.zeros(len(order))), order)
    measured = ~np.isnan(deltas)
    if not measured.any():
        return None
    numbers, counts = np.unique(passes[measured], return_counts=True)
    chosen = measured & (passes == numbers[np.argmax(counts)])
    points = history.points if chosen.all() else tuple(history.points[i] for i in np.flatnonzero(chosen))
    deltas = deltas[chosen]
    headroom = in_order(source.values.get("delta_headroom", np.empty(0)), order)[chosen]
    logs = np.log10(deltas[np.isfinite(deltas) & (deltas > 0)])
    n = len(logs)
    if n < 2:
        slope = math.nan
    elif n < 4:
        slope = float(logs[0] - logs[-1]) / (n - 1)
    else:
        slope = -theil_sen(np.arange(n, dtype=np.float64), _without_lone_step(logs))
    norms = in_order(source.values.get("spectral_norm", np.empty(0)), history.layer_axis.order)
    spectral = np.append(norms, math.nan)[columns_of_layers(history)[chosen]]  # the last one at activations
    return DepthProfile(source.step, points, deltas, slope, slope * (n - 1), headroom, spectral)


def _without_lone_step(logs: Floats) -> Floats:
    """The same series with its largest step made as small as the second largest, from six points on.

    Order of execution is not depth where branches run beside each other: an auxiliary head with a small weight, called
    first, puts a step into the profile on both sides of which the signal is well. A decay has many steps.
    """
    if len(logs) < _MIN_FOR_STEPS:
        return logs
    steps = np.diff(logs)
    sizes = np.sort(np.abs(steps))
    largest = np.argmax(np.abs(steps))
    steps[largest] = math.copysign(sizes[-2], steps[largest])
    return np.concatenate([logs[:1], logs[0] + np.cumsum(steps)])


def in_order(values: Floats, order: npt.NDArray[np.int64]) -> Floats:
    """Values by identity -> values in order, NaN for names younger than the row."""
    padded = np.full(len(order), np.nan)
    padded[: len(values)] = values
    return padded[order]
