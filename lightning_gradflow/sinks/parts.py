"""What the figures of the report page are put together from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from lightning_gradflow.detectors.profile import DepthProfile
from lightning_gradflow.figures import MISSING_COLOUR, NONFINITE_COLOUR, ZERO_COLOUR, colour_map
from lightning_gradflow.findings import Action
from lightning_gradflow.history import Floats
from lightning_gradflow.sinks.words import OUTCOMES


@dataclass
class Figure:
    """A plotly figure as plain lists and dicts: built from plotly's own objects it takes five times as long.

    Args:
        traces: what is drawn, as in `data` of a figure.
        layout: as in a figure.
    """

    traces: list[dict[str, Any]]
    layout: dict[str, Any]

    def add(self, kind: str, **trace: Any) -> None:
        """Draws one more thing, such as a `scatter` or a `heatmap`."""
        self.traces.append({"type": kind, **trace})

    def axes(self, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
        """Says more about the two axes."""
        self.layout["xaxis"].update(x)
        self.layout["yaxis"].update(y)

    def html(self, name: str) -> str:
        """A block of the page; `name` is its id. The page must hold plotly.js above it."""
        config = {"displayModeBar": False, "responsive": True}
        parts = ", ".join(json.dumps(part, allow_nan=False) for part in (self.traces, self.layout, config))
        script = f'Plotly.newPlot("{name}", {parts})'.replace("<", "\\u003c")
        return f'<div id="{name}" style="height: {self.layout["height"]}px"></div><script>{script}</script>'


def figure(height: int = 380) -> Figure:
    """An empty figure that stands on a light and on a dark page."""
    clear, line = "rgba(0,0,0,0)", "rgba(128,128,128,0.3)"
    axis = {"gridcolor": line, "zeroline": False, "automargin": True}
    layout = {
        "height": height,
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 20, "b": 50},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "shapes": [],
        "annotations": [],
    }
    return Figure([], layout)


def special(values: Floats) -> list[tuple[str, str, Any]]:
    """Label, colour and place of what has no logarithm, as far as it occurs."""
    kinds = [
        ("exactly zero", ZERO_COLOUR, values == 0),
        ("not finite", NONFINITE_COLOUR, np.isinf(values)),
        ("not measured", MISSING_COLOUR, np.isnan(values)),
    ]
    return [(label, f"rgb{colour}", where) for label, colour, where in kinds if where.any()]


def decades(low: float, high: float) -> dict[str, Any]:
    """A colour bar over exponents, with a tick for each decade or for every second, third, ... of them."""
    ticks = np.arange(high, low - 0.5, -math.ceil((high - low) / 9))[::-1].tolist()
    return {
        "tickvals": ticks,
        "ticktext": [f"1e{tick:+.0f}" if tick else "1" for tick in ticks],
        "thickness": 14,
        "outlinewidth": 0,
    }


OUTCOME_LINES = {"applied": ("#5b7a99", "dash"), "kept": ("#1a7f4b", "solid"), "rolled_back": ("#8a5a9e", "dot")}
"""Colour and dash of the line at an action."""


def mark_action(figure: Figure, x: float, action: Action, place: int) -> None:
    """A line where the run was changed, with what has become of it; `place` counts the labels from the top."""
    colour, dash = OUTCOME_LINES.get(action.outcome, OUTCOME_LINES["applied"])
    mark(figure, x, {"color": colour, "dash": dash, "width": 2})
    label(figure, x, f"{action.kind}, {OUTCOMES.get(action.outcome, action.outcome)}", colour, place)


def mark(figure: Figure, x: float, line: Mapping[str, Any]) -> None:
    """A line from the foot to the head."""
    place = {"x0": x, "x1": x, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    figure.layout["shapes"].append({"type": "line", "line": line, **place})


def label(figure: Figure, x: float, text: str, colour: str, place: int) -> None:
    """A label at a line; those of lines that stand together would write over each other at one height."""
    figure.layout["annotations"].append(
        {
            "x": x,
            "y": 1.0 - 0.09 * (place % 8),
            "yref": "paper",
            "text": escape(text),
            "showarrow": False,
            "xanchor": "left",
            "xshift": 4,
            "font": {"color": colour, "size": 12},
            "bgcolor": "rgba(127,127,127,0.15)",
        }
    )


def gaps(values: Floats) -> Any:
    """Nested plain lists with None for what is not finite; rounded, since no one reads the tenth digit of a picture."""
    if values.ndim == 2:
        return [gaps(row) for row in values]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def spread(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(np.int64)]


def ramp(n: int, first: float = 0.25, last: float = 0.85) -> list[str]:
    """Colours from dark to bright; without the ends that would be lost on a dark or a white page."""
    every = colour_map(first, last, n)
    return [f"rgb({red}, {green}, {blue})" for red, green, blue in every.tolist()]


def edge_markers(figure: Figure, profiles: list[DepthProfile], place: dict[str, int], low: float, high: float) -> None:
    """What a log axis can't show stands at its edges: exact zeros at the foot, infinite values at the head."""
    for label, symbol, colour, y in (("exactly zero", "x", "#888888", low), ("not finite", "star", "#d0021b", high)):
        hits = [
            (place[point.name], profile.step)
            for profile in profiles
            for point, value in zip(profile.points, profile.delta_norm.tolist(), strict=True)
            if (value == 0 if y == low else math.isinf(value))
        ]
        if hits:
            figure.add(
                "scatter",
                x=[x for x, _ in hits],
                y=[y] * len(hits),
                mode="markers",
                name=label,
                marker={"symbol": symbol, "color": colour, "size": 10},
                text=[f"{label}, step {step}" for _, step in hits],
                hovertemplate="%{text}<extra></extra>",
            )
