"""Does nothing get learnt because of tables that are far too large?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import columns_of_layers, first_values, newest_values
from lightning_gradflow.detectors.large_weights import most_are_large
from lightning_gradflow.detectors.made_by_size import Seen, made_by_size, scores_from_the_start
from lightning_gradflow.detectors.standstill import HALVED, YOUNG, from_the_start, is_judged, stands_still, still_falls
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself
_HANDED_ON = 3.0  # rms of what differs between samples: a normalisation behind it makes it 1
_DROWNED = 0.02  # of the largest table, and of an output that all samples share
_DIFFERS = 0.2  # of an output


@dataclass(frozen=True)
class LargeTables:
    """Finds a run that gets nowhere with tables that were far larger than usual in its first sample.

    Such tables alone are no finding, for many a network learns with them (`loss_plateau`, `weight_scale`). They are one
    if one of these is so:

    - tables that are multiplied with each other, or that the output is made by, make up the loss (`weight_scale`): from
      the first sample to the newest one it would fall, if they were smaller by a small share, by more than half of that
      share. A loss that is made by the size of outputs falls by as much (cross-entropy) or twice as much (squares), for
      each of the factors, and goes on to do so; where outputs start small it is less than a third, and with all that
      is learnt it comes down, by a quarter at least. A loss that is made up falls for ever so long. So here it is
      enough that it has not halved from the third to the last quarter of the run;
    - the table of an embedding was larger than `max_embedding`, and hides the signal (`weight_scale`): the next layer
      that multiplies handed it on; or another embedding is fifty times as small, and drowns beside it; or samples
      differ in what a layer gives, and by less than a fiftieth in what a later one does, as where the rows are added at
      their places. Such a run soon finds the best constant; so here it is enough that the loss does not fall any more.

    The size of the outputs, the largest singular values and the gain of the gradient do not count: those of trained
    weights, from which a run may go on where there is little left to learn, are as large.

    Args:
        max_embedding: root mean square, in (0, inf). By default 10: `nn.Embedding` is drawn with 1, and most others are
            smaller.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["users", "items"])
        >>> history.append(Row(0, {"embedding_rms": np.array([15.0, 0.1])}))
        >>> history.append(Row(60, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in LargeTables().judge(history)]
        [('weight_scale', ('users',))]
    """

    max_embedding: float = 10.0

    def __post_init__(self) -> None:
        check_range("max_embedding", self.max_embedding, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if (scores := scores_from_the_start(history))[0] and not most_are_large(history):
            return [from_the_start(history, "weight_scale", *scores)]
        if not is_judged(history, young=YOUNG):
            return []
        if not still_falls(history, HALVED):
            making_up = made_by_size(history)
            if making_up[0]:
                return [from_the_start(history, "weight_scale", *making_up)]
        embedded = _embedded(history, self.max_embedding)
        if embedded[0] and (stands_still(history, min_learnt=_LEARNT) or not still_falls(history)):
            return [from_the_start(history, "weight_scale", *embedded)]
        return []


def _embedded(history: History, max_embedding: float) -> Seen:
    """An embedding that was and is far too large for the layers behind it, or for those beside it."""
    tables = first_values(history, "embedding_rms")
    with np.errstate(all="ignore"):
        growth = newest_values(history, "weight_norm") / first_values(history, "weight_norm")
        tables = tables * np.where(np.isfinite(growth), growth, 1.0)
    tables[~np.isfinite(tables)] = np.nan
    if np.isnan(tables).all():
        return (), {}
    worst = int(np.nanargmax(tables))
    seen = (history.layers[worst],), {"embedding_rms": float(tables[worst])}
    others = np.delete(tables, worst)
    if not tables[worst] > max_embedding:
        return (), {}
    is_drowned = (others < _DROWNED * tables[worst]).any() or _samples_are_drowned(history)
    if is_drowned or _behind(history, worst) > _HANDED_ON:
        return seen
    return (), {}


def _samples_are_drowned(history: History) -> bool:
    """Whether what differs between samples comes in, and is next to nothing behind a later layer.

    A table whose rows are added at their places is the same for all samples.
    """
    spreads = first_values(history, "output_spread")
    known = spreads[np.isfinite(spreads)]
    return bool(known.size) and bool((known[np.argmax(known > _DIFFERS) :] < _DROWNED).any()) and known.max() > _DIFFERS


def _behind(history: History, layer: int) -> float:
    """Rms of what differs between samples in the output of the first layer with a matrix behind another; NaN: none."""
    norms, at = first_values(history, "spectral_norm"), columns_of_layers(history)
    behind = np.flatnonzero(at == layer)
    if not behind.size:
        return math.nan
    with np.errstate(invalid="ignore"):  # infinity times zero
        differs = first_values(history, "output_rms") * first_values(history, "output_spread")
    multiplies = (at >= 0) & np.isfinite(norms[at]) & np.isfinite(differs)
    after = np.flatnonzero(multiplies & (np.arange(len(at)) > behind[0]))
    return float(differs[after[0]]) if after.size else math.nan
