"""Were the weights of a network drawn so small that the first steps write over them?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import first_values
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.update_sizes import entries_of, finding_of
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

_FEWEST = 2  # layers: the last one, and one of zeros, are small on purpose
_LARGE = 0.1  # share of the weights that one step changes: a hundred times what is usual
_FIRST = 3  # samples
_WAITED = 16  # steps in which weights that are small on purpose, and multiplied by something, learn
_LAST = 64  # step: by then steps have made something of the weights


@dataclass(frozen=True)
class SmallWeights:
    r"""Finds a run that starts from weights far below any usual initialisation.

    The gradient need not vanish for that: residual connections carry it past such layers, and normalisations blow up
    what comes through. But steps that are made for usual weights write over them, all units in the same direction, and
    what the run goes on with is not what any initialisation gives. It is a finding (`update_ratio`, `weight_scale`)
    where

    - most layers with a matrix that is not zero, and two or more, started from weights whose entries are below
      :math:`1 / \sqrt{fan_{in}}` by more than `min_size` says (`initial_size`);
    - and one of the first three samples has a step that is a tenth as large as these or more, in the median of these
      layers; or nothing was learnt in 16 steps.

    It is asked in the first 64 steps.

    Args:
        min_size: times the size that keeps that of a signal, in [0, 1). By default 0.04: usual initialisations have 0.6
            to 1.4, a deviation of 0.02 in layers of 48 units 0.14, and sine networks, which multiply what comes out by
            30, 0.047.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.6; Karpathy, CS231n, Ratio of weights:updates.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> known = {"initial_size": 0.01, "update_norm": 0.03, "grad_norm": 1.0, "grad_rms": 0.01}  # 100 x 100
        >>> history.append(Row(0, {name: np.full(2, x) for name, x in known.items()}))
        >>> [(f.cause, f.layers, round(f.evidence["update_ratio"], 3)) for f in SmallWeights().judge(history)]
        [('weight_scale', ('fc1', 'fc2'), 0.3)]
    """

    min_size: float = 0.04

    def __post_init__(self) -> None:
        check_range("min_size", self.min_size, 0, 1, open_low=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows or history.steps[-1] > _LAST:
            return []
        sizes = first_values(history, "initial_size")
        small = (sizes > 0) & (sizes < self.min_size)
        if small.sum() < _FEWEST or 2 * small.sum() <= (sizes > 0).sum():
            return []
        # biases may be larger than they are, and say nothing of them
        with np.errstate(all="ignore"):
            ratios = history["update_norm"][:_FIRST] / (sizes * entries_of(history) ** 0.25)
        known = [row[small & np.isfinite(row)] for row in ratios]
        largest = max((float(np.median(row)) for row in known if row.size), default=0.0)
        if not (largest >= _LARGE or (history.steps[-1] >= _WAITED and not has_learnt(history))):
            return []
        evidence = {"weight_size": float(np.median(sizes[small]))}
        evidence |= {"update_ratio": largest} if largest >= _LARGE else {}
        return [finding_of(history, "weight_scale", np.where(small, sizes, np.nan), evidence)]
