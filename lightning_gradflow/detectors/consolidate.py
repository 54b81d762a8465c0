"""Several signs of one fault are one alarm: what follows from another finding is told as info."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_gradflow.findings import Finding, FindingKind, Severity

_VANISHING, _EXPLODING = FindingKind.VANISHING_GRADIENT, FindingKind.EXPLODING_GRADIENT
_NONFINITE, _NO_GRADIENT = FindingKind.NONFINITE_GRADIENT, FindingKind.NO_GRADIENT
_DEAD, _SATURATED = FindingKind.DEAD_UNITS, FindingKind.SATURATED_ACTIVATION
_PLATEAU, _UPDATES, _LOSS = FindingKind.LOSS_PLATEAU, FindingKind.UPDATE_RATIO, FindingKind.LOSS_MISMATCH
_MIXED = FindingKind.MIXED_SAMPLES
_LARGE, _SMALL, _INPUTS = "learning_rate_too_large", "learning_rate_too_small", "unscaled_inputs"


@dataclass(frozen=True)
class _Some:
    """Findings of some kinds, of some causes; of any cause if none is given."""

    kinds: tuple[FindingKind, ...]
    causes: tuple[str, ...] = ()

    def __contains__(self, finding: Finding) -> bool:
        return finding.kind in self.kinds and (not self.causes or finding.cause in self.causes)


# what follows, and what from
_FOLLOWS: tuple[tuple[_Some, _Some], ...] = (
    # a loss that stands is the last link of every chain
    (_Some((_PLATEAU,)), _Some((_NONFINITE,))),
    # with the wrong formula, or the wrong axis, nothing can be said of the steps
    (_Some((_PLATEAU,), (_SMALL, "no_signal_in_data", "unknown")), _Some((_LOSS,))),
    (_Some((_PLATEAU,), (_SMALL, "vanishing_gradient", "no_signal_in_data", "unknown")), _Some((_MIXED,))),
    # what is lost on the way through the samples is not lost in time
    (_Some((_VANISHING,), ("recurrence",)), _Some((_MIXED,))),
    (_Some((_UPDATES, _PLATEAU), (_SMALL, _LARGE)), _Some((_LOSS,), ("unscaled_targets",))),
    (_Some((_EXPLODING,), (_LARGE, "unknown")), _Some((_LOSS,), ("unscaled_targets",))),
    (_Some((_PLATEAU,)), _Some((_NO_GRADIENT,), ("detached", "initialisation"))),
    (_Some((_PLATEAU,), (_SMALL, "unknown")), _Some((_NO_GRADIENT,), ("not_optimized",))),
    (_Some((_PLATEAU,), ("vanishing_gradient",)), _Some((_VANISHING,))),
    (_Some((_PLATEAU,), ("dead_units",)), _Some((_DEAD,))),
    (_Some((_PLATEAU,), ("saturation",)), _Some((_SATURATED,))),
    (
        _Some((_PLATEAU,), ("unknown",)),
        _Some((_VANISHING, _EXPLODING, _DEAD, _SATURATED, _UPDATES)),
    ),
    # a table beside which all else drowns leaves no layer anything to learn by
    (_Some((_PLATEAU,), ("weight_scale", "symmetry")), _Some((_EXPLODING, _SATURATED))),
    (_Some((_PLATEAU,), ("weight_scale", "symmetry")), _Some((_DEAD,), ("initialisation", "symmetry", _INPUTS))),
    (_Some((_PLATEAU,), ("weight_scale", "symmetry")), _Some((_UPDATES,), (_LARGE, _INPUTS))),
    (_Some((_VANISHING,), ("weight_scale", "depth")), _Some((_PLATEAU,), ("weight_scale", "symmetry"))),
    (_Some((_PLATEAU,), ("recurrence",)), _Some((_VANISHING, _EXPLODING, _SATURATED, _UPDATES))),
    # weights of zero stop the gradient, and the units behind them are as flat as they are
    (_Some((_DEAD, _SATURATED, _VANISHING)), _Some((_NO_GRADIENT,), ("initialisation",))),
    (_Some((_EXPLODING,), ("depth", "weight_scale")), _Some((_NO_GRADIENT,), ("initialisation",))),
    (_Some((_UPDATES,), (_SMALL, "rounding")), _Some((_NO_GRADIENT,), ("initialisation", "detached"))),
    # inputs: from the first layer to the loss
    (_Some((_PLATEAU,), (_INPUTS,)), _Some((_SATURATED, _EXPLODING, _DEAD, _UPDATES), (_INPUTS,))),
    (_Some((_UPDATES,), (_INPUTS,)), _Some((_SATURATED, _EXPLODING, _DEAD), (_INPUTS,))),
    (_Some((_DEAD,), (_INPUTS,)), _Some((_SATURATED, _EXPLODING), (_INPUTS,))),
    (_Some((_DEAD,), ("unknown",)), _Some((_PLATEAU,), (_INPUTS,))),
    (_Some((_VANISHING,), ("saturation",)), _Some((_SATURATED,), (_INPUTS,))),
    (_Some((_VANISHING,), ("recurrence",)), _Some((_SATURATED, _PLATEAU), (_INPUTS,))),
    (_Some((_EXPLODING,), (_INPUTS,)), _Some((_NONFINITE,), (_INPUTS,))),
    # learning rate: from the steps to what they did
    (_Some((_PLATEAU,), (_SMALL,)), _Some((_UPDATES,), (_SMALL,))),
    (_Some((_UPDATES,), (_SMALL, "rounding")), _Some((_VANISHING,))),
    # so do steps that are rounded away
    (_Some((_PLATEAU,), (_SMALL, "unknown")), _Some((_UPDATES,), ("rounding",))),
    (_Some((_UPDATES,), ("rounding",)), _Some((_SATURATED, _NONFINITE))),
    (_Some((_UPDATES, _PLATEAU), (_SMALL,)), _Some((_SATURATED,), ("weight_scale",))),
    (_Some((_UPDATES, _EXPLODING), (_LARGE,)), _Some((_NONFINITE,))),
    (_Some((_UPDATES,), (_INPUTS,)), _Some((_NONFINITE,))),
    (_Some((_EXPLODING,), (_LARGE,)), _Some((_UPDATES,), (_LARGE,))),
    (_Some((_DEAD,), (_LARGE, "unknown")), _Some((_UPDATES, _EXPLODING), (_LARGE,))),
    (_Some((_SATURATED,), ("drift",)), _Some((_UPDATES, _EXPLODING), (_LARGE,))),
    (_Some((_VANISHING,), ("saturation",)), _Some((_UPDATES,), (_LARGE,))),
    (_Some((_VANISHING,), (_LARGE,)), _Some((_UPDATES, _EXPLODING, _DEAD), (_LARGE, _INPUTS))),
    (_Some((_PLATEAU,), (_LARGE,)), _Some((_VANISHING,), (_LARGE,))),
    (_Some((_PLATEAU,), (_LARGE,)), _Some((_UPDATES, _EXPLODING, _DEAD), (_LARGE,))),
    (_Some((_PLATEAU,), (_LARGE,)), _Some((_UPDATES,), (_INPUTS,))),
    (_Some((_PLATEAU,), (_LARGE,)), _Some((_SATURATED,), ("drift",))),
    # weights: what they do to the signal
    (_Some((_SATURATED,), ("weight_scale", "drift")), _Some((_VANISHING,), ("saturation",))),
    (_Some((_SATURATED,), ("weight_scale",)), _Some((_EXPLODING,), ("weight_scale",))),
    (_Some((_SATURATED,), ("score_scale",)), _Some((_EXPLODING,), ("weight_scale", "depth"))),
    (_Some((_PLATEAU,)), _Some((_SATURATED,), ("score_scale",))),
    (_Some((_VANISHING,), ("dead_units",)), _Some((_DEAD,))),
    (_Some((_DEAD,), (_LARGE, "unknown")), _Some((_VANISHING,), ("weight_scale", "depth", "underflow"))),
    (_Some((_UPDATES,), ("weight_scale",)), _Some((_VANISHING, _EXPLODING), ("weight_scale", "depth"))),
    (_Some((_UPDATES,), ("weight_scale",)), _Some((_NO_GRADIENT, _NONFINITE))),
    (_Some((_DEAD,), (_LARGE, "unknown")), _Some((_UPDATES,), ("weight_scale",))),
    (_Some((_PLATEAU,), ("no_signal_in_data", "unknown", _LARGE)), _Some((_UPDATES,), ("weight_scale",))),
    # of weights that are gone comes all else
    (_Some((_VANISHING, _DEAD, _SATURATED, _PLATEAU)), _Some((_UPDATES,), ("weight_decay",))),
    # somebody else changed the weights: whatever is found beside it says more
    (_Some((_UPDATES,), ("overwritten",)), _Some((_VANISHING, _EXPLODING, _NONFINITE, _DEAD, _SATURATED))),
)


def consolidate(found: Iterable[Finding], still_open: Iterable[Finding]) -> list[Finding]:
    """The same findings; an alarm that follows from another alarm, new or still open, becomes info.

    A plateau whose cause is a vanishing gradient follows from the vanishing gradient, as units that a large learning
    rate killed follow from that rate. What is told as info still stands in the summary and in the report, and becomes
    an alarm of its own when it outlasts what it followed from. NaN and infinity are never a mere consequence.

    Args:
        found: what the detectors say of the newest row.
        still_open: the findings that were open before.

    Example:
        >>> root = Finding(FindingKind.VANISHING_GRADIENT, Severity.CRITICAL, step=400)
        >>> plateau = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, step=400, cause="vanishing_gradient")
        >>> [str(finding.severity) for finding in consolidate([plateau, root], [])]
        ['info', 'critical']
    """
    found = list(found)
    said = {finding.kind for finding in found}
    alarms = [finding for finding in found if finding.severity.is_alarm]
    alarms += [finding for finding in still_open if finding.severity.is_alarm and finding.kind not in said]
    return [
        replace(finding, severity=Severity.INFO)
        if finding.severity.is_alarm and any(follows(finding, other) for other in alarms)
        else finding
        for finding in found
    ]


def follows(finding: Finding, other: Finding) -> bool:
    """Whether a finding is what comes of another one, by kind and cause.

    Example:
        >>> root = Finding(FindingKind.VANISHING_GRADIENT, Severity.CRITICAL, step=400)
        >>> follows(Finding(FindingKind.LOSS_PLATEAU, Severity.INFO, step=400, cause="vanishing_gradient"), root)
        True
    """
    return any(finding in consequences and other in roots for consequences, roots in _FOLLOWS)
