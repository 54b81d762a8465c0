"""History -> pictures: the whole run as one image, layer x step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradflow.findings import Action
from lightning_gradflow.history import Floats, History, Ints
from lightning_gradflow.metrics import METRICS

Pixels = npt.NDArray[np.uint8]

ZERO_COLOUR = (0, 0, 0)
"""RGB of an exact zero: darker than every colour of the map."""
NONFINITE_COLOUR = (230, 0, 46)
"""RGB of a value that was measured and is infinite: no colour of the map is near it, to the colour-blind either."""
MISSING_COLOUR = (216, 216, 216)
"""RGB of what was not measured."""

MAX_COLUMNS = 512
MAX_ROWS = 256
_MAX_LABELS = 60
_MIN_DECADES, _MAX_DECADES = 4, 20
_DPI = 100
_INK = "#222222"


@dataclass(frozen=True)
class Grid:
    """What a heatmap shows, already as small as it is drawn.

    Args:
        names: (N,) a name for each row, first layer first. Where rows were merged, the first name and how many more.
        steps: (S,) the last optimizer step of each column.
        values: (N, S); of merged cells the largest, so that an infinite value is never lost. NaN = not measured.
    """

    names: tuple[str, ...]
    steps: Ints
    values: Floats


def grid(history: History, metric: str, max_columns: int = MAX_COLUMNS, max_rows: int = MAX_ROWS) -> Grid:
    """The values of a metric over depth and time, in order of execution, at most `max_rows` x `max_columns`.

    Fractions of points that have none (the output of a linear layer is not bounded) are left out.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2", "fc3"])
        >>> for step in range(5):
        ...     history.append(Row(step, {"grad_norm": np.array([1.0, 2.0, 3.0])}))
        >>> found = grid(history, "grad_norm", max_columns=2, max_rows=2)
        >>> found.names, found.steps, found.values.shape
        (('fc1', 'fc2 (+1)'), array([1, 4]), (2, 2))
    """
    # the losses after the last sample are a row of their own, in which nothing else was measured
    sampled = np.array([metric in row.values for row in history.rows], dtype=bool)
    values, names, steps = history[metric][sampled].T, list(history.names(metric)), history.steps[sampled]
    if METRICS[metric].axis == "points" and METRICS[metric].unit == "fraction":
        measured = np.flatnonzero(~np.isnan(values).all(axis=1))
        values, names = values[measured], [names[i] for i in measured]
    if 0 in values.shape:
        return Grid((), np.empty(0, dtype=np.int64), np.empty((0, 0)))
    columns, rows = _starts(values.shape[1], max_columns), _starts(values.shape[0], max_rows)
    values = np.fmax.reduceat(np.fmax.reduceat(values, columns, axis=1), rows, axis=0)
    counts = np.diff(np.append(rows, len(names)))
    labels = [names[at] if n == 1 else f"{names[at]} (+{n - 1})" for at, n in zip(rows, counts, strict=True)]
    return Grid(tuple(labels), steps[np.append(columns[1:], len(steps)) - 1], values)


def column_after(steps: Ints, step: int) -> float:
    """The left edge of the first column that was sampled after a step, in columns.

    Example:
        >>> column_after(np.array([0, 10, 20]), 10), column_after(np.array([0, 10, 20]), 25)
        (1.5, 2.5)
    """
    return float(np.searchsorted(steps, step, side="right")) - 0.5


def _starts(n: int, most: int) -> Ints:
    """Where each of at most `most` runs of about equal length begins."""
    runs = min(n, most)
    return (np.arange(runs, dtype=np.int64) * n) // runs


def shorten(names: tuple[str, ...], width: int = 32) -> list[str]:
    """Names that fit beside a picture: the common beginning goes first, then the middle.

    Example:
        >>> shorten(("model.blocks.0.attention", "model.blocks.1.attention"), width=16)
        ['0.attention', '1.attention']
        >>> shorten(("a_very_long_layer_name",), width=10)
        ['a_ve..name']
    """
    if len(names) > 1 and max(map(len, names)) > width:
        parts = [name.split(".") for name in names]
        shared = 0
        while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
            shared += 1
        names = tuple(".".join(p[shared:]) for p in parts)
    half = (width - 2) // 2
    return [name if len(name) <= width else f"{name[:half]}..{name[-half:]}" for name in names]


def limits(values: Floats) -> tuple[float, float]:
    """The whole decades that a log10 scale covers, as exponents `(low, high)`.

    It covers four decades at least, so that the small differences of a healthy network look small. Beyond 20 decades
    one wild value would drown the rest: then it covers the middle 98 % of the values.

    Example:
        >>> limits(np.array([0.0, 3e-6, 0.5, np.inf]))
        (-6.0, 0.0)
    """
    logs = np.log10(values[np.isfinite(values) & (values > 0)])
    if not logs.size:
        return -float(_MIN_DECADES), 0.0
    low, high = float(logs.min()), float(logs.max())
    if high - low > _MAX_DECADES:
        low, high = (float(edge) for edge in np.percentile(logs, [1, 99]))
    top = float(math.ceil(high))
    return min(float(math.floor(low)), top - _MIN_DECADES), top


def heatmap(history: History, metric: str = "grad_norm", actions: Iterable[Action] = ()) -> Pixels:
    """The run in one look: a row of pixels for each layer, first layer on top, a column for each sampled step.

    Norms are coloured by their log10, fractions as they are, in viridis (uniform to the eye and safe for the
    colour-blind) without its darkest fifth. Exact zeros are black, values that are not finite are red, and what was
    not measured is grey. Where the picture would be too fine, cells are merged and the largest is shown.

    Args:
        history: where to read.
        metric: any name of the table of metrics.
        actions: each gets a white line between the columns before and after it, dotted if it was taken back.

    Returns:
        (H, W, 3) pixels, some 1200 wide.

    Example:
        >>> heatmap(History()).shape[2]
        3
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    cells = grid(history, metric)
    height = min(max(3.0, 1.6 + 0.26 * len(cells.names)), 12.0)
    figure = Figure(figsize=(12, height), dpi=_DPI, facecolor="white", layout="constrained")
    # The canvas is made by hand, because pyplot would hold the figure and may open windows.
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.grid(False)
    axes.set_title(f"{metric}: {METRICS[metric].meaning}", loc="left", fontsize=12, color=_INK)
    if cells.values.size:
        _draw(figure, axes, cells, is_log=METRICS[metric].unit == "norm")
        for action in actions:
            style = ":" if action.outcome == "rolled_back" else "-"
            at = column_after(cells.steps, action.step)
            axes.axvline(at, color=_INK, linewidth=4, clip_on=False)
            axes.axvline(at, color="white", linewidth=2, linestyle=style, clip_on=False)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", fontsize=14, color=_INK)
    for text in figure.findobj(Text):
        # A person's own matplotlibrc may ask for LaTeX or for a font without these letters.
        text.set(usetex=False, parse_math=False, fontfamily="DejaVu Sans")
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def _draw(figure: Any, axes: Any, cells: Grid, is_log: bool) -> None:
    """The cells with their two axes, the colour bar and the legend."""
    low, high = limits(cells.values) if is_log else (0.0, max(1.0, _largest(cells.values)))
    colours = _colours()
    axes.imshow(
        _paint(cells.values, colours, low, high, is_log), aspect="auto", interpolation="nearest", origin="upper"
    )
    n, samples = cells.values.shape
    rows = np.arange(0, n, math.ceil(n / _MAX_LABELS))
    labels = [_printable(label) for label in shorten(cells.names)]
    axes.set_yticks(rows, [labels[i] for i in rows], fontsize=9 if len(rows) <= 30 else 8, color=_INK)
    columns = np.unique(np.linspace(0, samples - 1, min(samples, 11)).round().astype(int))
    axes.set_xticks(columns, [str(cells.steps[i]) for i in columns], fontsize=9, color=_INK)
    axes.set_xlabel("optimizer step (a column for each sample)", fontsize=10, color=_INK)
    axes.set_ylabel("input side at the top", fontsize=10, color=_INK)
    _colour_bar(figure, axes, colours, low, high, is_log, cells.values)
    _legend(figure, cells.values, is_log)


def _paint(values: Floats, colours: Floats, low: float, high: float, is_log: bool) -> Pixels:
    """(N, S) values -> (N, S, 3) pixels."""
    position = np.log10(np.where(values > 0, values, 1.0)) if is_log else values
    scaled = np.nan_to_num((position - low) / (high - low), nan=0.0, posinf=0.0, neginf=0.0)
    pixels: Pixels = np.round(255 * colours[np.clip(scaled * 255, 0, 255).astype(int)]).astype(np.uint8)
    if is_log:
        pixels[values == 0] = ZERO_COLOUR
    pixels[np.isinf(values)] = NONFINITE_COLOUR
    pixels[np.isnan(values)] = MISSING_COLOUR
    return pixels


def _colours() -> Floats:
    """(256, 3) the colour map; without its darkest part an exact zero in black stands out."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](np.linspace(0.2, 1.0, 256)), dtype=np.float64)[:, :3]


def _colour_bar(figure: Any, axes: Any, colours: Floats, low: float, high: float, is_log: bool, values: Floats) -> None:
    """The scale at the right, a tick for each decade or for every second, third, ... of them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    logs = np.log10(values[np.isfinite(values) & (values > 0)]) if is_log else np.empty(0)
    ends = ("min" if (logs < low).any() else "") + ("max" if (logs > high).any() else "")
    extend = {"": "neither", "minmax": "both"}.get(ends, ends)
    mappable = ScalarMappable(Normalize(low, high), ListedColormap(colours))
    bar = figure.colorbar(
        mappable, ax=axes, extend=extend, extendfrac=0.02, pad=0.01, fraction=0.03, aspect=4.6 * figure.get_figheight()
    )
    if is_log:
        ticks = np.arange(high, low - 0.5, -math.ceil((high - low) / 9))[::-1]
        bar.set_ticks(ticks, labels=[f"1e{tick:+.0f}" if tick else "1" for tick in ticks])
    bar.ax.tick_params(labelsize=9, colors=_INK)


def _legend(figure: Any, values: Floats, is_log: bool) -> None:
    """The colours with a meaning of their own, as far as they occur."""
    from matplotlib.patches import Patch

    entries = [
        ("exactly zero", ZERO_COLOUR, is_log and bool((values == 0).any())),
        ("not finite", NONFINITE_COLOUR, bool(np.isinf(values).any())),
        ("not measured", MISSING_COLOUR, bool(np.isnan(values).any())),
    ]
    patches = [
        Patch(facecolor=(colour[0] / 255, colour[1] / 255, colour[2] / 255), edgecolor="#888888", label=label)
        for label, colour, occurs in entries
        if occurs
    ]
    if patches:
        figure.legend(handles=patches, loc="outside upper right", ncols=3, fontsize=9, frameon=False, labelcolor=_INK)


def _largest(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 1.0


def _printable(name: str) -> str:
    """Letters beyond Latin, Greek and Cyrillic are in no font that is always there."""
    return "".join(letter if ord(letter) < 0x530 else "?" for letter in name)
