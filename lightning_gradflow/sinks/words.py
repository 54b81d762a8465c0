"""What the console, the report and the loggers say in the same words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.findings import Action, Finding
from lightning_gradflow.sinks.base import View
from lightning_gradflow.sinks.lineage import has_alarmed, shown, untouched, worst_first

NO_TROUBLE = "No sign of trouble in the gradients."
_FEW = 3  # layers that a line names


def verdict(view: View) -> str:
    """The state of the run in short: its worst open finding and the cause of that, or that there is none.

    Example:
        >>> import numpy as np
        >>> from lightning_gradflow.history import History, Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc", "fc")])
        >>> history.append(Row(0, {"delta_norm": np.ones(1)}))
        >>> verdict(View(history, (), (), step=0, progress=0.0, model="Net"))
        'No sign of trouble in the gradients.'
    """
    alarms = [finding for finding in view.findings if finding.severity.is_alarm]
    still_open = worst_first(finding for finding in alarms if finding.is_open)
    if still_open:
        return _in_short(still_open[0])
    if not any("delta_norm" in row.values or "grad_norm" in row.values for row in view.history.rows):
        return "Nothing was measured: the run ended before its first sampled step."
    # of what was an alarm something is left, though it is told as info by now
    left = worst_first(f for f in view.findings if f.is_open and f.kind in {alarm.kind for alarm in alarms})
    if left:
        return first_sentence(message(left[0]))
    over = [finding for finding in shown(view.findings) if has_alarmed(finding, view.findings)]
    if not over:
        notes = sum(finding.is_open for finding in shown(view.findings))
        return f"No alarm, and {_count(notes, 'note')}." if notes else NO_TROUBLE
    said = f"No sign of trouble in the gradients any more: {_count(len(over), 'earlier finding')} resolved."
    count = len(untouched(view))
    if not count:
        return said
    what = "it" if len(over) == 1 else "them" if count == len(over) else f"{count} of them"
    cause = "its cause" if count == 1 else "their causes"
    return f"{said} Nothing was changed because of {what}, so {cause} may still be there: see below."


def _in_short(finding: Finding) -> str:
    """What is seen, and the name of the cause."""
    cause = f" Cause: {finding.cause.replace('_', ' ')}." if finding.cause not in ("", "unknown") else ""
    return first_sentence(message(finding)) + cause


def effective_depth(view: View) -> str:
    """How many layers the signal reached in the newest sample that shows it; empty where none does.

    Example:
        >>> import numpy as np
        >>> from lightning_gradflow.history import History, Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> history.append(Row(0, {"delta_norm": np.array([1e-5, 1.0])}))
        >>> effective_depth(View(history, (), (), step=0, progress=0.0, model="Net"))
        "Effective depth: 1 of 2 layers gets a thousandth of the last layer's signal or more."
    """
    measured = [i for i, row in enumerate(view.history.rows) if "delta_norm" in row.values]
    profile = depth_profile(view.history, measured[-1]) if measured else None
    if profile is None:
        return ""
    reached, layers = profile.effective_depth
    who = f"{reached} of {_count(layers, 'layer')} {'gets' if reached == 1 else 'get'}"
    return f"Effective depth: {who} a thousandth of the last layer's signal or more."


def message(finding: Finding) -> str:
    """What a finding says; its kind and layers where it came without words."""
    where = f" in {', '.join(finding.layers[:3])}" if finding.layers else ""
    return finding.message or f"{kind(finding)}{where}."


def kind(finding: Finding) -> str:
    """The kind as people write it.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> kind(Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, step=400))
        'Loss plateau'
    """
    return finding.kind.value.replace("_", " ").capitalize()


def period(finding: Finding) -> str:
    """From when until when a finding lasted."""
    if finding.resolved_step is None:
        return f"since step {finding.step}"
    return f"steps {finding.step} to {finding.resolved_step}, resolved"


def to_do(finding: Finding, findings: Iterable[Finding]) -> str:
    """What the advice is headed with; empty where there is none to give: for an info that is over.

    An alarm that is over is as good a reason for the next run, whether it was treated or not.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> alarm = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, step=8, resolved_step=50)
        >>> to_do(alarm, [alarm])
        'For the next run'
    """
    if finding.is_open:
        return "What to do"
    return "For the next run" if has_alarmed(finding, findings) else ""


DEEDS = {
    "clip": "began to clip the gradient norm",
    "reinit": "drew {layers} anew",
    "recycle": "gave dead units of {layers} new weights",
    "rollback": "went back to earlier weights, with a smaller learning rate",
    "scale_inputs": "began to scale the inputs of {layers}",
}
"""What was done, by the name of the remedy."""

OUTCOMES = {"applied": "on trial", "kept": "kept", "rolled_back": "taken back"}
"""What has become of an action."""

_DECADES = {"span": "gradient from the last layer to the first", "time_decades": "gradient back through time"}
_PERCENT = "_fraction"


def action_line(action: Action) -> str:
    """An action in a line: what was done and why, the numbers, and what has become of it.

    Example:
        >>> numbers = {"before": {"time_decades": -3.2, "loss": 2.31}, "after": {"time_decades": -0.3, "loss": 1.02}}
        >>> action_line(Action(1, "reinit", ("rnn",), "time", **numbers, outcome="kept", decided_step=25))
        'step 1: drew rnn anew (time): gradient back through time x0.00063 -> x0.5; kept at step 25: loss 2.31 -> 1.02'
    """
    numbers, losses = _split(action)
    head = f"step {action.step}: {deed(action)}" + (f" ({action.reason})" if action.reason else "")
    end = outcome_of(action) + (f" at step {action.decided_step}" if action.decided_step is not None else "")
    return "; ".join([": ".join(filter(None, (head, numbers))), ": ".join(filter(None, (end, losses)))])


def verdict_line(action: Action) -> str:
    """What has become of an action, in a line that follows that of the deed.

    Example:
        >>> numbers = {"before": {"time_decades": -3.2, "loss": 2.31}, "after": {"time_decades": -0.3, "loss": 1.02}}
        >>> verdict_line(Action(1, "reinit", ("rnn",), "time", **numbers, outcome="kept", decided_step=25))
        'step 25: kept: loss 2.31 -> 1.02 (step 1: drew rnn anew)'
    """
    _, losses = _split(action)
    told = ": ".join(filter(None, (f"step {action.decided_step}: {outcome_of(action)}", losses)))
    return f"{told} (step {action.step}: {deed(action)})"


def deed(action: Action) -> str:
    """What was done, and where.

    Example:
        >>> deed(Action(1, "reinit", ("a", "b", "c", "d"))), deed(Action(1, "clip")), deed(Action(1, "thaw", ("a",)))
        ('drew 4 layers anew', 'began to clip the gradient norm', 'thaw: a')
    """
    names = action.layers
    where = " and ".join(filter(None, (", ".join(names[:-1]), names[-1] if names else "all layers")))
    layers = where if len(names) <= _FEW else f"{len(names)} layers"
    return DEEDS.get(action.kind, f"{action.kind.replace('_', ' ')}: {{layers}}").format(layers=layers)


def outcome_legend(actions: Iterable[Action]) -> str:
    """How to read the outcomes of some actions.

    Example:
        >>> outcome_legend([Action(1, "clip", outcome="kept")]).endswith("else taken back.")
        True
        >>> outcome_legend([Action(1, "clip")])[-26:]
        'On trial: not decided yet.'
    """
    told = (
        "Each is tried for a while and kept if the alarm ended with no higher loss, or the loss fell; else taken back."
    )
    on_trial = any(action.outcome == "applied" for action in actions)
    return told + (" On trial: not decided yet." if on_trial else "")


def outcome_of(action: Action) -> str:
    """What has become of an action, in the words of people."""
    return OUTCOMES.get(action.outcome, action.outcome.replace("_", " "))


def changes(action: Action) -> str:
    """The numbers of an action, before and after.

    Example:
        >>> changes(Action(1, "recycle", before={"dead_fraction": 0.97}, after={"dead_fraction": 0.02, "loss": 1.5}))
        'dead fraction 97% -> 2%; loss after it 1.5'
    """
    return "; ".join(filter(None, _split(action)))


def _split(action: Action) -> tuple[str, str]:
    """What the action changed at once, and what the loss did in the trial."""
    before, after = (_known(numbers) for numbers in (action.before, action.after))
    names = list(dict.fromkeys([*before, *after]))
    first = [_change(name, before, after) for name in names if not _is_loss(name)]
    return "; ".join(first), "; ".join(_change(name, before, after) for name in names if _is_loss(name))


def _known(numbers: Mapping[str, float]) -> dict[str, float]:
    # a loss that is NaN was measured
    return {name: value for name, value in numbers.items() if _is_loss(name) or not math.isnan(value)}


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("_loss")


def _change(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    title = _DECADES.get(name, name.replace("_", " "))
    if name not in before:
        return f"{title} after it {_number(name, after[name])}"
    if name not in after:
        return f"{title} before it {_number(name, before[name])}"
    return f"{title} {_number(name, before[name])} -> {_number(name, after[name])}"


def _number(name: str, value: float) -> str:
    if name in _DECADES:
        return f"x{10.0 ** max(min(value, 300.0), -300.0):.2g}"
    return f"{value:.0%}" if name.endswith(_PERCENT) else f"{value:.3g}"


def some(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def first_sentence(text: str) -> str:
    """Up to the first full stop that a new sentence follows; dots inside layer names don't count.

    Example:
        >>> first_sentence("The signal dies at net.0. Nine sigmoids shrink it.")
        'The signal dies at net.0.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\d])", text.strip(), maxsplit=1)[0]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
