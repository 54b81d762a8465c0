"""What a published rule and a finding have in common: at some step it is told that something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Alarm:
    """A rule that starts to hold, or a finding that is opened.

    Args:
        step: when it is told, from 0.
        kinds: what it says is wrong; empty where it only says that something is.
        layers: the modules it names, worst first.
        cause: the cause it names.
    """

    step: int
    kinds: frozenset[str]
    layers: tuple[str, ...] = ()
    cause: str = ""

    def says(self, kinds: frozenset[str]) -> bool:
        """Whether what it says is among the kinds that are right."""
        return not self.kinds or bool(self.kinds & kinds)


def openings(holds: Bools, kinds: frozenset[str], names: Iterable[str] = (), *, held: int = 1) -> list[Alarm]:
    """An alarm at each step at which a rule starts to hold anywhere.

    Args:
        holds: (S,) or (S, N) by step, and by tensor or activation.
        kinds: what it says is wrong.
        names: the N columns; an alarm names those in which the rule holds.
        held: checks in a row at which it must hold in the same column.
    """
    columns = np.atleast_2d(holds.T).T
    lasting = columns.copy()
    for lag in range(1, held):
        lasting[lag:] &= columns[:-lag]
        lasting[:lag] = False
    anywhere: Bools = np.asarray(lasting.any(axis=1))
    starts = np.flatnonzero(anywhere & ~np.append(False, anywhere[:-1]))
    named = tuple(names)
    return [Alarm(int(s), kinds, tuple(named[i] for i in np.flatnonzero(lasting[s])) if named else ()) for s in starts]
