"""Are there units that give the same flat output whatever comes in?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.copied_units import copied_layers
from lightning_gradflow.detectors.inputs import feature_evidence, inputs_jumped, offending_features
from lightning_gradflow.detectors.known import columns_of_layers, newest_known
from lightning_gradflow.detectors.onset import has_moved, loss_rose, weight_growth
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, History, Ints

_CUT_SAMPLES = 3  # at the edge of death a unit fires in one batch and not in the next
_MAX_PASSED = 0.01  # of the gradient: a smooth rectifier passes a little on where it is flat
_EXACT = ("relu", "relu6")  # nothing at all passes where they are flat
_PATIENCE = 50  # steps: units that are dead at the start often come to life as the layers around them learn
_MIN_ALIVE = 0.4  # of the units fire in a layer that is well: half of them at a usual initialisation
_WINDOW = 3  # samples after a death until `dead_fraction` tells of it
_EARLY = 8  # steps: the loss is still that of the initialisation
_FADED = 0.5  # of its weight norm: no single step does that


@dataclass(frozen=True)
class DeadUnits:
    """Finds activations in which most units are on the flat side for every sample of several batches.

    Judged by unit, not by entry: a ReLU layer with 80 % zeros, each unit firing now and then, is sparse and well. It is
    an alarm where it stops the training:

    - where next to nothing (1 %) of the gradient gets past the dead units to any layer before them, in three samples;
    - where every unit of every activation was silent in three samples, and no gradient came around them;
    - where 50 steps have passed with it, and nothing was learnt;
    - where the layer was alive (40 % of its units fired) and died, and the loss rose with it. If that happened within
      three samples one is enough to tell: no batch silences a whole layer by chance. In the first 8 steps, where the
      loss is still that of the initialisation, it does not have to rise.

    Else it is info: side branches and wide layers may do without.

    As good as dead are all units but one of a hidden layer whose units are copies of one another, with the same weights
    and the same gradient: no step can make them differ (`symmetry`). That is critical, at once.

    The cause is `initialisation` where the first samples have it; else `learning_rate_too_large`, since it takes a
    large step, unless the weights before them have faded to half or were not seen to move (`unknown`: a strong weight
    decay, or somebody else changed them). Both become
    `unscaled_inputs` where the inputs are (see `offending_features`), in the first activation and the first 50 steps.

    Args:
        max_dead: share of dead units above which an activation is an alarm, in (0, 1]. The default of 0.9 leaves wide
            layers alone that train with the rest of their units.
        noted_dead: share from which it is told as info, in (0, max_dead]. By default half of the units.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Lu et al. 2019, Dying ReLU and initialization: theory and numerical examples; Goodfellow et al. 2016, Deep
        learning, section 8.4, on breaking the symmetry between units.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point("fc1", "fc1"), Point("fc1/relu", "fc1", "relu")])
        >>> sick = {"dead_fraction": np.array([np.nan, 1.0]), "delta_norm": np.array([0.0, 0.3])}
        >>> history.append(Row(step=2, values=sick))
        >>> [(f.severity.value, f.cause, f.layers) for f in DeadUnits().judge(history)]
        [('warning', 'initialisation', ('fc1',))]
    """

    max_dead: float = 0.9
    noted_dead: float = 0.5

    def __post_init__(self) -> None:
        check_range("max_dead", self.max_dead, 0, 1, open_high=False)
        check_range("noted_dead", self.noted_dead, 0, self.max_dead, open_high=False)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        return _copies(history) or self._dead(history)

    def _dead(self, history: History) -> list[Finding]:
        table, silent = history["dead_fraction"], history["silent_fraction"]
        if not table.size:
            return []
        dead = np.nan_to_num(table[-1])
        if len(history) > 1:  # who was alive a moment ago need not be silent for a whole window
            was_alive = (silent[-1 - _WINDOW : -1] <= 1 - _MIN_ALIVE).any(axis=0)
            dead = np.where(was_alive & (silent[-1] >= self.max_dead), silent[-1], dead)
        worst = float(dead.max())
        if worst < self.noted_dead:
            return []
        last = _last_alive(history)
        alive = {int(i): int(last[i]) if last[i] >= 0 else None for i in np.flatnonzero(dead >= self.max_dead)}
        stops = _cuts(history) | _nothing_lives(history)
        alarms = [
            i
            for i, row in alive.items()
            if self._is_alarm(history, bool(stops[i]), row) and not _still_trains(history, i)
        ]
        limit = self.max_dead if alive else self.noted_dead
        over = [int(i) for i in np.argsort(-dead, kind="stable") if dead[i] >= limit]
        first = alarms[0] if alarms else over[0]
        measured = table[~np.isnan(table[:, first]), first]
        is_born = alive.get(first) is None and (not measured.size or measured[0] >= limit)
        cause = "initialisation" if is_born else "unknown"
        if alarms:
            cause = _cause(history, min(alive), alive[first], cause)
        evidence = {"dead_fraction": worst, "activations": float(len(over))}
        return [
            Finding(
                kind=FindingKind.DEAD_UNITS,
                severity=Severity.WARNING if alarms else Severity.INFO,
                step=history.rows[-1].step,
                layers=tuple(dict.fromkeys(history.points[i].module for i in over)),
                cause=cause,
                evidence=evidence | (feature_evidence(history) if cause == "unscaled_inputs" else {}),
            )
        ]

    def _is_alarm(self, history: History, stops: bool, alive: int | None) -> bool:
        """Whether a dead activation stops the training.

        Args:
            history: where to read.
            stops: whether it is seen to let nothing through.
            alive: the last row in which it was not dead.
        """
        step = history.rows[-1].step
        if alive is not None and loss_rose(history, alive):
            return True
        if alive is not None and history.steps[alive] < _EARLY and step < _PATIENCE:
            return True
        return not has_learnt(history) and (step >= _PATIENCE or stops)


def _still_trains(history: History, at: int) -> bool:
    """Whether the layer before a smooth rectifier gets a gradient like the others.

    What is all but flat is no dead end where the loss is steep: the variance of a Gaussian is small because it was
    learnt, and a softplus that gives it stands where it has to.
    """
    newest = newest_known(history, "grad_norm")
    if history.points[at].op in _EXACT or newest is None or not has_learnt(history):
        return False
    column = columns_of_layers(history)
    before = [int(column[i]) for i in range(at) if column[i] >= 0]
    known = newest[np.isfinite(newest)]
    return bool(before and known.size and newest[before[-1]] > _MAX_PASSED * np.median(known))


def _copies(history: History) -> list[Finding]:
    layers = copied_layers(history) if history.rows else ()
    if not layers:
        return []
    return [
        Finding(
            kind=FindingKind.DEAD_UNITS,
            severity=Severity.CRITICAL,
            step=history.rows[-1].step,
            layers=layers,
            cause="symmetry",
            evidence={"copied_layers": float(len(layers))},
        )
    ]


def mostly_dead(history: History, max_dead: float = 0.9) -> bool:
    """Whether the last sample that tells has an activation with so many dead units."""
    newest = newest_known(history, "dead_fraction")
    return newest is not None and bool(np.nanmax(newest) >= max_dead)


def _last_alive(history: History) -> Ints:
    """(P,) the last row in which enough units of an activation fired; -1 if there was none."""
    dead, silent = history["dead_fraction"], history["silent_fraction"]

    def find(start: int) -> Ints:
        # of a few inputs alone nothing can be said: there the window has to tell
        fired = np.where(np.isnan(silent[start:]), dead[start:], silent[start:]) <= 1 - _MIN_ALIVE
        return np.where(fired.any(axis=0), len(dead) - 1 - np.argmax(fired[::-1], axis=0), -1)

    return history.facts.so_far("last alive", len(dead), find, np.maximum)


def _cuts(history: History) -> Bools:
    """(P,) whether in each recent sample next to no gradient got past an activation to any layer before it."""
    deltas = history["delta_norm"][-_CUT_SAMPLES:]
    passed = np.full_like(deltas, np.nan)  # NaN where nothing was measured before
    passed[:, 1:] = np.fmax.accumulate(deltas, axis=1)[:, :-1]
    return np.asarray(((deltas > 0) & (passed <= _MAX_PASSED * deltas)).all(axis=0))


def _nothing_lives(history: History) -> Bools:
    """(P,) the activations, if in each recent sample every unit of all was silent, and no gradient came around them."""
    dead = history["dead_fraction"][-1]
    silent = history["silent_fraction"][-_CUT_SAMPLES:]
    known = ~np.isnan(dead)
    if len(silent) < _CUT_SAMPLES or not (dead[known] == 1).all():
        return np.zeros_like(known)
    deltas = history["delta_norm"][-_CUT_SAMPLES:]
    if known.any() and deltas.size:
        before = np.nan_to_num(deltas[:, : int(np.argmax(known))]).max(axis=1, initial=0.0)
        behind = np.nan_to_num(deltas[:, int(np.argmax(known)) :]).max(axis=1, initial=0.0)
        if (before > _MAX_PASSED * behind).all():  # a residual connection
            return np.zeros_like(known)
    return np.asarray(known & bool((np.nan_to_num(silent[:, known], nan=1.0) == 1).all()))


def _cause(history: History, at: int, alive: int | None, cause: str) -> str:
    is_first = not any(point.op for point in history.points[:at])
    in_time = is_first if alive is None else history.steps[alive] < _PATIENCE or inputs_jumped(history)
    if in_time and offending_features(history):
        return "unscaled_inputs"
    if alive is None:
        return cause
    if weight_growth(history, at, alive) < _FADED or not has_moved(history, at, alive):
        return "unknown"
    return "learning_rate_too_large"
