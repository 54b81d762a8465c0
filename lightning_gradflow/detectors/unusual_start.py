"""Does nothing get learnt because of weights that no usual initialisation gives?"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import columns_of_layers, first_values, newest_values
from lightning_gradflow.detectors.standstill import (
    is_judged,
    present_loss,
    stands_still,
    steps_at_full_rate,
    still_falls,
)
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_OVERWRITTEN = 0.3  # of the weights, by the first step
_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself
_HANDED_ON = 3.0  # rms of what differs between samples: a normalisation behind it makes it 1
_DROWNED = 0.02  # of the largest table
_MADE_UP = 0.5  # of a small change of the tables, in the loss: healthy runs start with up to 0.3
_STAYS = 0.75  # of the first share: the more is learnt, the less is made up by the size
_PART = 0.1  # of the largest share
_HALVED = 0.5  # of the loss: one that halves from the third to the last quarter of the run gets there
_YOUNG = 4.0  # times the steps that are needed to learn something: until then a loss may come down from an absurd start

Seen = tuple[tuple[str, ...], dict[str, float]]


@dataclass(frozen=True)
class UnusualStart:
    """Finds a run that stands still, with weights that were far from any usual initialisation in its first sample.

    Such weights alone are no finding, for many a network learns with them. Together with a run that learns nothing
    (`stands_still`) they are the reason. It is enough if one of these was so:

    - the recurrent weights of a layer, or of a loop that is written by hand, had a spectral radius above `max_radius`:
      its state is chaos, which its bounds hide (`recurrence`);
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
        max_radius: in (0, inf). The default of 4 is far beyond what is drawn: uniform weights have 0.6 and orthogonal
            ones 1; from about 1.5 on the state is chaotic.
        max_embedding: root mean square, in (0, inf). By default 10: `nn.Embedding` is drawn with 1, and most others are
            smaller.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; Sompolinsky
        et al. 1988, Chaos in random neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn"])
        >>> history.append(Row(0, {"recurrent_radius": np.array([8.0])}))
        >>> history.append(Row(60, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in UnusualStart().judge(history)]
        [('recurrence', ('rnn',))]
    """

    max_radius: float = 4.0
    max_embedding: float = 10.0

    def __post_init__(self) -> None:
        check_range("max_radius", self.max_radius, 0, float("inf"))
        check_range("max_embedding", self.max_embedding, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not is_judged(history, young=_YOUNG):
            return []
        chaotic, embedded = _chaotic(history, self.max_radius), _embedded(history, self.max_embedding)
        has_learnt_nothing = stands_still(history, min_learnt=_LEARNT)
        if chaotic[0] and has_learnt_nothing:
            return [_finding(history, "recurrence", *chaotic)]
        if not still_falls(history, _HALVED):
            making_up = _making_up(history)
            if making_up[0]:
                return [_finding(history, "weight_scale", *making_up)]
        if embedded[0] and (has_learnt_nothing or not still_falls(history)):
            return [_finding(history, "weight_scale", *embedded)]
        return []


def _finding(history: History, cause: str, layers: tuple[str, ...], evidence: dict[str, float]) -> Finding:
    return Finding(
        kind=FindingKind.LOSS_PLATEAU,
        severity=Severity.WARNING,
        step=history.rows[-1].step,
        layers=layers,
        cause=cause,
        evidence={
            "steps": float(steps_at_full_rate(history)),
            "loss": present_loss(history),
            **evidence,
        },
    )


def _chaotic(history: History, max_radius: float) -> Seen:
    """Recurrences with weights far too large for their state to keep anything, the worst first."""
    # a first step that overwrites the weights has been made when they are measured
    kept = ~(first_values(history, "update_ratio") > _OVERWRITTEN)
    radii = np.fmax(first_values(history, "recurrent_radius"), first_values(history, "loop_radius"))
    radii = np.where(kept, np.nan_to_num(radii, nan=0.0), 0.0)
    worst = [int(i) for i in np.argsort(-radii, kind="stable") if radii[i] > max_radius]
    if not worst:
        return (), {}
    layers = [history.layers[i] for i in worst]
    return tuple(dict.fromkeys([*layers, *_in_loops_of(history, layers)])), {"recurrent_radius": float(radii[worst[0]])}


def _in_loops_of(history: History, layers: Collection[str]) -> list[str]:
    """Layers that are called as often in a forward pass as one of these, and are no loops: they go into these."""
    calls = dict(zip(history.points, first_values(history, "calls"), strict=True))
    turns = {calls[point] for point in history.points if point.is_layer and point.module in layers}
    own = dict(zip(history.layers, first_values(history, "loop_radius"), strict=True))
    beside = [point.module for point in history.points if point.is_layer and calls[point] in turns]
    return [name for name in beside if math.isnan(own.get(name, math.nan))]


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
