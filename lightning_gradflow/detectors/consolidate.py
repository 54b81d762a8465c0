"""Several signs of one fault are one alarm: what follows from another finding is told as info."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_gradflow.findings import Finding, FindingKind, Severity

_ANY = ""
_VANISHING, _EXPLODING = FindingKind.VANISHING_GRADIENT, FindingKind.EXPLODING_GRADIENT
_NONFINITE, _NO_GRADIENT = FindingKind.NONFINITE_GRADIENT, FindingKind.NO_GRADIENT
_DEAD, _SATURATED = FindingKind.DEAD_UNITS, FindingKind.SATURATED_ACTIVATION
_PLATEAU, _UPDATES = FindingKind.LOSS_PLATEAU, FindingKind.UPDATE_RATIO
_LARGE, _SMALL, _INPUTS = "learning_rate_too_large", "learning_rate_too_small", "unscaled_inputs"

# (kind and cause of what follows, kind and cause of what it follows from); a cause of "" is any
_FOLLOWS: tuple[tuple[FindingKind, str, FindingKind, str], ...] = (
    (_PLATEAU, "vanishing_gradient", _VANISHING, _ANY),
    (_PLATEAU, "dead_units", _DEAD, _ANY),
    (_PLATEAU, "saturation", _SATURATED, _ANY),
    (_PLATEAU, _SMALL, _UPDATES, _SMALL),
    (_UPDATES, "overwritten", _VANISHING, _ANY),
    (_UPDATES, "overwritten", _EXPLODING, _ANY),
    (_UPDATES, "overwritten", _NONFINITE, _ANY),
    (_UPDATES, "overwritten", _DEAD, _ANY),
    (_UPDATES, "overwritten", _SATURATED, _ANY),
    (_PLATEAU, "weight_scale", _VANISHING, _ANY),
    (_PLATEAU, "weight_scale", _EXPLODING, _ANY),
    (_PLATEAU, "weight_scale", _SATURATED, _ANY),
    (_PLATEAU, "weight_scale", _DEAD, _ANY),
    (_PLATEAU, "weight_scale", _UPDATES, _ANY),
    (_PLATEAU, _INPUTS, _SATURATED, _INPUTS),
    (_PLATEAU, _INPUTS, _EXPLODING, _INPUTS),
    (_PLATEAU, _INPUTS, _UPDATES, _INPUTS),
    (_PLATEAU, _INPUTS, _DEAD, _INPUTS),
    (_PLATEAU, "recurrence", _VANISHING, _ANY),
    (_PLATEAU, "recurrence", _EXPLODING, _ANY),
    (_PLATEAU, "recurrence", _SATURATED, _ANY),
    (_PLATEAU, "recurrence", _UPDATES, _ANY),
    (_PLATEAU, _LARGE, _UPDATES, _LARGE),
    (_PLATEAU, _LARGE, _EXPLODING, _LARGE),
    (_PLATEAU, _LARGE, _DEAD, _LARGE),
    (_PLATEAU, _LARGE, _SATURATED, "drift"),
    (_PLATEAU, _ANY, _NONFINITE, _ANY),
    (_PLATEAU, _ANY, _NO_GRADIENT, "detached"),
    (_PLATEAU, _ANY, _NO_GRADIENT, "initialisation"),
    (_DEAD, _ANY, _NO_GRADIENT, "initialisation"),
    (_SATURATED, _ANY, _NO_GRADIENT, "initialisation"),
    (_VANISHING, _ANY, _NO_GRADIENT, "initialisation"),
    (_EXPLODING, "depth", _NO_GRADIENT, "initialisation"),
    (_EXPLODING, "weight_scale", _NO_GRADIENT, "initialisation"),
    (_UPDATES, _SMALL, _NO_GRADIENT, "initialisation"),
    (_PLATEAU, "unknown", _VANISHING, _ANY),
    (_PLATEAU, "unknown", _EXPLODING, _ANY),
    (_PLATEAU, "unknown", _DEAD, _ANY),
    (_PLATEAU, "unknown", _SATURATED, _ANY),
    (_PLATEAU, "unknown", _UPDATES, _ANY),
    (_UPDATES, _SMALL, _VANISHING, _ANY),
    (_UPDATES, _LARGE, _NONFINITE, _ANY),
    (_EXPLODING, _LARGE, _NONFINITE, _ANY),
    (_EXPLODING, _LARGE, _UPDATES, _LARGE),
    (_EXPLODING, _INPUTS, _NONFINITE, _INPUTS),
    (_SATURATED, "weight_scale", _VANISHING, "saturation"),
    (_SATURATED, "weight_scale", _EXPLODING, "weight_scale"),
    (_SATURATED, "drift", _VANISHING, "saturation"),
    (_SATURATED, "drift", _UPDATES, _LARGE),
    (_SATURATED, "drift", _EXPLODING, _LARGE),
    (_VANISHING, "saturation", _SATURATED, _INPUTS),
    (_VANISHING, "saturation", _UPDATES, _LARGE),
    (_VANISHING, "dead_units", _DEAD, _ANY),
    (_DEAD, _LARGE, _UPDATES, _LARGE),
    (_DEAD, _LARGE, _EXPLODING, _LARGE),
    (_DEAD, _LARGE, _VANISHING, "weight_scale"),
    (_DEAD, _LARGE, _VANISHING, "depth"),
    (_DEAD, "unknown", _VANISHING, "weight_scale"),
    (_DEAD, "unknown", _VANISHING, "depth"),
    (_DEAD, "unknown", _VANISHING, "underflow"),
    (_UPDATES, _INPUTS, _NONFINITE, _ANY),
    (_UPDATES, _INPUTS, _SATURATED, _INPUTS),
    (_UPDATES, _INPUTS, _EXPLODING, _INPUTS),
    (_UPDATES, _INPUTS, _DEAD, _INPUTS),
    (_PLATEAU, _LARGE, _UPDATES, _INPUTS),
    (_DEAD, _INPUTS, _SATURATED, _INPUTS),
    (_DEAD, "unknown", _PLATEAU, _INPUTS),
    (_VANISHING, "recurrence", _PLATEAU, _INPUTS),
    (_VANISHING, "recurrence", _SATURATED, _INPUTS),
    (_DEAD, _INPUTS, _EXPLODING, _INPUTS),
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
        if finding.severity.is_alarm and any(_follows(finding, other) for other in alarms)
        else finding
        for finding in found
    ]


def _follows(finding: Finding, other: Finding) -> bool:
    return any(
        finding.kind is kind
        and cause in (_ANY, finding.cause)
        and other.kind is root
        and root_cause in (_ANY, other.cause)
        for kind, cause, root, root_cause in _FOLLOWS
    )
