"""Does nothing get learnt because of tables that are far too large?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import columns_of_layers, first_values, newest_values
from lightning_gradflow.detectors.standstill import YOUNG, from_the_start, is_judged, stands_still, still_falls
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself
_HANDED_ON = 3.0  # rms of what differs between samples: a normalisation behind it makes it 1
_DROWNED = 0.02  # of the largest table
_MADE_UP = 0.5  # of a small change of the tables, in the loss: healthy runs start with up to 0.3
_STAYS = 0.75  # of the first share: the more is learnt, the less is made up by the size
_PART = 0.1  # of the largest share
_HALVED = 0.5  # of the loss: one that halves from the third to the last quarter of the run gets there

Seen = tuple[tuple[str, ...], dict[str, float]]


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
      that multiplies handed it on, or another embedding is fifty times as small, and drowns beside it. Such a run soon
      finds the best constant; so here it is enough that the loss does not fall any more.

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
        if not is_judged(history, young=YOUNG):
            return []
        if not still_falls(history, _HALVED):
            making_up = _making_up(history)
            if making_up[0]:
                return [from_the_start(history, "weight_scale", *making_up)]
        embedded = _embedded(history, self.max_embedding)
        if embedded[0] and (stands_still(history, min_learnt=_LEARNT) or not still_falls(history)):
            return [from_the_start(history, "weight_scale", *embedded)]
        return []


def _making_up(history: History) -> Seen:
    """Tables whose size has made up the loss in all samples, the worst first."""
    cosine = history["table_cosine"]
    if not cosine.size or np.isnan(cosine[-1]).all():  # it is measured as long as it may be so
        return (), {}
    at = np.searchsorted(history.loss_steps, history.steps)
    losses = np.append(history.losses, np.nan)[np.minimum(at, len(history.losses))]
    losses[~(losses > 0)] = np.nan  # one that may be negative has no share
    with np.errstate(all="ignore"):
        shares = cosine * history["grad_norm"] * history["weight_norm"] / losses[:, None]
    shares[~np.isfinite(shares)] = np.nan
    newest = np.nan_to_num(shares[-1])
    # the same ones in all samples: of those that were drawn anew the shares are gone, others may be left with the rest
    worst = [int(i) for i in np.argsort(-newest, kind="stable") if newest[i] > _PART * newest.max()]
    known = shares[:, worst][~np.isnan(shares[:, worst]).all(axis=1)]
    together = np.nansum(known, axis=1)
    if not together.size or not together.min() > max(_MADE_UP, _STAYS * together[0]):
        return (), {}
    return tuple(history.layers[i] for i in worst), {"loss_by_size": float(np.median(together))}


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
    if (others < _DROWNED * tables[worst]).any() or _behind(history, worst) > _HANDED_ON:
        return seen
    return (), {}


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
