"""Does nothing get learnt because the state of a recurrence is chaos from the start?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import NEXT_TO_NOTHING, first_values, share_of_gradient
from lightning_gradflow.detectors.standstill import from_the_start, stands_still
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

_OVERWRITTEN = 0.3  # of the weights, by the first step
_MIN_SAMPLES = 3
_EARLY = 50  # steps: a run that has made more is judged by what it has learnt
_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself


@dataclass(frozen=True)
class ChaoticState:
    """Finds a run that stands still with recurrent weights that no usual initialisation gives.

    Where the recurrent weights of a layer, or of a loop that is written by hand, had a spectral radius above
    `max_radius` in the first sample, the state is chaos, which its bounds hide (`loss_plateau`, `recurrence`). Such
    weights alone are no finding; together with a run that learns nothing (`stands_still`) they are the reason. From the
    third sample on they are so, too, where less than 1e-4 of the largest gradient comes to them: the state is at its
    bounds for every sample.

    Args:
        max_radius: in (0, inf). The default of 4 is far beyond what is drawn: uniform weights have 0.6 and orthogonal
            ones 1; from about 1.5 on the state is chaotic.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Sompolinsky et al. 1988, Chaos in random neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn"])
        >>> history.append(Row(0, {"recurrent_radius": np.array([8.0])}))
        >>> history.append(Row(60, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in ChaoticState().judge(history)]
        [('recurrence', ('rnn',))]
    """

    max_radius: float = 4.0

    def __post_init__(self) -> None:
        check_range("max_radius", self.max_radius, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        is_still = stands_still(history, min_learnt=_LEARNT)
        if not is_still and (len(history) < _MIN_SAMPLES or history.steps[-1] > _EARLY):
            return []
        # a first step that overwrites the weights has been made when they are measured
        kept = ~(first_values(history, "update_ratio") > _OVERWRITTEN)
        radii = np.fmax(first_values(history, "recurrent_radius"), first_values(history, "loop_radius"))
        radii = np.where(kept, np.nan_to_num(radii, nan=0.0), 0.0)
        worst = [int(i) for i in np.argsort(-radii, kind="stable") if radii[i] > self.max_radius]
        if not is_still:
            worst = [i for i in worst if share_of_gradient(history, i) < NEXT_TO_NOTHING]
        if not worst:
            return []
        layers = [history.layers[i] for i in worst]
        named = tuple(dict.fromkeys([*layers, *_in_loops_of(history, layers)]))
        return [from_the_start(history, "recurrence", named, {"recurrent_radius": float(radii[worst[0]])})]


def _in_loops_of(history: History, layers: Collection[str]) -> list[str]:
    """Layers that are called as often in a forward pass as one of these: they go into these, or are gates of them."""
    calls = dict(zip(history.points, first_values(history, "calls"), strict=True))
    turns = {calls[point] for point in history.points if point.is_layer and point.module in layers}
    return [point.module for point in history.points if point.is_layer and calls[point] in turns]
