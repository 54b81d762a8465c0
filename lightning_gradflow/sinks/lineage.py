"""Which findings to show, in which order, and what has become of them or follows from them."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_gradflow.detectors.consolidate import follows
from lightning_gradflow.findings import Finding
from lightning_gradflow.sinks.base import View


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Open findings before resolved ones, the more severe first, the older first among equals."""
    return sorted(findings, key=lambda finding: (not finding.is_open, -finding.severity.rank, finding.step))


def shown(findings: Iterable[Finding]) -> list[Finding]:
    """The findings to show, worst first: not those that went over into another of their kind, more or less severe.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> kind = FindingKind.LOSS_PLATEAU
        >>> early = Finding(kind, Severity.INFO, step=20, resolved_step=50)
        >>> [finding.step for finding in shown([early, Finding(kind, Severity.WARNING, step=50)])]
        [50]
    """
    findings = list(findings)
    opened = {(finding.kind, finding.step) for finding in findings}
    return worst_first(f for f in findings if (f.kind, f.resolved_step) not in opened)


def untouched(view: View) -> list[Finding]:
    """The alarms that went by while nothing was done to the run, or nothing that was kept.

    Numbers calm down by themselves when a network has settled on what it gives; what made them large may be there yet.

    Example:
        >>> from dataclasses import replace
        >>> from lightning_gradflow.findings import Action, FindingKind, Severity
        >>> from lightning_gradflow.history import History
        >>> alarm = Finding(FindingKind.VANISHING_GRADIENT, Severity.CRITICAL, 1, cause="depth", resolved_step=25)
        >>> done = Action(1, "reinit", ("fc1",), "vanishing gradient, depth", outcome="kept")
        >>> view = View(History(), (alarm,), (), step=50, progress=1.0, model="Net")
        >>> len(untouched(view)), len(untouched(replace(view, actions=(done,))))
        (1, 0)
    """
    steps = [action.step for action in view.actions if action.outcome != "rolled_back"]
    over = [one for one in shown(view.findings) if not one.is_open and has_alarmed(one, view.findings)]
    since = [_line(finding, view.findings)[-1].step for finding in over]
    return [
        finding
        for finding, start in zip(over, since, strict=True)
        if not any(start <= step <= (finding.resolved_step or start) for step in steps)
    ]


def has_alarmed(finding: Finding, findings: Iterable[Finding]) -> bool:
    """Whether a finding is an alarm, or one of its kind that went over into it was.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> alarm = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, step=8, resolved_step=50)
        >>> left = Finding(FindingKind.DEAD_UNITS, Severity.INFO, step=50)
        >>> [has_alarmed(left, [alarm, left]), has_alarmed(left, [left])]
        [True, False]
    """
    return any(one.severity.is_alarm for one in _line(finding, findings))


def _line(finding: Finding, findings: Iterable[Finding]) -> list[Finding]:
    """A finding, the one that went over into it, and so on back to the first."""
    line = [finding]
    for earlier in reversed(list(findings)):
        if earlier is not finding and (earlier.kind, earlier.resolved_step) == (finding.kind, line[-1].step):
            line.append(earlier)
    return line


def comes_of(finding: Finding, findings: Iterable[Finding]) -> Finding | None:
    """The alarm that an info merely follows from: what to do stands there.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> root = Finding(FindingKind.VANISHING_GRADIENT, Severity.CRITICAL, step=8)
        >>> plateau = Finding(FindingKind.LOSS_PLATEAU, Severity.INFO, step=50, cause="vanishing_gradient")
        >>> comes_of(plateau, [plateau, root]) == root, comes_of(root, [plateau, root])
        (True, None)
    """
    findings = shown(findings)
    if finding.severity.is_alarm:
        return None
    # an info that has outlasted an alarm is one of its own
    roots = (one for one in findings if one.severity.is_alarm and (one.is_open or not finding.is_open))
    return next((root for root in roots if follows(finding, root)), None)
