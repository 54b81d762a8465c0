"""The summary on the console: the verdict, the layers, what to do."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.findings import Finding, Suggestion
from lightning_gradflow.history import History
from lightning_gradflow.sinks import lineage, words
from lightning_gradflow.sinks.base import Sink, View
from lightning_gradflow.sinks.report import ReportSink

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_LAYERS = 24
MAX_ACTIONS = 8
_OUTCOME_COLOURS = {"kept": "green", "rolled_back": "yellow"}
_COLOURS = {"info": "blue", "warning": "yellow", "critical": "red"}


class ConsoleSink(Sink):
    """Prints the summary to stdout at the end of the fit.

    Args:
        report: whose page is named, if it was written before.
    """

    name = "console"

    def __init__(self, report: ReportSink | None = None) -> None:
        self._report = report

    def on_end(self, view: View) -> None:
        """Prints, in colour where the terminal takes it."""
        from rich.console import Console

        console = Console(highlight=False)
        page = self._report.written if self._report is not None else None
        _print(console, view, has_page=page is not None)
        if page is not None:
            console.print(f"\nReport: {page}", soft_wrap=True, markup=False)


def summary(view: View, width: int = 100) -> str:
    """The same summary as plain text.

    Args:
        view: the run.
        width: columns, in [40, inf). Code to copy is never broken.

    Returns:
        Text of several lines.

    Example:
        >>> print(summary(View(History(), (), (), step=0, progress=0.0, model="Net")).splitlines()[0])
        Nothing was measured: the run ended before its first sampled step.
    """
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=max(width, 40), highlight=False, color_system=None, legacy_windows=False
    )
    with console.capture() as capture:
        _print(console, view)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@dataclass(frozen=True)
class LayerLine:
    """The newest numbers of one layer; NaN = not measured.

    Args:
        name: as in `named_modules()`.
        grad_norm: of its parameters.
        relative_delta: its delta norm over that of the last point of the network: below 1 where the signal has shrunk
            on its way back to this layer.
        saturated: the largest saturated fraction among the activations that follow it, up to the next layer.
        dead: the largest dead fraction among the same.
    """

    name: str
    grad_norm: float
    relative_delta: float
    saturated: float
    dead: float


def layer_lines(history: History) -> list[LayerLine]:
    """The newest numbers of every layer, in order of execution.

    Example:
        >>> import numpy as np
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> history.append(Row(0, {"grad_norm": np.array([0.1, 1.0]), "delta_norm": np.array([0.02, 2.0])}))
        >>> layer_lines(history)[0].relative_delta
        0.01
    """
    grad_norm, saturated, dead = (_newest(history, m) for m in ("grad_norm", "saturated_fraction", "dead_fraction"))
    relative, following = _relative_deltas(history), _following(history)
    return [
        LayerLine(
            name=name,
            grad_norm=grad_norm.get(name, math.nan),
            relative_delta=relative.get(name, math.nan),
            saturated=_largest(saturated.get(point, math.nan) for point in following.get(name, [])),
            dead=_largest(dead.get(point, math.nan) for point in following.get(name, [])),
        )
        for name in history.layers
    ]


def _newest(history: History, metric: str) -> dict[str, float]:
    """The values of the newest row that has the metric at all."""
    measured = [i for i, row in enumerate(history.rows) if metric in row.values]
    return dict(zip(history.names(metric), history[metric][measured[-1]].tolist(), strict=True)) if measured else {}


def _relative_deltas(history: History) -> dict[str, float]:
    """Module name -> delta norm over that of the last usable point."""
    measured = [i for i, row in enumerate(history.rows) if "delta_norm" in row.values]
    profile = depth_profile(history, measured[-1]) if measured else None
    if profile is None or not profile.usable.any():
        return {}
    last = float(profile.delta_norm[profile.usable][-1])
    found: dict[str, float] = {}
    for point, value in zip(profile.points, profile.delta_norm.tolist(), strict=True):
        if point.is_layer:
            found.setdefault(point.module, value / last)
    return found


def _following(history: History) -> dict[str, list[str]]:
    """Layer -> the points between its output and the next layer: an activation acts on the layer before it."""
    found: dict[str, list[str]] = {}
    layer = ""
    for point in history.points:
        layer = point.module if point.is_layer else layer
        found.setdefault(layer, []).append(point.name)
    return found


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _worst(lines: list[LayerLine], findings: tuple[Finding, ...], most: int) -> list[LayerLine]:
    """The lines to show of too many: named in open findings, not finite, most changed signal."""
    named = [name for finding in lineage.worst_first(findings) if finding.is_open for name in finding.layers]
    rank = {name: i for i, name in reversed(list(enumerate(named)))}

    def badness(line: LayerLine) -> tuple[float, ...]:
        delta = line.relative_delta
        change = math.inf if delta == 0 or math.isinf(delta) else -1.0 if math.isnan(delta) else abs(math.log10(delta))
        return (rank.get(line.name, math.inf), -float(math.isinf(line.grad_norm)), -change)

    chosen = {line.name for line in sorted(lines, key=badness)[:most]}
    return [line for line in lines if line.name in chosen]


def _print(console: Console, view: View, *, has_page: bool = False) -> None:
    """Verdict first, then the layers, then what to do."""
    from rich.text import Text

    alarms = [f for f in lineage.worst_first(view.findings) if f.is_open and f.severity.is_alarm]
    tone = _COLOURS[alarms[0].severity.value] if alarms else _mood(view)
    console.print(Text(words.verdict(view), style=f"bold {tone}"))
    depth = words.effective_depth(view)
    if depth:
        console.print(Text(depth))
    lines = layer_lines(view.history)
    if lines and len(view.history):
        shown = _worst(lines, view.findings, MAX_LAYERS)
        console.print(_table(shown, int(view.history.steps[-1])))
        if len(shown) < len(lines):
            console.print(f"The {len(shown)} layers that stand out most; {len(lines) - len(shown)} more are left out.")
    told: set[Suggestion] = set()
    has_more = False
    for finding in lineage.shown(view.findings):
        has_more |= _print_finding(console, finding, told, view.findings)
    if view.actions:
        console.print(Text(f"\nWhat was changed ({len(view.actions)})", style="bold"))
        for action in view.actions[-MAX_ACTIONS:]:
            console.print(Text(f"  {words.action_line(action)}", style=_OUTCOME_COLOURS.get(action.outcome, "")))
        if len(view.actions) > MAX_ACTIONS:
            console.print(f"  The last {MAX_ACTIONS}; {len(view.actions) - MAX_ACTIONS} earlier ones are left out.")
        console.print(Text(words.outcome_legend(view.actions), style="dim"))
    if has_more:
        where = "on the page named below, and " if has_page else ""
        console.print(Text(f'\nThe code of each "Or:" is {where}in `suggestions` of the finding.', style="dim"))


def _mood(view: View) -> str:
    """The colour of a verdict without an alarm."""
    return "green" if len(view.history) and not lineage.untouched(view) else "yellow"


def _table(lines: list[LayerLine], step: int) -> Table:
    """The layers in order of execution, with the columns for which anything was measured."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = {
        "grad_norm": [f"{line.grad_norm:.1e}" for line in lines],
        "delta, last = 1": [f"{line.relative_delta:.1e}" for line in lines],
        "saturated": [f"{line.saturated:.0%}" for line in lines],
        "dead": [f"{line.dead:.0%}" for line in lines],
    }
    columns = {title: cells for title, cells in columns.items() if not all(cell.startswith("nan") for cell in cells)}
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"Layers at step {step}, input side first", title_justify="left"
    )
    table.add_column("layer", overflow="fold", min_width=12)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for i, line in enumerate(lines):
        table.add_row(Text(line.name), *("-" if c[i].startswith("nan") else c[i] for c in columns.values()))
    return table


def _print_finding(console: Console, finding: Finding, told: set[Suggestion], findings: tuple[Finding, ...]) -> bool:
    """A finding and what to do: the best cure with its code, the others by name.

    An alarm that is over comes back in the next run unless something is done, so there is something to do too. What was
    `told` under a finding above is not repeated. Code starts at the left edge and is never wrapped.

    Returns:
        Whether there was one that was told by name alone.
    """
    from rich.text import Text

    head = f"\n{words.kind(finding)} [{finding.severity.value}, {words.period(finding)}]"
    console.print(Text(head, style=f"bold {_COLOURS[finding.severity.value]}" if finding.is_open else "dim"))
    console.print(Text(words.message(finding)))
    what, root = words.to_do(finding, findings), lineage.comes_of(finding, findings)
    if root is not None:
        console.print(Text(f"Comes of: {words.kind(root)}", style="bold"))
        return False
    fresh = [s for s in finding.suggestions if s not in told] if what else []
    as_above = bool(what and finding.suggestions) and finding.suggestions[0] in told
    if as_above:
        console.print(Text(f"{what}: as above ({finding.suggestions[0].title})", style="bold"))
    best = [] if as_above else fresh[:1]
    for suggestion in best:
        console.print(Text(f"{what}: {suggestion.title}", style="bold"))
        source = f" ({suggestion.reference})" if suggestion.reference else ""
        console.print(Text(f"{suggestion.reason}{source}"))
        for line in suggestion.code.splitlines():
            console.print(Text(f"    {line}", style="cyan"), soft_wrap=True)
    for suggestion in fresh[len(best) :]:
        console.print(Text(f"Or: {suggestion.title}"))
    told.update(fresh)
    return len(fresh) > len(best)
