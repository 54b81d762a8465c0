"""From values to colours."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.history import Floats

Pixels = npt.NDArray[np.uint8]

ZERO_COLOUR = (0, 0, 0)
"""RGB of an exact zero: darker than every colour of the map."""
NONFINITE_COLOUR = (230, 0, 46)
"""RGB of a value that was measured and is infinite: no colour of the map is near it, to the colour-blind either."""
MISSING_COLOUR = (216, 216, 216)
"""RGB of what was not measured."""

_MIN_DECADES, _MAX_DECADES = 4, 20


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


@dataclass(frozen=True)
class Scale:
    """From values to colours, from `low` to `high`, which are exponents if `is_log`; what lies beyond is `cut`."""

    low: float
    high: float
    is_log: bool
    cut: tuple[bool, bool]

    @classmethod
    def over(cls, values: Floats, is_log: bool) -> Scale:
        """The scale that shows these values."""
        if not is_log:
            finite = values[np.isfinite(values)]
            return cls(0.0, max(1.0, float(finite.max(initial=0.0))), is_log, (False, False))
        low, high = limits(values)
        logs = np.log10(values[np.isfinite(values) & (values > 0)])
        return cls(low, high, is_log, (bool((logs < low).any()), bool((logs > high).any())))

    def paint(self, values: Floats) -> Pixels:
        """(N, S) values -> (N, S, 3) pixels."""
        position = np.log10(np.where(values > 0, values, 1.0)) if self.is_log else values
        scaled = np.nan_to_num((position - self.low) / (self.high - self.low), nan=0.0, posinf=0.0, neginf=0.0)
        pixels: Pixels = colour_map()[np.clip(scaled * 255, 0, 255).astype(int)]
        if self.is_log:
            pixels[values == 0] = ZERO_COLOUR
        pixels[np.isinf(values)] = NONFINITE_COLOUR
        pixels[np.isnan(values)] = MISSING_COLOUR
        return pixels

    def ticks(self) -> list[tuple[float, str]]:
        """Each decade, or every second, third, ... of them, with its label; of fractions every fifth."""
        if not self.is_log:
            return [(at, f"{at:.3g}") for at in np.linspace(self.low, self.high, 6).tolist()]
        exponents = np.arange(self.high, self.low - 0.5, -math.ceil((self.high - self.low) / 9)).tolist()
        return [(at, f"1e{at:+.0f}" if at else "1") for at in exponents]

    def legend(self, values: Floats) -> list[tuple[str, tuple[int, int, int]]]:
        """The colours with a meaning of their own, as far as they occur."""
        kinds = [
            ("exactly zero", ZERO_COLOUR, self.is_log and (values == 0).any()),
            ("not finite", NONFINITE_COLOUR, np.isinf(values).any()),
            ("not measured", MISSING_COLOUR, np.isnan(values).any()),
        ]
        return [(label, colour) for label, colour, occurs in kinds if occurs]


@functools.cache
def colour_map(first: float = 0.2, last: float = 1.0, n: int = 256) -> Pixels:
    """(n, 3) colours of viridis from a share of it to another; without its darkest part a zero in black stands out."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](np.linspace(first, last, n), bytes=True), dtype=np.uint8)[:, :3]
