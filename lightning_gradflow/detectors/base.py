"""What every detector is: thresholds, and one pure method."""

from __future__ import annotations

from typing import Protocol

from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History


class Detector(Protocol):
    """A frozen dataclass of thresholds with one pure method: no torch, no Lightning, no clock, no I/O, no state."""

    def judge(self, history: History) -> list[Finding]:
        """What is wrong at the newest row, if anything; the message is left to `advice`."""
        ...


def check_range(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = True,
    open_high: bool = True,
    whole: bool = False,
) -> None:
    """Raises a `ValueError` that names the argument, its range and what came, if `value` is outside the range.

    Example:
        >>> check_range("max_decay", 2.0, 0, 100)
        >>> check_range("max_decay", -1, 0, 100)
        Traceback (most recent call last):
        ...
        ValueError: max_decay must be in (0, 100), got -1
    """
    inside = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not inside or (open_low and value == low) or (open_high and value == high):
        brackets = ("(" if open_low else "["), (")" if open_high else "]")
        number = "a whole number in " if whole else "in "
        raise ValueError(f"{name} must be {number}{brackets[0]}{low:g}, {high:g}{brackets[1]}, got {value!r}")
