"""Does a run stand still that had time to learn something?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import first_values, input_point, known_rows, layer_mask
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

YOUNG = 4.0
"""Times the steps that are needed to learn something: until then a loss may come down from an absurd start."""

PATIENCE = 50
"""Steps: by then a network that is well has learnt something."""

HALVED = 0.5
"""Of the loss: one that halves from the third to the last quarter of the run gets there."""

LONGEST = 300
"""Steps: from there on a loss that stands still is a plateau, whatever the cause."""

_SHARE = 0.2  # of the planned steps, where that is more than the patience: Adam makes up for much in time
_FULL = 0.1  # of the largest learning rate: below, nothing can be expected
_YOUNG = 2.0  # times the patience: what sets in later has another reason
_FALLEN = 0.02  # of the loss, over the second half of the run so far
_CLEAR = 2.0  # z score of such a fall
_RESIDUAL = 0.5  # of the first gradient at the output: a constant leaves 0.6 of it or more
_BETTER = 0.8  # of the loss of equal scores
_PRESENT = 20  # losses: one alone is that of a batch


def steps_needed(history: History, patience: int = PATIENCE) -> float:
    """How many steps a run has to learn something: `patience`, or 20 % of the planned ones if more, 300 at most."""
    planned = float(np.nan_to_num(history.scalar("planned_steps")[-1]))
    return max(patience, min(_SHARE * planned, LONGEST))


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
    return is_judged(history, patience) and not has_learnt(history, min_learnt)


def is_judged(history: History, patience: int = PATIENCE, young: float = _YOUNG) -> bool:
    """Whether a run had time to learn something from its start on, and is young still; see `stands_still`.

    Args:
        history: where to read.
        patience: steps, in [1, inf); see `steps_needed`.
        young: times the steps that are needed, in [1, inf): how long it is asked.
    """
    if not history.rows or history.scalar("optimizers")[-1] > 1:
        return False
    needed = steps_needed(history, patience)
    if history.steps[-1] < needed or not np.isfinite(history.losses).any():
        return False
    return needed <= steps_at_full_rate(history) <= young * needed


def present_loss(history: History) -> float:
    """Where the loss stands: the median of the newest twenty that are finite; NaN without any.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=3, losses=np.array([9.0, 2.0, 2.5, 3.0])))
        >>> present_loss(history)
        2.75
    """
    losses = history.losses[np.isfinite(history.losses)][-_PRESENT:]
    return float(np.median(losses)) if losses.size else math.nan


def is_past_chance(history: History) -> bool:
    """Whether a cross-entropy is clearly below what equal scores give: it is not only the size that came down.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(0, scalars={"score_classes": 10.0}, losses=np.array([1.8])))
        >>> is_past_chance(history)  # log(10) is 2.3
        True
    """
    classes = history.scalar("score_classes")
    known = classes[classes > 1]
    return bool(known.size) and present_loss(history) < _BETTER * math.log(known[0])


def from_the_start(history: History, cause: str, layers: tuple[str, ...], evidence: dict[str, float]) -> Finding:
    """A run that stands still with what it was born with, at the newest row."""
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


def still_falls(history: History, share: float = _FALLEN) -> bool:
    """Whether the loss has fallen since the middle of the run: to find the best constant is over soon.

    True too where there are too few losses to tell.

    Args:
        history: where to read.
        share: of the loss that must be gone since then, in [0, 1).

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(step=99, losses=np.concatenate([np.linspace(200, 1, 40), np.ones(60)])))
        >>> still_falls(history)
        False
    """
    losses = history.losses[np.isfinite(history.losses)]
    quarter = len(losses) // 4
    if quarter < 4:
        return True
    late = losses[-2 * quarter :]
    before, now = float(np.median(late[:quarter])), float(np.median(late[quarter:]))
    noise = 1.25 * float(np.median(np.abs(np.diff(late)))) / math.sqrt(quarter)
    return before - now > max(share * abs(before), _CLEAR * noise)


def keeps_residual(history: History) -> bool:
    """Whether the gradient at the network's output is as large as at first, but for what a constant makes of it.

    A loss that started far above what a constant gives says nothing of what was learnt when it comes down to that. This
    does: of a cross-entropy it is how far the probabilities are off, which is at most 1; of squares the distance
    itself.

    Args:
        history: where to read; False where the gradient is not known.
    """
    deltas = history["delta_norm"][[0, -1]]
    known = np.flatnonzero(layer_mask(history) & np.isfinite(deltas).all(axis=0) & (deltas[0] > 0))
    return bool(known.size and deltas[1, known[-1]] >= _RESIDUAL * deltas[0, known[-1]])


def learns_little(history: History) -> bool:
    """Whether a run had time to learn, and most of what its first outputs were off by is left, and stays.

    The loss may have fallen: from outputs that were too large to a constant, or to the little that a few units can
    tell. Half of the first gradient at the output is left (see `keeps_residual`), and the loss has not halved from the
    third to the last quarter of the run. It is asked for four times as long as learning something takes.
    """
    return is_judged(history, young=YOUNG) and keeps_residual(history) and not still_falls(history, HALVED)


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
    if not layers.size or not known:
        return False
    if known_rows(history, "input_rms").any() and input_point(history) == layers[0]:
        return False
    first = history.points[layers[0]].module
    return first in norms and first not in known
