"""Are there units that give the same flat output whatever comes in?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_CUT_SAMPLES = 3  # at the edge of death a unit fires in one batch and not in the next
_PATIENCE = 50  # steps: units that are dead at the start often come to life as the layers around them learn


@dataclass(frozen=True)
class DeadUnits:
    """Finds activations in which most units are on the flat side for every sample of several batches.

    Judged by unit, not by entry: a ReLU layer with 80 % zeros, each unit firing now and then, is sparse and well. It is
    an alarm where it stops the training: where nothing gets past the dead units on the way back to the first layers, or
    where 50 steps have passed and nothing was learnt. Else it is info: side branches and wide layers may do without.

    Args:
        max_dead: share of dead units above which an activation is an alarm, in (0, 1]. The default of 0.9 leaves wide
            layers alone that train with the rest of their units.
        noted_dead: share from which it is told as info, in (0, max_dead]. By default half of the units.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Lu et al. 2019, Dying ReLU and initialization: theory and numerical examples.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1"), Point("fc1/relu", "fc1", "relu")])
        >>> sick = {"dead_fraction": np.array([np.nan, 1.0]), "delta_norm": np.array([0.0, 0.3])}
        >>> history.append(Row(step=4, values=sick))
        >>> [(f.severity.value, f.layers) for f in DeadUnits().judge(history)]
        [('warning', ('fc1',))]
    """

    max_dead: float = 0.9
    noted_dead: float = 0.5

    def __post_init__(self) -> None:
        check_range("max_dead", self.max_dead, 0, 1, open_high=False)
        check_range("noted_dead", self.noted_dead, 0, self.max_dead, open_high=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        table = history["dead_fraction"]
        if not table.size:
            return []
        dead = np.nan_to_num(table[-1])
        worst = float(dead.max())
        if worst < self.noted_dead:
            return []
        alarm = worst >= self.max_dead and (_cuts(history, dead >= self.max_dead) or _stands(history))
        limit = self.max_dead if worst >= self.max_dead else self.noted_dead
        over = [int(i) for i in np.argsort(-dead, kind="stable") if dead[i] >= limit]
        measured = table[~np.isnan(table[:, over[0]]), over[0]]
        later = "learning_rate_too_large" if alarm else "unknown"
        return [
            Finding(
                kind=FindingKind.DEAD_UNITS,
                severity=Severity.WARNING if alarm else Severity.INFO,
                step=history.rows[-1].step,
                layers=tuple(dict.fromkeys(history.points[i].module for i in over)),
                cause="initialisation" if measured[0] >= limit else later,
                evidence={"dead_fraction": worst, "activations": float(len(over))},
            )
        ]


def mostly_dead(history: History, max_dead: float = 0.9) -> bool:
    """Whether the last sample that tells has an activation with so many dead units."""
    table = history["dead_fraction"]
    known = [row for row in table if not np.isnan(row).all()] if table.size else []
    return bool(known) and bool(np.nanmax(known[-1]) >= max_dead)


def _cuts(history: History, dead: npt.NDArray[np.bool_]) -> bool:
    """Whether in each recent sample no gradient got past one of the activations `dead` (P,): exact zeros before it."""
    deltas = history["delta_norm"][-_CUT_SAMPLES:]
    zero_before = np.array([[_nothing_but_zeros(row[:i]) for i in range(len(row))] for row in deltas], dtype=bool)
    return bool((dead & (zero_before & (np.nan_to_num(deltas) > 0)).all(axis=0)).any())


def _nothing_but_zeros(deltas: Floats) -> bool:
    known = deltas[~np.isnan(deltas)]
    return known.size > 0 and not known.any()


def _stands(history: History) -> bool:
    """Whether there was time to learn, and nothing was learnt."""
    return history.rows[-1].step >= _PATIENCE and not has_learnt(history)
