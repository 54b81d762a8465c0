"""Does the gradient die, or grow out of proportion, on its way back through time?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.profile import in_order, is_skipped
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.trend import mann_kendall, theil_sen
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History, Point, Row

_MIN_STEPS = 8  # what is called fewer times is rather a shared layer than a recurrence
_MIN_USABLE = 4  # norms that are above zero: a steep decay leaves no more before it underflows
_PATIENCE = 100  # steps: a default LSTM or GRU over 64 steps heals in fewer, at learning rates from 5e-4 on
_MAX_PATIENCE = 500
_SHARE = 0.2  # of the planned steps: who plans a long run goes slowly, and can wait
_SOONER = 1 / 3  # of the patience, where nothing heals
_STILL_LOST = 0.75  # of the decades: default LSTMs and GRUs get half of them back in ten steps
_SHORT_PATIENCE = 32  # steps, where two thirds of the gradient are lost at each time step
_SHORT_MEMORY = 1.0  # steps; a default RNN has 1.8, a default LSTM and GRU 2.2
_FALLING = -2.0  # z score of the loss from which on the run is left alone
_MOVED = 0.3  # of its norm, by the layer that moves fastest: Adam at 1e-3 takes 50 to 100 steps for it
_SHORT_MOVED = 0.15
_MAX_BLOCKS = 200  # of the losses: a trend test looks at all pairs


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
        ("time profile", point), source.step, lambda: _time_profile(history, point, source), 2 * _MAX_PATIENCE
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


@dataclass(frozen=True)
class RecurrentGradient:
    r"""Finds a recurrence whose gradient dies or explodes on its way back through time, however deep the network is.

    It looks at the gradient at the input of each `nn.RNN`, `nn.LSTM` and `nn.GRU` by time step, and at each layer that
    is called eight times or more in a forward pass, which is a cell in a loop. With the factor per step
    :math:`\gamma` over T steps it says

        vanishing   if  T steps lose `max_decay` decades, by the decay and by the first step against the last
        exploding   if  they gain `max_growth` decades

    in the last two samples, or in the first. The size of the loss does not matter. Networks with a loss at every step,
    or with attention over the outputs, have no decay, whatever their weights are.

    A decay alone is no fault. Default LSTMs and GRUs begin with it and heal, mostly within 100 steps; and where what
    counts stands at the end of the sequence, nothing has to come further. So it is an info at first. It becomes a
    warning when it has lasted 100 steps (of a run that is planned for more than 500, a fifth of it, at most 500), the
    fastest layer has moved by 0.3 of its norm in all, nothing was learnt and the loss does not fall. Where three
    quarters of the decades are still lost, a third of these steps will do; where the memory is one step or less, which
    none has in its usual initialisation, 32 steps and half of the way.

    A gradient that explodes is a warning at once; where the gradients are clipped, when it has lasted as long and the
    loss does not fall. A run that has learnt gets an info.

    Args:
        max_decay: decades that may be lost from the last to the first step, in (0, 100). By default 4, as with depth:
            a network that has learnt to look at the first steps loses less than 2.
        max_growth: decades that may be gained, in (0, 100). By default 3: healthy networks gain up to 2.5, and that
            only when they have learnt.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Bengio et al. 1994, Learning long-term dependencies with gradient descent is difficult; Pascanu et al. 2013, On
        the difficulty of training recurrent neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_points([Point("rnn", "rnn")])
        >>> for step in (0, 50, 100):
        ...     history.append(Row(step, calls={"rnn": 0.5 ** np.arange(20.0)[::-1]}, losses=np.full(50, 2.3)))
        >>> [(f.severity.value, f.cause, f.layers) for f in RecurrentGradient().judge(history)]
        [('warning', 'recurrence', ('rnn',))]
    """

    max_decay: float = 4.0
    max_growth: float = 3.0

    def __post_init__(self) -> None:
        check_range("max_decay", self.max_decay, 0, 100)
        check_range("max_growth", self.max_growth, 0, 100)

    def judge(self, history: History) -> list[Finding]:
        """The findings of the newest row: at most one that vanishes and one that explodes."""
        if not history.rows or is_skipped(history.rows[-1]):
            return []
        called = history.rows[-1].calls
        newest = (
            {point: _profiles(history, point, 2) for point in history.points if point.name in called} if called else {}
        )
        newest = {point: found for point, found in newest.items() if found and found[-1][0] == history.rows[-1].step}
        dying = {
            point: _profiles(history, point)
            for point, found in newest.items()
            if all(one.span <= -self.max_decay for _, one in found)
        }
        growing = {
            point: _profiles(history, point)
            for point, found in newest.items()
            if all(one.span >= self.max_growth for _, one in found)
        }
        findings = []
        if dying:
            severity = self._severity_of_decay(history, dying)
            findings.append(_finding(history, FindingKind.VANISHING_GRADIENT, severity, dying))
        if growing:
            severity = self._severity_of_growth(history, growing)
            findings.append(_finding(history, FindingKind.EXPLODING_GRADIENT, severity, growing))
        return findings

    def _severity_of_decay(self, history: History, dying: dict[Point, list[tuple[int, TimeProfile]]]) -> Severity:
        short = any(all(one.memory <= _SHORT_MEMORY for _, one in found) for found in dying.values())
        patience = _SHORT_PATIENCE if short else _patience(history)
        lasts = any(
            self._lasts(found, _SOONER * patience if self._heals_slowly(found) and not short else patience)
            for found in dying.values()
        )
        had_its_chance = lasts and _moved(history) >= (_SHORT_MOVED if short else _MOVED)
        stuck = had_its_chance and not has_learnt(history) and not _falls(history)
        return Severity.WARNING if stuck else Severity.INFO

    def _severity_of_growth(self, history: History, growing: dict[Point, list[tuple[int, TimeProfile]]]) -> Severity:
        if has_learnt(history):
            return Severity.INFO
        if not history.scalar("clip_factor")[-1] < 1:
            return Severity.WARNING
        lasts = any(self._lasts(found, _patience(history)) for found in growing.values())
        return Severity.WARNING if lasts and not _falls(history) else Severity.INFO

    def _heals_slowly(self, found: list[tuple[int, TimeProfile]]) -> bool:
        """Whether most of what was lost at first still is: what heals by itself does most of it in the first steps."""
        first, last = -found[0][1].span, -found[-1][1].span
        return first >= self.max_decay and last >= _STILL_LOST * first

    def _lasts(self, found: list[tuple[int, TimeProfile]], patience: float) -> bool:
        """Whether the signal was lost in every sample of the last `patience` steps, and the run is that old.

        A chaotic recurrence makes it explode in one batch, and vanish in the next where its units saturate.
        """
        last = found[-1][0]
        before = [i for i, (step, _) in enumerate(found) if step <= last - patience]
        spans = [one.span for _, one in found[before[-1] :]] if before else []
        return bool(spans) and all(span <= -self.max_decay or span >= self.max_growth for span in spans)


def _patience(history: History) -> float:
    planned = float(history.scalar("planned_steps")[-1])
    return _PATIENCE if math.isnan(planned) else min(max(_PATIENCE, _SHARE * planned), _MAX_PATIENCE)


def _profiles(history: History, point: Point, count: int | None = None) -> list[tuple[int, TimeProfile]]:
    """Step and time profile of the newest `count` rows that have one, or of all that the longest patience asks for."""
    found: list[tuple[int, TimeProfile]] = []
    rows = history.rows
    for i in range(len(rows) - 1, -1, -1):
        if len(found) == count or (found and found[-1][0] <= found[0][0] - _MAX_PATIENCE):
            break
        if point.name in rows[i].calls and not is_skipped(rows[i]):
            profile = time_profile(history, point, i)
            if profile is not None:
                found.append((rows[i].step, profile))
    return found[::-1]


def _falls(history: History) -> bool:
    """Whether the loss still falls: the trend of its newer two thirds, for the first steps only settle the bias."""
    losses = history.losses
    losses = losses[np.isfinite(losses)][len(losses) // 3 :]
    if len(losses) < 2:
        return False
    blocks = np.array_split(losses, min(_MAX_BLOCKS, len(losses)))
    return mann_kendall(np.array([block.mean() for block in blocks])) <= _FALLING


def _moved(history: History) -> float:
    """What the updates of the layer that moves fastest add up to, in norms of its weights; inf where it is not known.

    It is the clock of the run: in a hundred steps at a tiny learning rate nothing can have healed.
    """
    ratios = history["update_ratio"]
    known = ratios[:, np.isfinite(ratios).any(axis=0)]
    if not known.size:
        return math.inf
    pace = np.nanmedian(np.where(np.isfinite(known), known, np.nan), axis=0)
    return float(pace.max()) * (history.rows[-1].step + 1)


def _finding(
    history: History, kind: FindingKind, severity: Severity, found: dict[Point, list[tuple[int, TimeProfile]]]
) -> Finding:
    newest = {point: profiles[-1][1] for point, profiles in found.items()}
    ranked = sorted(newest, key=lambda point: -abs(newest[point].span))
    # beside a recurrence the layers that are called once a step only get what it lets through
    radius = _of_layers(history, "recurrent_radius")
    recurrent = [point for point in ranked if point.module in radius]
    layers = recurrent or [point for point in ranked if point.is_layer] or ranked
    worst = newest[layers[0]]
    evidence = {
        "time_decay": worst.decay,
        "memory_steps": worst.memory,
        "reach": worst.reach,
        "time_steps": float(worst.steps),
    }
    for metric in ("spectral_norm", "recurrent_radius", "hh_to_ih"):
        values = _of_layers(history, metric)
        if layers[0].module in values:
            evidence[metric] = values[layers[0].module]
    # near 0 the hidden state has collapsed: it is the same for every sample
    spread = in_order(history.rows[-1].values.get("output_spread", np.empty(0)), history.point_axis.order)
    evidence["output_spread"] = float(spread[history.points.index(layers[0])])
    return Finding(
        kind=kind,
        severity=severity,
        step=history.rows[-1].step,
        layers=tuple(dict.fromkeys(point.module for point in layers)),
        cause="recurrence",
        evidence={name: value for name, value in evidence.items() if math.isfinite(value)},
    )


def _of_layers(history: History, metric: str) -> dict[str, float]:
    """Layer -> value of a metric in the newest row."""
    column = history.rows[-1].values.get(metric, np.empty(0))
    values = in_order(column, history.layer_axis.order)
    return {layer: float(x) for layer, x in zip(history.layers, values, strict=True) if not math.isnan(x)}
