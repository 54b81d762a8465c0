"""The figures of the report page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np

from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.figures import column_after, grid, limits, shorten
from lightning_gradflow.findings import Action, Finding
from lightning_gradflow.history import History
from lightning_gradflow.metrics import HISTOGRAM_BINS, MAX_EXPONENT, MIN_EXPONENT
from lightning_gradflow.sinks import parts
from lightning_gradflow.sinks.base import View
from lightning_gradflow.sinks.parts import Figure

MAX_LOSS_POINTS = 2000
_MAX_SAMPLES = 6
_MAX_LINES = 5
_SEVERITY_COLOURS = {"info": "#5b7a99", "warning": "#c77700", "critical": "#d0021b"}


@dataclass(frozen=True)
class Chart:
    """One figure of the page: its title, a line on how to read it, and the figure."""

    title: str
    caption: str
    figure: Figure


def charts(view: View) -> list[Chart]:
    """Every figure for which the run has data, in the order in which to look at them.

    Example:
        >>> charts(View(History(), (), (), step=0, progress=0.0, model="Net"))
        []
    """
    history = view.history
    marks = " Lines with an outcome stand where the run was changed." if view.actions else ""
    drawn: list[tuple[str, str, Figure | None]] = [
        (
            "Gradient norm by layer and step",
            "Input side at the top, a column for each sampled step. Black: exactly zero. Red: not finite. "
            "Grey: not measured. In a healthy network top and bottom differ by a few decades at most." + marks,
            heatmap(history, actions=view.actions),
        ),
        (
            "Signal against depth",
            (
                "Norm of the loss gradient at the outputs, from the first layer (left) to the last (right), from "
                "the first sample (dark) to the last (bright). A line that climbs to the right is a signal that dies "
                "on its way back."
            ),
            depth(history),
        ),
        (
            "Size of the gradient entries, early and late layers",
            (
                "Share of the entries by log2 of their size, in the newest sample; dotted: the first sample. The two "
                "curves of a healthy network overlap."
            ),
            histograms(history),
        ),
        (
            "Saturated and dead activations",
            (
                "The worst activations. Solid: share of outputs at their bounds. Dashed: share of units that are flat "
                "for every sample."
            ),
            activations(history),
        ),
        (
            "Loss",
            f"Training loss, with the step at which each finding was opened.{marks}",
            loss(history, view.findings, view.actions),
        ),
    ]
    return [Chart(title, caption, figure) for title, caption, figure in drawn if figure is not None]


def heatmap(history: History, metric: str = "grad_norm", actions: Iterable[Action] = ()) -> Figure | None:
    """Layer x step in log10, as in the image, a line at each action; None where nothing was measured."""
    cells = grid(history, metric, max_columns=256)
    if not cells.values.size:
        return None
    values, n = cells.values, len(cells.names)
    low, high = limits(values)
    usable = np.isfinite(values) & (values > 0)
    # Steps are unequal: with categories a column stands for a sample.
    x, y = [str(step) for step in cells.steps], [escape(name) for name in cells.names]
    figure = parts.figure(height=min(max(280, 110 + 24 * n), 1000))
    figure.add(
        "heatmap",
        x=x,
        y=y,
        hoverongaps=False,
        z=parts.gaps(np.log10(np.where(usable, values, np.nan))),
        zmin=low,
        zmax=high,
        colorscale=[[i / 10, colour] for i, colour in enumerate(parts.ramp(11, 0.2, 1.0))],
        colorbar=parts.decades(low, high),
        hovertemplate="%{y}<br>step %{x}<br>1e%{z:.2f}<extra></extra>",
    )
    for label, colour, where in parts.special(values):
        figure.add(
            "heatmap",
            x=x,
            y=y,
            hoverongaps=False,
            z=parts.gaps(np.where(where, 1.0, np.nan)),
            showscale=False,
            colorscale=[[0, colour], [1, colour]],
            hovertemplate=f"%{{y}}<br>step %{{x}}<br>{label}<extra></extra>",
        )
    for i, action in enumerate(actions):
        parts.mark_action(figure, column_after(cells.steps, action.step), action, i)
    short = [escape(name) for name in shorten(cells.names)]
    rows, columns = list(range(0, n, math.ceil(n / 60))), parts.spread(list(range(len(cells.steps))), 9)
    category = {"type": "category", "showgrid": False}
    names = {"tickvals": [y[i] for i in rows], "ticktext": [short[i] for i in rows]}
    figure.axes(
        x=category | {"title": {"text": "step"}, "tickvals": [x[i] for i in columns]},
        y=category | {"autorange": "reversed"} | names,
    )
    return figure


def depth(history: History) -> Figure | None:
    """Delta norm against the points in order of execution, a line a sample; None where nothing was measured."""
    measured = [i for i, row in enumerate(history.rows) if "delta_norm" in row.values]
    profiles = [
        profile for i in parts.spread(measured, _MAX_SAMPLES) if (profile := depth_profile(history, i)) is not None
    ]
    if not profiles:
        return None
    place = {point.name: i for i, point in enumerate(history.points)}
    every = np.concatenate([profile.delta_norm for profile in profiles])
    low, high = limits(every)
    figure = parts.figure()
    for profile, colour in zip(profiles, parts.ramp(len(profiles)), strict=True):
        x = [place[point.name] for point in profile.points]
        names = [escape(point.name) for point in profile.points]
        y = parts.gaps(np.where(profile.usable, profile.delta_norm, np.nan))
        figure.add(
            "scatter",
            x=x,
            y=y,
            mode="lines+markers" if len(x) <= 60 else "lines",
            name=f"step {profile.step}",
            line={"color": colour},
            text=names,
            hovertemplate=f"%{{text}}, step {profile.step}: %{{y:.2e}}<extra></extra>",
        )
    parts.edge_markers(figure, profiles, place, 10.0**low, 10.0**high)
    ticks = parts.spread(list(range(len(history.points))), 30)
    labels = [escape(name) for name in shorten(tuple(p.name for p in history.points), 24)]
    decades = {"type": "log", "exponentformat": "power", "dtick": max(1, math.ceil((high - low) / 10))}
    figure.axes(
        x={"tickvals": ticks, "ticktext": [labels[i] for i in ticks], "tickangle": -60},
        y=decades | {"title": {"text": "norm"}},
    )
    return figure


def histograms(history: History) -> Figure | None:
    """Share of gradient entries by exponent, early against late layers; None where nothing was counted."""
    figure, seen = parts.figure(), []
    for name, label, colour in (("grad_hist_early", "early", "#5b7fc7"), ("grad_hist_late", "late", "#e08214")):
        counts = history.histogram(name)
        filled = np.flatnonzero(counts.sum(axis=1))
        for row, dash in zip(dict.fromkeys([*filled[-1:], *filled[:1]]), ("solid", "dot"), strict=False):
            shares = counts[row] / counts[row].sum()
            seen.append(shares[:HISTOGRAM_BINS])
            rest = [f"{shares[-2]:.1%} zero"] * bool(shares[-2]) + [f"{shares[-1]:.1%} not finite"] * bool(shares[-1])
            title = f"{label}, step {history.steps[row]}" + (f" ({', '.join(rest)})" if rest else "")
            figure.add(
                "scatter",
                x=list(range(MIN_EXPONENT, MAX_EXPONENT)),
                y=shares[:HISTOGRAM_BINS].tolist(),
                name=title,
                mode="lines",
                line={"shape": "hvh", "color": colour, "dash": dash, "width": 2 if dash == "solid" else 1},
                fill="tozeroy" if dash == "solid" else "none",
                hovertemplate="2^%{x}: %{y:.2%}<extra></extra>",
            )
    if not seen:
        return None
    where = np.flatnonzero(np.sum(seen, axis=0))
    edges = (int(where[0]), int(where[-1])) if where.size else (0, HISTOGRAM_BINS)
    shown = [MIN_EXPONENT + edges[0] - 2, MIN_EXPONENT + edges[1] + 2]
    figure.axes(
        x={"title": {"text": "log2 |gradient entry|"}, "range": shown},
        y={"title": {"text": "share of entries"}, "tickformat": ".0%"},
    )
    return figure


def activations(history: History) -> Figure | None:
    """Saturated and dead fractions of the worst activations over the steps; None where nothing was measured."""
    figure, steps = parts.figure(), history.steps.tolist()
    drawn = 0
    for metric, word, dash in (("saturated_fraction", "saturated", "solid"), ("dead_fraction", "dead", "dash")):
        values = history[metric]
        measured = np.flatnonzero(~np.isnan(values).all(axis=0))
        if not measured.size:
            continue
        worst = measured[np.argsort(-np.nanmax(values[:, measured], axis=0), kind="stable")][:_MAX_LINES]
        names = history.names(metric)
        for column, colour in zip(np.sort(worst), parts.ramp(len(worst)), strict=True):
            figure.add(
                "scatter",
                x=steps,
                y=parts.gaps(values[:, column]),
                name=f"{escape(names[column])}, {word}",
                mode="lines+markers" if len(steps) <= 100 else "lines",
                line={"dash": dash, "color": colour},
                marker={"size": 4},
                connectgaps=True,
                hovertemplate="step %{x}: %{y:.1%}",
            )
            drawn += 1
    if not drawn:
        return None
    figure.axes(
        x={"title": {"text": "step"}},
        y={"title": {"text": "share"}, "tickformat": ".0%", "range": [-0.02, 1.02]},
    )
    return figure


def loss(history: History, findings: Iterable[Finding] = (), actions: Iterable[Action] = ()) -> Figure | None:
    """Training loss over the steps, a line at each finding and each action; None where no loss was seen."""
    steps, losses = history.loss_steps, history.losses
    if not losses.size:
        steps, losses = history.steps.astype(np.float64), history.scalar("loss")
    finite = np.isfinite(losses)
    if not finite.any():
        return None
    if len(losses) > MAX_LOSS_POINTS:
        starts = (np.arange(MAX_LOSS_POINTS) * len(losses)) // MAX_LOSS_POINTS
        counts = np.diff(np.append(starts, len(losses)))
        steps, losses = np.add.reduceat(steps, starts) / counts, np.add.reduceat(losses, starts) / counts
    figure = parts.figure()
    figure.add(
        "scatter",
        x=steps.tolist(),
        y=parts.gaps(losses),
        mode="lines" if len(losses) > 1 else "markers",
        name="loss",
        line={"color": "#3b6fb5", "width": 1.5},
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    place = 0
    for place, finding in enumerate(findings, 1):
        colour = _SEVERITY_COLOURS[finding.severity.value]
        parts.mark(figure, finding.step, {"color": colour, "dash": "dash", "width": 1.5})
        parts.label(figure, finding.step, finding.kind.value, colour, place - 1)
    for i, action in enumerate(actions):
        parts.mark_action(figure, action.step, action, place + i)
    usable = losses[np.isfinite(losses)]
    is_wide = usable.size > 0 and usable.min() > 0 and usable.max() > 20 * usable.min()
    figure.axes(x={"title": {"text": "step"}}, y={"title": {"text": "loss"}, "type": "log" if is_wide else "linear"})
    return figure
