"""History -> picture: the whole run as one image, layer x step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_gradflow.figures.cells import Grid, column_after, grid, shorten
from lightning_gradflow.figures.colours import Pixels, Scale, colour_map
from lightning_gradflow.findings import Action
from lightning_gradflow.history import History
from lightning_gradflow.metrics import METRICS

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_WIDTH, _MIN_HEIGHT, _MAX_HEIGHT = 1200, 300, 900  # 900 has room for as many labels as there may be
_FOOT, _RIGHT = 48, 100
_MAX_LABELS = 60
_INK = (34, 34, 34)


def heatmap(history: History, metric: str = "grad_norm", actions: Iterable[Action] = ()) -> Pixels:
    """The run in one look: a row of pixels for each layer, first layer on top, a column for each sampled step.

    Norms are coloured by their log10, fractions as they are, in viridis (uniform to the eye and safe for the
    colour-blind) without its darkest fifth. Exact zeros are black, values that are not finite are red, and what was
    not measured is grey. Where the picture would be too fine, cells are merged and the largest is shown.

    Args:
        history: where to read.
        metric: any name of the table of metrics.
        actions: each gets a white line between the columns before and after it, dotted if it was taken back, and its
            name above, where there is room.

    Returns:
        (H, 1200, 3) pixels, 300 to 900 of them high.

    Example:
        >>> heatmap(History()).shape
        (300, 1200, 3)
    """
    # Matplotlib gives font and colours alone: to lay the figure out takes it ten times as long as all of this.
    from PIL import Image, ImageDraw

    cells = grid(history, metric)
    n = len(cells.names)
    scale = Scale.over(cells.values, is_log=METRICS[metric].unit == "norm")
    legend = scale.legend(cells.values)
    labels = _Labels.of(cells)
    left, right = 40 + labels.width, _WIDTH - _RIGHT
    actions = list(actions)
    title = 53 if legend else 25
    top, foot = title + (27 if actions and n else 9), min(max(_MIN_HEIGHT, 160 + 26 * n), _MAX_HEIGHT) - _FOOT
    box = (left, top, right, foot)
    pixels = np.full((foot + _FOOT, _WIDTH, 3), 255, dtype=np.uint8)
    if n:
        pixels[top:foot, left:right] = _stretch(scale.paint(cells.values), foot - top, right - left)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    _write(draw, (left, title), f"{metric}: {METRICS[metric].meaning}", 17, "ls")
    if n:
        _mark_actions(draw, box, cells, actions)
        _frame(draw, box, cells, labels)
        _write_upwards(image, (4, top), "first layer", "top")
        _write_upwards(image, (4, foot), "last layer", "foot")
        _colour_bar(draw, right + 18, top, foot, scale)
        _draw_legend(draw, right, legend)
    else:
        _write(draw, (_WIDTH // 2, foot // 2), "nothing measured yet", 19, "mm")
    return np.array(image, dtype=np.uint8)


@dataclass(frozen=True)
class _Labels:
    """The names of the rows, or of every second, third, ... of them."""

    rows: range
    names: list[str]
    size: int

    @classmethod
    def of(cls, cells: Grid) -> _Labels:
        rows = range(0, len(cells.names), math.ceil(len(cells.names) / _MAX_LABELS) or 1)
        names = [_printable(name) for name in shorten(cells.names)[:: rows.step]]
        return cls(rows, names, 13 if len(names) <= 30 else 11)

    @property
    def width(self) -> int:
        """Pixels that the longest of them takes."""
        return max((math.ceil(_font(self.size).getlength(name)) for name in self.names), default=0)


def _frame(draw: ImageDraw, box: tuple[int, int, int, int], cells: Grid, labels: _Labels) -> None:
    """The border of the cells, with the layers at the left and the steps below."""
    left, top, right, foot = box
    n, samples = cells.values.shape
    draw.rectangle((left - 1, top - 1, right, foot), outline=_INK)
    for i, name in zip(labels.rows, labels.names, strict=True):
        y = top + round((i + 0.5) * (foot - top) / n)
        draw.line((left - 5, y, left - 1, y), fill=_INK)
        _write(draw, (left - 9, y), name, labels.size, "rm")
    for i in np.unique(np.linspace(0, samples - 1, min(samples, 11)).round().astype(int)).tolist():
        x = left + round((i + 0.5) * (right - left) / samples)
        draw.line((x, foot, x, foot + 4), fill=_INK)
        _write(draw, (x, foot + 7), str(cells.steps[i]), 13, "ma")
    _write(draw, ((left + right) // 2, foot + 26), "optimizer step (a column for each sample)", 14, "ma")


@functools.cache
def _font(size: int) -> FreeTypeFont:
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size, layout_engine=ImageFont.Layout.BASIC)


def _stretch(pixels: Pixels, height: int, width: int) -> Pixels:
    """(N, S, 3) -> (height, width, 3): each pixel is that of the nearest cell."""
    n, samples = pixels.shape[:2]
    stretched: Pixels = pixels[(np.arange(height) * n) // height][:, (np.arange(width) * samples) // width]
    return stretched


def _write(draw: ImageDraw, at: tuple[int, int], text: str, size: int, anchor: str) -> None:
    """Text at a place; the anchor says which point of the text that is, as in Pillow."""
    draw.text(at, text, fill=_INK, font=_font(size), anchor=anchor)


def _write_upwards(image: Image, at: tuple[int, int], text: str, end: Literal["top", "foot"]) -> None:
    """Text that reads from below, of which one end stands at a height."""
    from PIL import Image, ImageDraw

    turned = Image.new("RGB", (math.ceil(_font(14).getlength(text)), 18), "white")
    _write(ImageDraw.Draw(turned), (0, 0), text, 14, "la")
    turned = turned.transpose(Image.Transpose.ROTATE_90)
    image.paste(turned, (at[0], at[1] if end == "top" else at[1] - turned.height))


def _mark_actions(draw: ImageDraw, box: tuple[int, int, int, int], cells: Grid, actions: Iterable[Action]) -> None:
    left, top, right, foot = box
    free = 0
    for action in sorted(actions, key=lambda action: action.step):
        at = (column_after(cells.steps, action.step) + 0.5) / len(cells.steps)
        x = left + round(at * (right - left))
        _mark(draw, x, top, foot, is_dotted=action.outcome == "rolled_back")
        half = math.ceil(_font(13).getlength(action.kind)) // 2
        if x - half >= free:
            _write(draw, (x, top - 6), action.kind, 13, "ms")
            free = x + half + 6


def _mark(draw: ImageDraw, x: int, top: int, foot: int, is_dotted: bool) -> None:
    """A white line with dark edges, to be seen on any colour."""
    draw.rectangle((x - 2, top - 3, x + 2, foot + 3), fill=_INK)
    length = 4 if is_dotted else foot - top
    for y in range(top, foot, 2 * length):
        draw.rectangle((x - 1, y, x + 1, min(y + length, foot) - 1), fill="white")


def _colour_bar(draw: ImageDraw, x: int, top: int, foot: int, scale: Scale) -> None:
    """The scale at the right, with a tip at an end beyond which there are values."""
    width, tip = 18, 10
    is_below, is_above = scale.cut
    ramp = [tuple(colour) for colour in colour_map().tolist()]
    if is_above:
        draw.polygon([(x, top + tip), (x + width // 2, top), (x + width, top + tip)], fill=ramp[-1], outline=_INK)
    if is_below:
        draw.polygon([(x, foot - tip), (x + width // 2, foot), (x + width, foot - tip)], fill=ramp[0], outline=_INK)
    top, foot = top + tip * is_above, foot - tip * is_below
    for y in range(top, foot):
        draw.line((x, y, x + width, y), fill=ramp[int(255 * (foot - 1 - y) / (foot - 1 - top))])
    draw.rectangle((x, top - 1, x + width, foot), outline=_INK)
    for at, label in scale.ticks():
        y = foot - round((at - scale.low) / (scale.high - scale.low) * (foot - top))
        draw.line((x + width, y, x + width + 4, y), fill=_INK)
        _write(draw, (x + width + 7, y), label, 13, "lm")


def _draw_legend(draw: ImageDraw, right: int, legend: list[tuple[str, tuple[int, int, int]]]) -> None:
    """A patch and a label for each colour, in one line above the title, from the right."""
    for label, colour in reversed(legend):
        right -= math.ceil(_font(13).getlength(label))
        _write(draw, (right, 16), label, 13, "lm")
        draw.rectangle((right - 32, 10, right - 8, 21), fill=colour, outline=(136, 136, 136))
        right -= 54


def _printable(name: str) -> str:
    """Letters beyond Latin, Greek and Cyrillic are not in the font."""
    return "".join(letter if ord(letter) < 0x530 else "?" for letter in name)
