"""What the figures of the report page are put together from."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from lightning_gradflow.detectors.profile import DepthProfile
from lightning_gradflow.figures import MISSING_COLOUR, NONFINITE_COLOUR, ZERO_COLOUR
from lightning_gradflow.findings import Action
from lightning_gradflow.history import Floats
from lightning_gradflow.sinks.words import OUTCOMES


def figure(height: int = 380) -> Any:
    """An empty figure that stands on a light and on a dark page."""
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    empty = go.Figure()
    clear, line = "rgba(0,0,0,0)", "rgba(128,128,128,0.3)"
    empty.update_layout(
        template="none",
        height=height,
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        hovermode="closest",
        margin={"l": 70, "r": 20, "t": 20, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    empty.update_xaxes(gridcolor=line, zeroline=False, automargin=True)
    empty.update_yaxes(gridcolor=line, zeroline=False, automargin=True)
    return empty


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


def mark_action(figure: Any, x: float, action: Action, place: int) -> None:
    """A line where the run was changed, with what has become of it; `place` counts the labels from the top."""
    colour, dash = OUTCOME_LINES.get(action.outcome, OUTCOME_LINES["applied"])
    figure.add_vline(x=x, line={"color": colour, "dash": dash, "width": 2})
    label(figure, x, f"{action.kind}, {OUTCOMES.get(action.outcome, action.outcome)}", colour, place)


def label(figure: Any, x: float, text: str, colour: str, place: int) -> None:
    """A label at a line; those of lines that stand together would write over each other at one height."""
    figure.add_annotation(
        x=x,
        y=1.0 - 0.09 * (place % 8),
        yref="paper",
        text=escape(text),
        showarrow=False,
        xanchor="left",
        xshift=4,
        font={"color": colour, "size": 12},
        bgcolor="rgba(127,127,127,0.15)",
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
    from plotly.colors import sample_colorscale  # type: ignore[import-untyped]

    return [str(colour) for colour in sample_colorscale("Viridis", np.linspace(first, last, n).tolist())]


def edge_markers(figure: Any, profiles: list[DepthProfile], place: dict[str, int], low: float, high: float) -> None:
    """What a log axis can't show stands at its edges: exact zeros at the foot, infinite values at the head."""
    for label, symbol, colour, y in (("exactly zero", "x", "#888888", low), ("not finite", "star", "#d0021b", high)):
        hits = [
            (place[point.name], profile.step)
            for profile in profiles
            for point, value in zip(profile.points, profile.delta_norm.tolist(), strict=True)
            if (value == 0 if y == low else math.isinf(value))
        ]
        if hits:
            figure.add_scatter(
                x=[x for x, _ in hits],
                y=[y] * len(hits),
                mode="markers",
                name=label,
                marker={"symbol": symbol, "color": colour, "size": 10},
                text=[f"{label}, step {step}" for _, step in hits],
                hovertemplate="%{text}<extra></extra>",
            )
