"""The gradient along time: how much of it is left after each step into the past."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.profile import is_skipped
from lightning_gradflow.detectors.trend import theil_sen
from lightning_gradflow.history import Floats, History, Point, Row

LONGEST = 500
"""Steps for which a decay is waited for, at most, and profiles are asked for again."""

_MIN_STEPS = 8  # what is called fewer times is rather a shared layer than a recurrence
_MIN_USABLE = 4  # norms that are above zero: a steep decay leaves no more before it underflows


@dataclass(frozen=True)
class TimeProfile:
    """The gradient along the time axis of one point in one row.

    Args:
        point: where it was measured.
        steps: time steps T of the recurrence; of a bidirectional one those to the nearer end.
        decay: factor by which the gradient is multiplied on its way one step into the past.
        reach: log10 of the gradient at the first step over that at the last; the decay carried on where it is zero.
    """

    point: Point
    steps: int
    decay: float
    reach: float

    @property
    def span(self) -> float:
        """Decades that the signal gains on its way to the first step, the smaller of two measures in size.

        The decay carried over all steps, or the reach: a flat end, or a single odd step, makes no decay.
        """
        carried = math.log10(self.decay) * (self.steps - 1)
        if carried * self.reach <= 0:
            return 0.0
        return math.copysign(min(abs(carried), abs(self.reach)), carried)

    @property
    def memory(self) -> float:
        """Steps after which 1/e of the gradient is left, or e times as much is there."""
        return math.inf if self.decay == 1 else 1 / abs(math.log(self.decay))


def time_profile(history: History, point: Point, row: int = -1) -> TimeProfile | None:
    """The time profile of a point in a row; None where it ran fewer than 8 times, or the gradient is nowhere usable.

    With r_t the gradient norm at time step t of T: decay = exp(-slope of ln r_t), by Theil and Sen.

    Args:
        history: where to read.
        point: an RNN, LSTM or GRU, or a layer that is called in a loop.
        row: index of the row, as for a list.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history, rnn = History(), Point("rnn", "rnn")
        >>> history.add_points([rnn])
        >>> history.append(Row(step=0, calls={"rnn": 0.5 ** np.arange(10.0)[::-1]}))
        >>> profile = time_profile(history, rnn)
        >>> round(profile.decay, 3), round(profile.reach, 3), round(profile.memory, 3)
        (0.5, -2.709, 1.443)
    """
    source = history.rows[row]
    # at every step, those of the longest patience are asked for at each row
    return history.facts.of_row(
        ("time profile", point), source.step, lambda: _time_profile(history, point, source), 2 * LONGEST
    )


def _time_profile(history: History, point: Point, source: Row) -> TimeProfile | None:
    norms: Floats = source.calls.get(point.name, np.empty(0))
    if len(norms) < _MIN_STEPS:
        return None
    calls = source.values.get("calls", np.empty(0))
    at = history.point_axis.identity(point.name)
    steps = int(calls[at]) if at < len(calls) and not math.isnan(calls[at]) else len(norms)
    time = np.rint(np.linspace(0, steps - 1, len(norms)))  # of a longer loop an even selection is kept
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < _MIN_USABLE:
        return None
    logs = np.log10(norms[usable])
    slope = theil_sen(time[usable], logs)
    # what underflowed has been on its way down: the line goes on there
    reach = float(logs[0] - logs[-1]) if norms[0] != 0 else float(logs[0] - logs[-1] - slope * time[usable][0])
    return TimeProfile(point, steps, 10.0**-slope, reach)


def time_profiles(history: History, point: Point, count: int | None = None) -> list[tuple[int, TimeProfile]]:
    """Step and time profile of the newest `count` rows that have one, or of all that the longest patience asks for."""
    found: list[tuple[int, TimeProfile]] = []
    rows = history.rows
    for i in range(len(rows) - 1, -1, -1):
        if len(found) == count or (found and found[-1][0] <= found[0][0] - LONGEST):
            break
        if point.name in rows[i].calls and not is_skipped(rows[i]):
            profile = time_profile(history, point, i)
            if profile is not None:
                found.append((rows[i].step, profile))
    return found[::-1]
