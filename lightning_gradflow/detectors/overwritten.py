"""Has something other than the optimizer overwritten the weights, to the harm of the loss?"""

from __future__ import annotations

import numpy as np

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History, Ints

NOT_BY_STEPS = 10.0
"""Times as far as the steps from one sample to the next can have come at the pace of both."""

_CHANGED = 3.0  # times the norm, or a third of it: to draw a layer anew, to prune it or to average it makes less
_LOOK_BACK = 3  # samples
_BEFORE, _AFTER = 32, 5  # losses that tell where it stood, and where it stands
_LEARNT = 0.05  # of the starting loss: else nothing is lost
_LOST = 0.5  # of what was gained; weights that were put there on purpose win it back at once
_TINY = 1e-300  # weights that were set to zero
_SURE = 4.0  # times the noise of a batch


def not_by_steps(norms: Floats, updates: Floats, steps: Ints) -> Bools:
    """(R - 1, L) bool, where weights changed by more than the steps between two samples can have moved them.

    With the norm n of the weights, that of the sampled step u and the number of steps k between two samples, it is
    where `|n' - n| > 10 k max(u, u')`.

    Args:
        norms: (R, L) weight norms.
        updates: (R, L) norms of the sampled steps; NaN where none was measured.
        steps: (R,) the steps of the samples.

    Example:
        >>> not_by_steps(np.array([[1.0], [1.5], [9.0]]), np.full((3, 1), 0.01), np.array([0, 10, 20]))
        array([[False],
               [ True]])
    """
    reach = np.diff(steps)[:, None] * np.fmax(updates[:-1], updates[1:])
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(np.diff(norms, axis=0)) > NOT_BY_STEPS * reach)


def start_of_steps(history: History) -> int:
    """The row from which on steps alone have changed the weights: not somebody who drew some of them anew, say."""
    far = not_by_steps(history["weight_norm"], history["update_norm"], history.steps)
    changed = np.flatnonzero(far.any(axis=1))
    return int(changed[-1]) + 1 if changed.size else 0


def overwritten(history: History) -> list[Finding]:
    """Weights that were changed from outside in the midst of a run that had learnt, and what it had learnt is gone.

    Between two of the last samples the norm of a layer's weights grew to three times what it was, or fell to a third,
    by far more than steps can have done (`not_by_steps`); all losses since tell that more than half of what was gained
    is lost, and so do the newest five. Nothing but a checkpoint of other weights, or code that writes to them, does
    that. Averaged weights that are swapped in, layers that are drawn anew and pruned ones either stay within that
    factor, or are no worse soon. Several optimizers are not judged, whose losses play against each other.

    Args:
        history: where to read.

    Returns:
        One finding that names the layers, the one that changed most first, or none.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc"])
        >>> for step, norm, loss in ((0, 1.0, 2.3), (10, 1.0, 0.3), (20, 90.0, 2.1), (30, 90.0, 2.1)):
        ...     values = {"weight_norm": np.array([norm]), "update_norm": np.array([0.01])}
        ...     history.append(Row(step, values, losses=np.full(10 if step else 1, loss)))
        >>> [(f.cause, f.layers, f.evidence["weight_growth"]) for f in overwritten(history)]
        [('overwritten', ('fc',), 90.0)]
    """
    count = len(history)
    if count < 3 or history.scalar("optimizers")[-1] > 1:
        return []
    start = max(0, count - _LOOK_BACK - 2)
    at, norms = history.steps[start:], history["weight_norm"][start:]
    with np.errstate(all="ignore"):
        factors = norms[1:] / norms[:-1]
    changed = np.isfinite(factors) & ((factors >= _CHANGED) | (factors <= 1 / _CHANGED))
    if not changed.any():
        return []
    changed &= not_by_steps(norms, history["update_norm"][start:], at)
    # losses have to come behind it
    for row in np.flatnonzero(changed[:-1].any(axis=1))[::-1]:
        if found := _is_lost(history, int(at[row]), int(at[row + 1])):
            sizes = np.where(changed[row], np.abs(np.log(np.fmax(factors[row], _TINY))), -1.0)
            worst = np.argsort(-sizes, kind="stable")
            layers = tuple(history.layers[i] for i in worst if changed[row, i])
            evidence = {"weight_growth": float(factors[row, worst[0]]), **found}
            return [
                Finding(
                    kind=FindingKind.UPDATE_RATIO,
                    severity=Severity.WARNING,
                    step=history.rows[-1].step,
                    layers=layers,
                    cause="overwritten",
                    evidence=evidence,
                )
            ]
    return []


def _is_lost(history: History, well: int, since: int) -> dict[str, float]:
    """The losses of now and before, if what was gained up to the step `well` is lost from the step `since` on."""
    steps, losses = history.loss_steps, history.losses
    finite = np.isfinite(losses)
    before, after = losses[finite & (steps <= well)], losses[finite & (steps > since)]
    if not before.size or len(after) < _AFTER:
        return {}
    first, recent = float(before[0]), before[-_BEFORE:]
    level = float(np.median(recent[-max(1, min(len(recent), len(before) // 2)) :]))
    noise = float(np.median(np.abs(np.diff(recent)))) if len(recent) > 1 else 0.0  # near the standard deviation
    if first - level <= _LEARNT * abs(first):
        return {}
    now = min(float(np.median(after)), float(np.median(after[-_AFTER:])))
    return {"loss": now, "loss_before": level} if now - level > max(_LOST * (first - level), _SURE * noise) else {}
