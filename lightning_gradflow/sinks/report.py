"""The report: one HTML page that stands alone, without network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from lightning_gradflow.findings import Action, Finding, Suggestion
from lightning_gradflow.sinks import lineage, words
from lightning_gradflow.sinks.base import Sink, View

FILE_NAME = "gradflow_report.html"
PathLike = str | os.PathLike[str]


class ReportSink(Sink):
    """Writes `gradflow_report.html` at the end of the fit.

    Args:
        path: the folder, or a function that gives it when the fit ends (the log directory of a run is known late).
            Where that is None no page is written.
    """

    name = "report"

    def __init__(self, path: PathLike | Callable[[], PathLike | None]) -> None:
        self._path = path
        self.written: Path | None = None
        """The page that was written last."""

    def on_end(self, view: View) -> None:
        """Writes the page, whole or not at all.

        Raises:
            OSError: if the folder can't be made or written to, or is not on a local disk.
        """
        folder = self._path() if callable(self._path) else self._path
        if folder is None:
            return
        if "://" in os.fspath(folder):
            raise OSError(f"the report can only be written to a local folder, got {os.fspath(folder)!r}")
        target = Path(folder) / FILE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{FILE_NAME}.{os.getpid()}.part")
        try:
            part.write_text(page(view), encoding="utf-8")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        self.written = target


def page(view: View, figures: bool = True) -> str:
    """The whole page.

    Args:
        view: the run.
        figures: with the interactive figures, which need 5 MB of plotly.js; without them the page has some 10 kB.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    still_open = [finding for finding in view.findings if finding.is_open and finding.severity.is_alarm]
    settled = "warning" if lineage.untouched(view) else "calm"
    mood = lineage.worst_first(still_open)[0].severity.value if still_open else settled
    steps = view.history.steps
    facts = f"{len(steps)} sampled steps, {steps[0]} to {steps[-1]}" if len(steps) else "no sampled steps"
    blocks = [
        f'<header class="{mood}"><p class="kicker">Gradient report: {escape(view.model)}, {facts}</p>',
        f"<h1>{escape(words.verdict(view))}</h1><p>{escape(words.effective_depth(view))}</p></header>",
        *_around(_findings(view) + _actions(view.actions), _figures(view) if figures else []),
    ]
    title = f"Gradient report: {escape(view.model)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(blocks)
        + "\n</main></body></html>\n"
    )


def _around(text: str, figures: list[str]) -> list[str]:
    """The picture of the run comes first, what to do second, and the other figures behind it."""
    return [*figures[:1], text, *figures[1:]]


def _findings(view: View) -> str:
    if not view.findings:
        return ""
    told: set[Suggestion] = set()
    return "<h2>Findings</h2>" + "".join(
        _finding(finding, told, view.findings) for finding in lineage.shown(view.findings)
    )


def _finding(finding: Finding, told: set[Suggestion], findings: tuple[Finding, ...]) -> str:
    """One finding with its cause, its numbers and what to do; what was `told` above is not repeated."""
    rows = {
        "Cause": "" if finding.cause == "unknown" else finding.cause.replace("_", " "),
        "Layers": words.some(finding.layers, 12),
        "Measured": _numbers(finding.evidence),
    }
    facts = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows.items() if text)
    severity = finding.severity.value
    state = severity if finding.is_open else "resolved"
    todo = _to_do(finding, told, findings)
    return (
        f'<article class="{state}"><h3>{escape(words.kind(finding))} <span class="badge">{severity}</span>'
        f' <span class="when">{words.period(finding)}</span></h3><p>{escape(words.message(finding))}</p>'
        f"<dl>{facts}</dl>{todo}</article>"
    )


def _to_do(finding: Finding, told: set[Suggestion], findings: tuple[Finding, ...]) -> str:
    """The advice that is not `told` yet; of what merely follows from an alarm the advice stands there."""
    root = lineage.comes_of(finding, findings)
    if root is not None:
        return f"<p>Comes of: {escape(words.kind(root))}.</p>"
    fresh = [suggestion for suggestion in finding.suggestions if suggestion not in told]
    text = "".join(_suggestion(s, unfolded=not told and i == 0) for i, s in enumerate(fresh))
    what = words.to_do(finding, findings) or "What to do"
    if finding.suggestions and finding.suggestions[0] in told:
        text = f"<p>{what}: as above ({escape(finding.suggestions[0].title)}).</p>{text}"
    elif text and not finding.is_open:
        text = f"<p>{what}:</p>{text}"
    told.update(fresh)
    return text


def _suggestion(suggestion: Suggestion, unfolded: bool) -> str:
    """A title to unfold."""
    code = f"<pre><code>{escape(suggestion.code)}</code></pre>" if suggestion.code else ""
    source = f" <cite>{escape(suggestion.reference)}</cite>" if suggestion.reference else ""
    return (
        f'<details class="todo"{" open" if unfolded else ""}><summary>{escape(suggestion.title)}</summary>'
        f"<p>{escape(suggestion.reason)}{source}</p>{code}</details>"
    )


def _actions(actions: tuple[Action, ...]) -> str:
    if not actions:
        return ""
    head = "".join(
        f"<th>{escape(name)}</th>" for name in ("Step", "What", "Layers", "Why", "Before -> after", "Outcome")
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(cell)}</td>"
            for cell in (
                str(action.step),
                words.deed(action),
                words.some(action.layers) or "all",
                action.reason,
                words.changes(action),
                words.outcome_of(action) + ("" if action.decided_step is None else f", step {action.decided_step}"),
            )
        )
        + "</tr>"
        for action in actions
    )
    legend = f'<p class="when">{escape(words.outcome_legend(actions))}</p>'
    return f'<h2>What was changed</h2>{legend}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figures(view: View) -> list[str]:
    """The figures; the first comes with the one copy of plotly.js that draws them all."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    from lightning_gradflow.sinks.charts import charts

    drawn = charts(view)
    if not drawn:
        return []
    blocks = [
        f"<figure><figcaption><h2>{escape(chart.title)}</h2><p>{escape(chart.caption)}</p></figcaption>"
        + chart.figure.html(f"figure-{i}")
        + "</figure>"
        for i, chart in enumerate(drawn)
    ]
    return [f"<script>{get_plotlyjs()}</script>{blocks[0]}", *blocks[1:]]


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())


_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d9dee4; --page: #ffffff; --block: #f6f8fa;
  --critical: #c4001f; --warning: #a85f00; --info: #47698c; --calm: #1a7f4b; --resolved: #8a939c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9ba5af; --line: #3a424b; --page: #14181d;
  --block: #1c2229; --critical: #ff6b7a; --warning: #f0a94b; --info: #8db4dc; --calm: #5fc992; --resolved: #7d868f; } }
:root { color-scheme: light dark; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 24px 64px; }
header { border-left: 6px solid var(--calm); padding: 2px 0 2px 18px; margin-bottom: 28px; }
header.critical { border-color: var(--critical); } header.warning { border-color: var(--warning); }
.kicker { margin: 0; color: var(--soft); } h1 { margin: 4px 0; font-size: 26px; line-height: 1.3; }
header p { margin: 4px 0; } h2 { font-size: 19px; margin: 36px 0 10px; } h3 { font-size: 17px; margin: 0 0 6px; }
summary { cursor: pointer; font-weight: 600; }
article { --tone: var(--info); border: 1px solid var(--line); border-left: 4px solid var(--tone); border-radius: 6px;
  padding: 14px 18px; margin: 12px 0; }
article.critical { --tone: var(--critical); } article.warning { --tone: var(--warning); }
article.resolved { --tone: var(--resolved); }
article p { margin: 4px 0; } .when, cite { color: var(--soft); font-weight: 400; font-size: 14px; }
.badge { color: var(--tone); border: 1px solid var(--tone); border-radius: 10px; padding: 0 8px; font-size: 12px; }
dl { display: grid; grid-template-columns: 90px 1fr; gap: 2px 12px; margin: 8px 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.todo { border-top: 1px solid var(--line); margin-top: 10px; padding-top: 10px; font-size: 15px; }
pre { background: var(--block); border-radius: 6px; padding: 10px 14px; overflow-x: auto; margin: 8px 0 0;
  font: 13.5px/1.45 ui-monospace, monospace; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
figure { margin: 0; } figcaption p { margin: 0 0 8px; color: var(--soft); font-size: 14px; max-width: 90ch; }
figure .xtick text, figure .ytick text, figure .g-xtitle text, figure .g-ytitle text, figure .legendtext,
figure .colorbar text { fill: var(--ink) !important; }
"""
