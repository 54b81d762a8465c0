"""The signal against depth: what vanishing and exploding are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.trend import theil_sen
from lightning_gradflow.history import Floats, History, Point, Row

_MIN_FOR_STEPS = 6  # points: in fewer one step may be all the depth there is


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
    """

    step: int
    points: tuple[Point, ...]
    delta_norm: Floats
    slope: float
    span: float
    headroom: Floats

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(P,) where the delta norm is finite and above zero."""
        return np.isfinite(self.delta_norm) & (self.delta_norm > 0)

    def gains(self, of_layers: bool) -> Floats:
        """Factors by which the norm changes on its way back through the weights of the layers, or the activations.

        Args:
            of_layers: True for the layers, False for the activations.

        Returns:
            (G,) delta norm before / behind, for each usable point whose neighbour before it is usable too.
        """
        behind = np.array([point.is_layer == of_layers for point in self.points[1:]], dtype=bool)
        chosen = behind & self.usable[1:] & self.usable[:-1]
        return self.delta_norm[:-1][chosen] / self.delta_norm[1:][chosen]

    def modules(self, where: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        """The layers among the points at which `where` (P,) holds, the smallest delta norm first."""
        chosen = [i for i in np.flatnonzero(where) if self.points[i].is_layer]
        return tuple(self.points[i].module for i in sorted(chosen, key=lambda i: (self.delta_norm[i], i)))


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
    order = history.point_axis.order
    deltas = in_order(source.values["delta_norm"], order)
    passes = in_order(source.values.get("backward_pass", np.zeros(len(order))), order)
    measured = ~np.isnan(deltas)
    if not measured.any():
        return None
    numbers, counts = np.unique(passes[measured], return_counts=True)
    chosen = measured & (passes == numbers[np.argmax(counts)])
    points = tuple(point for point, keep in zip(history.points, chosen, strict=True) if keep)
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
    return DepthProfile(source.step, points, deltas, slope, slope * (n - 1), headroom)


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
