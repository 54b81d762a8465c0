"""Were the weights of a network drawn so small that the first steps write over them?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import first_values, layer_mask
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import stands_still
from lightning_gradflow.detectors.update_sizes import finding_of
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import Bools, History

_FEWEST = 2  # layers: the last one, and one of zeros, are small on purpose
_LARGE = 0.1  # share of the weights that one step changes: a hundred times what is usual
_FIRST = 3  # samples
_THROUGH = 0.1  # of the gradient: usual layers, and small ones that something makes up for, let a quarter through
_SOON = 16  # step: by then a shallow network has made weights of its own out of its first steps, and learns
_LAST = 64  # step: by then steps have made something of the weights


@dataclass(frozen=True)
class SmallWeights:
    r"""Finds a run that starts from weights far below any usual initialisation.

    The gradient need not vanish for that: residual connections carry it past such layers, and normalisations blow up
    what comes through. But steps that are made for usual weights write over them, all units in the same direction, and
    what the run goes on with is not what any initialisation gives. It is a finding (`update_ratio`, `weight_scale`)
    where

    - most layers with a matrix that is not zero, and two or more that the optimizer moves, started from weights whose
      entries are below :math:`1 / \sqrt{fan_{in}}` by more than `min_size` says (`initial_size`);
    - and one of the first three samples has a step that is a tenth as large as these or more, in the median of these
      layers, and less than a tenth of the gradient comes through one of them, to the layer before it: nothing makes up
      for how small they are, as the frequency of a sine does. It is asked from step 16 to step 64, while nothing is
      learnt: many a network makes usual weights out of its first steps, and goes on well;
    - or the run stands still from its start on (see `stands_still`).

    Not judged with several optimizers, whose losses play against each other.

    Args:
        min_size: times the size that keeps that of a signal, in [0, 1). By default 0.04: usual initialisations have 0.6
            to 1.4, a deviation of 0.02 in layers of 48 units 0.14, and sine networks, which multiply what comes out by
            30, 0.047.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.6; Karpathy, CS231n, Ratio of weights:updates.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> known = {"initial_size": 0.01, "initial_norm": 0.1, "update_norm": 0.03}
        >>> values = {name: np.full(2, x) for name, x in known.items()}
        >>> history.append(Row(16, values | {"delta_norm": np.array([0.01, 1.0])}, losses=np.full(17, 2.3)))
        >>> [(f.cause, f.layers, round(f.evidence["update_ratio"], 3)) for f in SmallWeights().judge(history)]
        [('weight_scale', ('fc1', 'fc2'), 0.3)]
    """

    min_size: float = 0.04

    def __post_init__(self) -> None:
        check_range("min_size", self.min_size, 0, 1, open_low=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows or history.scalar("optimizers")[-1] > 1:
            return []
        sizes = first_values(history, "initial_size")
        small = (sizes > 0) & (sizes < self.min_size) & np.isfinite(first_values(history, "update_norm"))
        if small.sum() < _FEWEST or 2 * small.sum() <= (sizes > 0).sum():
            return []
        # biases may be larger than they are, and say nothing of them
        ratios = history["update_norm"][:_FIRST, small] / first_values(history, "initial_norm")[small]
        known = [row[np.isfinite(row)] for row in ratios]
        largest = max((float(np.median(row)) for row in known if row.size), default=0.0)
        is_asked = _SOON <= history.steps[-1] <= _LAST and not has_learnt(history)
        overwrites = largest >= _LARGE and is_asked and _holds_back(history, small)
        if not (overwrites or stands_still(history)):
            return []
        evidence = {"weight_size": float(np.median(sizes[small]))}
        evidence |= {"update_ratio": largest} if largest >= _LARGE else {}
        return [finding_of(history, "weight_scale", np.where(small, sizes, np.nan), evidence)]


def _holds_back(history: History, small: Bools) -> bool:
    """Whether little of the gradient comes through one of these layers, from its output to that of the one before."""
    names = {name for name, is_small in zip(history.layers, small, strict=True) if is_small}
    deltas = first_values(history, "delta_norm")
    at = [i for i in np.flatnonzero(layer_mask(history)) if deltas[i] > 0]
    return any(deltas[before] < _THROUGH * deltas[i] for before, i in pairwise(at) if history.points[i].module in names)
