"""Is the loss made by the size of tables, and not by what they say?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lightning_gradflow.detectors.known import first_values
from lightning_gradflow.detectors.standstill import YOUNG, is_judged, keeps_residual, steps_at_full_rate, steps_needed
from lightning_gradflow.detectors.update_sizes import ratios_of
from lightning_gradflow.history import Floats, History

WIDE = 3.0
"""Deviation of scores, or rms of outputs: networks that learn start with less."""

_SPREAD = 2.0  # the same where the weights say so too
_MADE_UP = 0.5  # of a small change of the tables, in the loss: healthy runs start with up to 0.3
_STAYS = 0.75  # of the first share: the more is learnt, the less is made up by the size
_PART = 0.1  # of the largest share
_LEFT = 0.5  # of the first norm
_FAR_OFF = 1.5  # times the loss of scores that are all the same
_FEWEST = 8  # steps: until then a learning rate that warms up may not have begun to

Seen = tuple[tuple[str, ...], dict[str, float]]


def made_by_size(history: History) -> Seen:
    """Tables whose size has made up the loss in all samples, the worst first."""
    shares = _shares(history)
    if not shares.size or np.isnan(shares[-1]).all():  # it is measured as long as it may be so
        return (), {}
    # the same ones in all samples: of those that were drawn anew the shares are gone, others may be left with the rest
    worst = _worst(shares[-1])
    together = _together(shares, worst)
    if not together.size or not together.min() > max(_MADE_UP, _STAYS * together[0]):
        return (), {}
    return tuple(history.layers[i] for i in worst), {"loss_by_size": float(np.median(together))}


def scores_from_the_start(history: History) -> Seen:
    """Tables that made scores so wide in the first sample that the run does not get over it.

    A softmax of scores whose deviation is above 3 is sure of one class, and a network that has learnt nothing has no
    reason to be: its loss is far above the logarithm of the number of classes, which scores of 0 would have, and comes
    down to that before anything is learnt. A network that has learnt something, and goes on with other data, is not
    that far off. Whether the run gets over it by itself is told by the steps. It does not if both is so:

    - the tables are those of embeddings, which are the output layer as well, or are multiplied with each other; their
      size still makes up the loss, in the newest sample and in most of them, and the planned steps, each as large as
      the largest so far, can't change them by as much as their size. Or, whatever tables they are, the run had time to
      learn something, half of the first gradient at the network's output is left (see `keeps_residual`), and the
      same can be said of most steps. Prototypes, to which distances are measured, are soon made up for by what comes
      before them;
    - it is young, and the learning rate was at its full height for 8 steps.

    Args:
        history: where to read; nothing is said where the length of the run is not known.

    Returns:
        The tables, the worst first, and the evidence; nothing where it is not so.

    References:
        Press and Wolf 2017, Using the output embedding to improve language models.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["embedding"])
        >>> shares = {"table_cosine": 0.8, "grad_norm": 2.0, "weight_norm": 50.0, "update_ratio": 1e-3}
        >>> scalars = {"planned_steps": 400.0, "score_deviation": 17.0, "score_classes": 24.0, "lr": 1e-3}
        >>> for step in (0, 8):
        ...     values = {name: np.array([value]) for name, value in shares.items()}
        ...     history.append(Row(step, values, scalars=scalars, losses=np.full(1 + step // 8 * 7, 67.0)))
        >>> scores_from_the_start(history)[0]
        ('embedding',)
    """
    if not is_young(history) or not _far_off(history):
        return (), {}
    shares = _shares(history)
    worst = _worst(shares[0]) if shares.size else []
    together = _together(shares, worst)
    if not together.size or not together[0] > _MADE_UP:
        return (), {}
    norms = history["weight_norm"][[0, -1]][:, worst]
    if not (norms[1] > _LEFT * norms[0]).all():  # they were drawn anew
        return (), {}
    planned = float(history.scalar("planned_steps")[-1])
    if not planned > 0:
        return (), {}
    evidence = {"score_deviation": _first(history.scalar("score_deviation")), "loss_by_size": float(together[0])}
    embedded = [i for i in worst if np.isnan(first_values(history, "spectral_norm")[i])]
    of_these = _together(shares, embedded)
    still = of_these.size and min(of_these[0], np.median(of_these), np.nansum(shares[-1, embedded])) > _MADE_UP
    if still and (reach := max(_known(history, np.max, embedded), default=math.nan) * planned) < 1:
        return tuple(history.layers[i] for i in embedded), {**evidence, "reach": reach}
    if is_judged(history, young=YOUNG) and keeps_residual(history):
        usual = max(_known(history, np.median, worst), default=math.nan) * planned
        if usual < 1:
            return tuple(history.layers[i] for i in worst), {**evidence, "usual_reach": usual}
    return (), {}


def starts_far_off(history: History) -> bool:
    """Whether a young run started from outputs so large that it is spent on the way back from there.

    They say so by themselves: the scores, or what was compared with targets, were far from anything that is asked for.
    Or tables are to blame, for which `scores_from_the_start` has conditions of its own.

    Args:
        history: where to read.
    """
    if not is_young(history):
        return False
    names = ("compared_rms", "residual_rms", "target_deviation")
    output, error, deviation = (_first(history.scalar(name)) for name in names)
    is_beyond = deviation > 0 and output > WIDE * deviation and error > WIDE * deviation
    return is_beyond or _far_off(history, _SPREAD) or bool(scores_from_the_start(history)[0])


def is_young(history: History) -> bool:
    """Whether the learning rate of a run was at its full height for eight steps, and not for long.

    Args:
        history: where to read; False for several optimizers, whose losses play against each other.
    """
    if not history.rows or history.scalar("optimizers")[-1] > 1:
        return False
    return _FEWEST <= steps_at_full_rate(history) <= YOUNG * steps_needed(history)


def _known(history: History, middle: Callable[[Floats], float], layers: list[int]) -> list[float]:
    """A number of the update ratios of each of these layers."""
    columns = ratios_of(history)[:, layers].T
    return [float(middle(known)) for column in columns if (known := column[np.isfinite(column)]).size]


def _far_off(history: History, wide: float = WIDE) -> bool:
    """Whether the first scores were wide, and their loss was far above that of scores that are all the same."""
    classes = _first(history.scalar("score_classes"))
    is_wide = _first(history.scalar("score_deviation")) > wide
    return is_wide and classes > 1 and _first(history.losses) > _FAR_OFF * math.log(classes)


def _shares(history: History) -> Floats:
    """(R, L) by how much the loss falls for a small change of the size of tables, relative to both."""
    at = np.searchsorted(history.loss_steps, history.steps)
    losses = np.append(history.losses, np.nan)[np.minimum(at, len(history.losses))]
    losses[~(losses > 0)] = np.nan  # one that may be negative has no share
    with np.errstate(all="ignore"):
        shares = history["table_cosine"] * history["grad_norm"] * history["weight_norm"] / losses[:, None]
    return np.where(np.isfinite(shares), shares, np.nan)


def _worst(shares: Floats) -> list[int]:
    """The layers that make up most of it, the worst first."""
    known = np.nan_to_num(shares)
    return [int(i) for i in np.argsort(-known, kind="stable") if known[i] > _PART * known.max()]


def _together(shares: Floats, layers: list[int]) -> Floats:
    """The sum of theirs, of the samples in which one is known."""
    chosen = shares[:, layers]
    return np.asarray(np.nansum(chosen[~np.isnan(chosen).all(axis=1)], axis=1))


def _first(values: Floats) -> float:
    """The first of them that is known; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known[0]) if known.size else math.nan
