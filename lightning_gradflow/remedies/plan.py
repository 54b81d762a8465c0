"""Which remedies are tried for which finding, in which order."""

from __future__ import annotations

from lightning_gradflow.findings import FindingKind

REMEDIES = ("clip", "reinit", "recycle", "rollback", "scale_inputs")
"""The remedies there are, for `allow`."""

DESTRUCTIVE = frozenset({"reinit", "recycle", "scale_inputs"})
"""Those that overwrite weights with new ones."""

PLAN: dict[tuple[FindingKind, str], tuple[str, ...]] = {
    (FindingKind.VANISHING_GRADIENT, "saturation"): ("reinit",),
    (FindingKind.VANISHING_GRADIENT, "weight_scale"): ("reinit",),
    (FindingKind.VANISHING_GRADIENT, "depth"): ("reinit", "rollback"),
    (FindingKind.VANISHING_GRADIENT, "recurrence"): ("reinit",),
    (FindingKind.VANISHING_GRADIENT, "dead_units"): ("reinit", "recycle", "rollback"),
    (FindingKind.VANISHING_GRADIENT, "learning_rate_too_large"): ("reinit", "rollback"),
    (FindingKind.VANISHING_GRADIENT, "unknown"): ("reinit",),
    (FindingKind.EXPLODING_GRADIENT, "weight_scale"): ("reinit", "rollback", "clip"),
    (FindingKind.EXPLODING_GRADIENT, "depth"): ("reinit", "rollback", "clip"),
    (FindingKind.EXPLODING_GRADIENT, "recurrence"): ("reinit", "clip", "rollback"),
    (FindingKind.EXPLODING_GRADIENT, "learning_rate_too_large"): ("reinit", "rollback", "clip"),
    (FindingKind.EXPLODING_GRADIENT, "unscaled_inputs"): ("scale_inputs", "reinit", "rollback", "clip"),
    (FindingKind.EXPLODING_GRADIENT, "unknown"): ("clip", "rollback"),
    (FindingKind.NONFINITE_GRADIENT, "initialisation"): ("reinit",),
    (FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large"): ("reinit", "rollback", "clip"),
    (FindingKind.NONFINITE_GRADIENT, "unscaled_inputs"): ("scale_inputs", "clip", "rollback"),
    (FindingKind.NONFINITE_GRADIENT, "forward"): ("reinit", "clip", "rollback"),
    (FindingKind.NONFINITE_GRADIENT, "unknown"): ("clip", "rollback"),
    (FindingKind.DEAD_UNITS, "initialisation"): ("reinit", "recycle"),
    (FindingKind.DEAD_UNITS, "symmetry"): ("reinit",),
    (FindingKind.DEAD_UNITS, "learning_rate_too_large"): ("reinit", "rollback", "recycle"),
    (FindingKind.DEAD_UNITS, "unscaled_inputs"): ("scale_inputs", "rollback", "recycle"),
    (FindingKind.DEAD_UNITS, "unknown"): ("recycle", "rollback"),
    (FindingKind.NO_GRADIENT, "initialisation"): ("reinit",),
    (FindingKind.SATURATED_ACTIVATION, "unscaled_inputs"): ("scale_inputs", "reinit"),
    (FindingKind.SATURATED_ACTIVATION, "weight_scale"): ("reinit",),
    (FindingKind.SATURATED_ACTIVATION, "score_scale"): ("reinit",),
    (FindingKind.SATURATED_ACTIVATION, "drift"): ("reinit", "rollback"),
    (FindingKind.SATURATED_ACTIVATION, "unknown"): ("reinit", "rollback"),
    (FindingKind.LOSS_MISMATCH, "unscaled_targets"): ("reinit",),
    (FindingKind.LOSS_PLATEAU, "vanishing_gradient"): ("reinit",),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_large"): ("rollback",),
    (FindingKind.LOSS_PLATEAU, "unscaled_inputs"): ("scale_inputs",),
    (FindingKind.LOSS_PLATEAU, "weight_scale"): ("reinit",),
    (FindingKind.LOSS_PLATEAU, "recurrence"): ("reinit",),
    (FindingKind.LOSS_PLATEAU, "symmetry"): ("reinit",),
    (FindingKind.LOSS_PLATEAU, "saturation"): ("scale_inputs", "reinit"),
    (FindingKind.LOSS_PLATEAU, "dead_units"): ("reinit", "recycle"),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_large"): ("reinit", "rollback"),
    (FindingKind.UPDATE_RATIO, "weight_scale"): ("reinit",),
    (FindingKind.UPDATE_RATIO, "overwritten"): ("rollback",),
    (FindingKind.UPDATE_RATIO, "unscaled_inputs"): ("scale_inputs", "clip", "rollback"),
}
"""A cause without a row has that of `unknown`, if its kind has one.

Steps that are too large are too large for the weights: where some of these are far from any usual initialisation, it is
they that are drawn anew.
"""

UNTOUCHED = (FindingKind.LOSS_PLATEAU, "unscaled_inputs")
"""Kind and cause of a run that can have learnt nothing but a constant: there is nothing to go back to."""

OFF_TARGET = (FindingKind.LOSS_MISMATCH, "unscaled_targets")
"""The same of one whose targets lie far from all that it gives."""

TOO_LARGE = (FindingKind.LOSS_PLATEAU, "weight_scale")
"""The same of one whose weights were too large for its steps from the start."""

TOO_SMALL = (FindingKind.UPDATE_RATIO, "weight_scale")
"""The same of one whose weights were too small."""

CHAOTIC = (FindingKind.LOSS_PLATEAU, "recurrence")
"""The same of one whose recurrent weights were so large from the start that the state keeps nothing."""

NOT_FOR = frozenset(
    {"underflow", "rounding", "learning_rate_too_small", "weight_decay", "no_signal_in_data", "not_optimized"}
)
"""Causes that only the user can cure: number format, learning rate, decay, data, what the optimizer is given."""

BY_BIRTH = frozenset(
    {
        (FindingKind.SATURATED_ACTIVATION, "weight_scale"),
        (FindingKind.SATURATED_ACTIVATION, "score_scale"),
        (FindingKind.NO_GRADIENT, "initialisation"),
        (FindingKind.DEAD_UNITS, "initialisation"),
        (FindingKind.DEAD_UNITS, "symmetry"),
        TOO_LARGE,
        TOO_SMALL,
        CHAOTIC,
        (FindingKind.LOSS_PLATEAU, "symmetry"),
        OFF_TARGET,
        UNTOUCHED,
    }
)
"""What the weights had from the start: to go back to earlier ones is no way out of it."""

_NOT_AT_START = frozenset({"loss", "backward"})  # a formula that gives NaN from the first step on gives it for ever


def remedies_for(kind: FindingKind, cause: str, *, has_learnt: bool = False) -> tuple[str, ...]:
    """What is tried, first remedy first.

    What worked is a better cure than anything new: a run that has learnt goes back to its last good weights first,
    unless what is wrong with them has been so from the start.
    There clipping leaves out what is not finite, and scaling of inputs undoes a jump of these; both go back as well.
    Where inputs were unscaled from the start, scaling goes back to the start: no weights that were learnt fit others.

    Args:
        kind: of the finding.
        cause: of the finding.
        has_learnt: whether the run had learnt something before.

    Example:
        >>> remedies_for(FindingKind.VANISHING_GRADIENT, "saturation")
        ('reinit',)
        >>> remedies_for(FindingKind.VANISHING_GRADIENT, "saturation", has_learnt=True)
        ('rollback', 'reinit')
        >>> remedies_for(FindingKind.LOSS_PLATEAU, "no_signal_in_data")
        ()
    """
    if cause in NOT_FOR or (cause in _NOT_AT_START and not has_learnt):
        return ()
    planned = PLAN.get((kind, cause), PLAN.get((kind, "unknown"), ()))
    if not planned or not has_learnt or (kind, cause) in BY_BIRTH:
        return planned
    if kind is FindingKind.NONFINITE_GRADIENT and cause != "learning_rate_too_large":
        first: tuple[str, ...] = ("clip", "rollback")
    else:
        first = ("rollback",)
    if "scale_inputs" in planned:
        first = ("scale_inputs", *first)
    return (*first, *(remedy for remedy in planned if remedy not in first))
