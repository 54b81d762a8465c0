"""Does a run stand still, and did it start from weights that no usual initialisation gives?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import first_values, known_rows, layer_mask
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

PATIENCE = 50
"""Steps: by then a network that is well has learnt something."""

_SHARE = 0.2  # of the planned steps, where that is more than the patience: Adam makes up for much in time
_LONGEST = 300  # steps: from there on a loss that stands still is a plateau, whatever the cause
_FULL = 0.1  # of the largest learning rate: below, nothing can be expected
_YOUNG = 2.0  # times the patience: what sets in later has another reason
_RADIUS = 4.0  # spectral radius of a recurrence; uniform weights have 0.6, orthogonal ones 1, chaos begins above 1.5
_EMBEDDED = 10.0  # rms: `nn.Embedding` is drawn with 1, and most others are smaller
_OVERWRITTEN = 0.3  # of the weights, by the first step
_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself
_HANDED_ON = 3.0  # rms of what differs between samples: a normalisation behind it makes it 1

Seen = tuple[tuple[str, ...], dict[str, float]]
_NOTHING: tuple[str, Seen] = ("", ((), {}))


def steps_needed(history: History, patience: int = PATIENCE) -> float:
    """How many steps a run has to learn something: `patience`, or 20 % of the planned ones if more, 300 at most."""
    planned = float(np.nan_to_num(history.scalar("planned_steps")[-1]))
    return max(patience, min(_SHARE * planned, _LONGEST))


def steps_at_full_rate(history: History) -> int:
    """Steps since the learning rate last rose, or was below a tenth of its maximum."""
    rates, steps = history.scalar("lr"), history.steps
    known = np.isfinite(rates)
    if not known.any():
        return int(steps[-1])
    rates, steps = rates[known], steps[known]
    low = rates < _FULL * rates.max()
    low[:-1] |= np.diff(rates) > 0
    begun = np.flatnonzero(low)[-1] + 1 if low.any() else 0
    return int(steps[-1] - steps[begun]) if begun < len(steps) else 0


def stands_still(history: History, patience: int = PATIENCE, min_learnt: float = 0.05) -> bool:
    """Whether a run had time to learn something from its start on, and has not.

    It is asked while the run is young, up to twice that time: what stops a run later is none of what it started with.
    Several optimizers are not judged, whose losses play against each other.

    Args:
        history: where to read.
        patience: steps, in [1, inf); see `steps_needed`.
        min_learnt: share of the starting loss that must be gone, in (0, 1); see `has_learnt`.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=59, losses=np.full(60, 2.3)))
        >>> stands_still(history)
        True
    """
    if not history.rows or history.scalar("optimizers")[-1] > 1:
        return False
    needed = steps_needed(history, patience)
    if history.steps[-1] < needed or not np.isfinite(history.losses).any():
        return False
    return needed <= steps_at_full_rate(history) <= _YOUNG * needed and not has_learnt(history, min_learnt)


def unusual_start(history: History) -> list[Finding]:
    """A run that stands still, with weights that were far from any usual initialisation in its first sample.

    Such weights alone are no finding, for many a network learns with them. Together with a run that learns nothing
    (`stands_still`) they are the reason. It is enough if one of these was so:

    - the recurrent weights of a layer had a spectral radius above 4: its state is chaos, which its bounds hide;
    - an embedding gave outputs of more than 10, and what comes behind handed them on.

    The size of the outputs, the largest singular values and the gain of the gradient do not count: those of trained
    weights, from which a run may go on where there is little left to learn, are as large.

    Args:
        history: where to read.

    Returns:
        One finding, of cause `recurrence` in the first case and `weight_scale` in the second, or none.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; Sompolinsky
        et al. 1988, Chaos in random neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn"])
        >>> history.append(Row(0, {"recurrent_radius": np.array([8.0])}))
        >>> history.append(Row(60, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in unusual_start(history)]
        [('recurrence', ('rnn',))]
    """
    if not stands_still(history, min_learnt=_LEARNT):
        return []
    looks = (("recurrence", _chaotic), ("weight_scale", _embedded))
    cause, (layers, evidence) = next(((cause, seen) for cause, look in looks if (seen := look(history))[0]), _NOTHING)
    if not layers:
        return []
    return [
        Finding(
            kind=FindingKind.LOSS_PLATEAU,
            severity=Severity.WARNING,
            step=history.rows[-1].step,
            layers=layers,
            cause=cause,
            evidence={
                "steps": float(steps_at_full_rate(history)),
                "loss": float(history.losses[np.isfinite(history.losses)][-1]),
                **evidence,
            },
        )
    ]


def _chaotic(history: History) -> Seen:
    """Recurrences with weights far too large for their state to keep anything, the worst first."""
    # a first step that overwrites the weights has been made when they are measured
    kept = ~(first_values(history, "update_ratio") > _OVERWRITTEN)
    radii = np.where(kept, np.nan_to_num(first_values(history, "recurrent_radius"), nan=0.0), 0.0)
    worst = [int(i) for i in np.argsort(-radii, kind="stable") if radii[i] > _RADIUS]
    return tuple(history.layers[i] for i in worst), {"recurrent_radius": float(radii[worst[0]])} if worst else {}


def _embedded(history: History) -> Seen:
    """An embedding, first of all layers, whose outputs are far too large for those behind it."""
    if not starts_with_embedding(history):
        return (), {}
    layers = np.flatnonzero(layer_mask(history))
    sizes, spreads = (first_values(history, name)[layers] for name in ("output_rms", "output_spread"))
    differs = (sizes * spreads)[1:]
    differs = differs[np.isfinite(differs)]
    if not (sizes[0] > _EMBEDDED and differs.size and differs[0] > _HANDED_ON):
        return (), {}
    return (history.points[layers[0]].module,), {"output_rms": float(sizes[0])}


def starts_with_embedding(history: History) -> bool:
    """Whether the first layer looks numbers up: it has no matrix that multiplies, and its inputs have no size.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["emb", "fc"])
        >>> history.add_points([Point("emb", "emb"), Point("fc", "fc")])
        >>> history.append(Row(0, {"spectral_norm": np.array([np.nan, 1.0]), "output_rms": np.ones(2)}))
        >>> starts_with_embedding(history)
        True
    """
    layers = np.flatnonzero(layer_mask(history))
    norms = dict(zip(history.layers, first_values(history, "spectral_norm"), strict=True))
    known = {name for name, norm in norms.items() if math.isfinite(norm)}
    if not layers.size or not known or known_rows(history, "input_rms").any():
        return False
    first = history.points[layers[0]].module
    return first in norms and first not in known
