"""Were the weights of a network drawn so large that no step of the run can change them?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import first_values, layer_mask, newest_values
from lightning_gradflow.detectors.made_by_size import WIDE, starts_far_off
from lightning_gradflow.detectors.standstill import (
    HALVED,
    YOUNG,
    from_the_start,
    is_judged,
    is_past_chance,
    keeps_residual,
    still_falls,
)
from lightning_gradflow.detectors.update_sizes import entries_of, ratios_of
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import Floats, History, Ints

_EDGE = 1.3  # times the largest singular value of a square matrix of independent entries: one of 1 to 16 has 1.25
_FEWEST = 2  # layers
_HUGE = 32.0  # times what keeps the size of a signal: no usual initialisation gives more than 2, nor training 10
_AT_BOUNDS = 0.5  # of the first outputs of a recurrence

BACK = 4.0
"""Times their norm that the run can change weights by: a quarter of it or more is the way back."""


@dataclass(frozen=True)
class LargeWeights:
    r"""Finds a run that starts from weights far above any usual initialisation, and can't get away from them.

    Normalisations and residual connections hide how large weights are: no signal dies or explodes, the loss comes down
    from an absurd start as soon as the last layer has shrunk, and all the rest stays what was drawn, softmaxes that
    pick one position among it. It is a finding (`weight_scale`) where the run had time to learn something, and

    - most layers with a matrix have weights above :math:`1 / \sqrt{fan}` by more than `max_size`, with the geometric
      mean of both fans;
    - these look as they were drawn: the largest singular value of n x m independent entries with standard deviation
      s is :math:`s (\sqrt{n} + \sqrt{m})`, and what was learnt, as in weights that were trained before, stands out;
    - the first outputs of the last layer were larger than 3, or the deviation of the scores that a cross-entropy got,
      which they are not where the forward pass scales the weights, or the scores;
    - the largest step so far, times all that are planned, is less than the weights, in the median of these layers;
    - the loss has not halved from the third to the last quarter of the run.

    Neither time nor the loss needs to be waited for where tables among them say it from the start (see
    `scores_from_the_start`), or most layers say it, by this size or by that for the number that a unit sums over,
    whatever they look like, or one by a factor of 32; all planned steps change less than four times their norm; and the
    first outputs were far from anything that is asked for: three times as far as a constant would have been, and as
    large; or scores with a deviation above 2, of which the loss was half above that of equal ones.

    A cross-entropy that is below 80 % of what equal scores give says that more was learnt than that.

    Fewer layers are enough where little was learnt: half of the first gradient at the network's output is left
    (see `keeps_residual`), and at the pace of most of their steps none of them moves by as much as its weights. Queries
    and keys of that size make a softmax pick one position each from the start, through which no gradient comes; a
    module among these layers that is bounded itself, as a recurrence is, needs no large outputs where most of its own
    start at their bounds.

    Args:
        max_size: times the usual size, in (0, inf). By default 4: He's initialisation has 1.4.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Marchenko and Pastur 1967; Chizat et al. 2019, On lazy training in differentiable programming; Zhai et al. 2023,
        Stabilizing transformer training by preventing attention entropy collapse.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> norms = {"spectral_norm": 20.0, "weight_norm": 100.0, "grad_norm": 1.0, "grad_rms": 0.01}  # 100 x 100
        >>> values = {"output_rms": 9.0, "update_ratio": 1e-3, **norms}
        >>> history.append(Row(0, {name: np.full(2, x) for name, x in values.items()}))
        >>> history.append(Row(99, scalars={"planned_steps": 400.0}, losses=np.linspace(9.0, 3.0, 100)))
        >>> [(f.cause, f.layers) for f in LargeWeights().judge(history)]
        [('weight_scale', ('fc1', 'fc2'))]
    """

    max_size: float = 4.0

    def __post_init__(self) -> None:
        check_range("max_size", self.max_size, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if is_past_chance(history):
            return []
        if is_judged(history, young=YOUNG) and not still_falls(history, HALVED):
            return self._where_it_stands(history)
        return self._at_once(history) if starts_far_off(history) else []

    def _at_once(self, history: History) -> list[Finding]:
        """Most layers are too large, or some by far, and the first outputs say what comes of it."""
        sizes = _sizes(history)
        large = np.flatnonzero(sizes > self.max_size)  # what has been trained starts from no such outputs
        if not _are_most(large, sizes):
            large = np.flatnonzero(first_values(history, "initial_size") > _HUGE)
        if not large.size:
            return []
        far = reach(history, large)
        return _found(history, sizes, large, {"reach": far}) if far < BACK else []

    def _where_it_stands(self, history: History) -> list[Finding]:
        """The run had time to learn something, and has not."""
        sizes = _mean_sizes(history)
        large = _large(history, sizes, self.max_size)
        is_loud = _first_outputs(history) > WIDE
        if _are_most(large, sizes):
            evidence = {"reach": reach(history, large)}
        elif large.size and keeps_residual(history):
            evidence = {"usual_reach": _usual_reach(history, large)}
            is_loud = is_loud or _start_at_bounds(history, large)
        else:
            return []
        return _found(history, sizes, large, evidence) if is_loud and max(evidence.values()) < 1 else []


def _found(history: History, sizes: Floats, large: Ints, evidence: dict[str, float]) -> list[Finding]:
    layers = tuple(history.layers[i] for i in large)
    evidence = {"weight_size": float(np.median(sizes[large])), **evidence}
    return [from_the_start(history, "weight_scale", layers, evidence)]


def most_are_large(history: History, max_size: float = 4.0) -> bool:
    """Whether most layers with a matrix have weights as they were drawn, far above any usual size.

    Args:
        history: where to read.
        max_size: times the usual size, in (0, inf).
    """
    sizes = _sizes(history)
    return _are_most(_large(history, sizes, max_size), sizes)


def _are_most(large: Ints, sizes: Floats) -> bool:
    return len(large) >= _FEWEST and 2 * len(large) > int((~np.isnan(sizes)).sum())


def _large(history: History, sizes: Floats, max_size: float) -> Ints:
    """The layers with such weights that look as they were drawn."""
    with np.errstate(invalid="ignore"):
        fresh = newest_values(history, "spectral_norm") <= 2 * _EDGE * _mean_sizes(history)
        return np.flatnonzero(fresh & (sizes > max_size))


def reach(history: History, layers: Ints) -> float:
    """By how much of its norm the median of some layers can move in the planned run; NaN where that is not known.

    Args:
        history: where to read.
        layers: columns of the layers.
    """
    planned = float(history.scalar("planned_steps")[-1])
    ratios = history["update_ratio"][:, layers]
    medians = np.median(ratios[np.isfinite(ratios).all(axis=1)], axis=1)
    return float(medians.max()) * planned if medians.size and planned > 0 else np.nan


def _usual_reach(history: History, layers: Ints) -> float:
    """The same of the fastest of some layers, by its median step: Adam's first ones are larger than all that follow."""
    ratios, planned = ratios_of(history)[:, layers], float(history.scalar("planned_steps")[-1])
    usual = [float(np.median(known)) for column in ratios.T if (known := column[np.isfinite(column)]).size]
    return max(usual) * planned if usual and planned > 0 else np.nan


def _start_at_bounds(history: History, layers: Ints) -> bool:
    """Whether most of the first outputs of one of these layers, which is bounded itself, were at their bounds."""
    names = {history.layers[i] for i in layers}
    shares, gates = first_values(history, "saturated_fraction"), first_values(history, "gate_fraction")
    return any(
        point.module in names and share > _AT_BOUNDS and not gate > _AT_BOUNDS
        for point, share, gate in zip(history.points, shares, gates, strict=True)
    )


def _first_outputs(history: History) -> float:
    """The deviation of the first scores, where a softmax in the loss gets some: what scales them may come last."""
    scores = history.scalar("score_deviation")
    scores = scores[~np.isnan(scores)]
    if scores.size:
        return float(scores[0])
    sizes = first_values(history, "output_rms")[layer_mask(history)]
    known = sizes[np.isfinite(sizes)]
    return float(known[-1]) if known.size else np.nan


def _sizes(history: History) -> Floats:
    """(L,) how large weights are, beside the number that a unit sums over or the mean of both fans."""
    with np.errstate(all="ignore"):
        grown = newest_values(history, "weight_norm") / first_values(history, "weight_norm")
        return np.fmax(_mean_sizes(history), first_values(history, "initial_size") * grown)


def _mean_sizes(history: History) -> Floats:
    """(L,) root mean square of the weights, times the square root of the mean fan; NaN without a matrix."""
    with np.errstate(all="ignore"):
        sizes = newest_values(history, "weight_norm") / entries_of(history) ** 0.25
    return np.where(np.isfinite(newest_values(history, "spectral_norm")) & np.isfinite(sizes), sizes, np.nan)
