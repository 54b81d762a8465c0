"""Shares of small numbers of runs, with the interval that goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Share:
    """`hits` out of `total`.

    Example:
        >>> str(Share(9, 10))
        '9/10 = 0.90 [0.60, 0.98]'
        >>> str(Share(0, 0))
        '-'
    """

    hits: int
    total: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        """The share of those that are true."""
        listed = list(outcomes)
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float:
        """The share itself; NaN out of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies with 95 % confidence, by Wilson's score (Wilson 1927).

        Unlike the usual p +- 1.96 s it stays within [0, 1] and does not shrink to a point at 0 and at 1. It takes the
        runs as independent, which seeds of one case are not.

        Example:
            >>> [round(limit, 3) for limit in Share(50, 100).interval]
            [0.404, 0.596]
        """
        n = self.total
        if not n:
            return math.nan, math.nan
        p, z2 = self.value, _Z**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.hits}/{self.total} = {self.value:.2f} [{low:.2f}, {high:.2f}]" if self.total else "-"

    def to_json(self) -> dict[str, float | int]:
        """Numbers for a file."""
        low, high = self.interval
        return {"hits": self.hits, "total": self.total, "low": round(low, 4), "high": round(high, 4)}
