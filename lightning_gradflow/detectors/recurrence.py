"""Does the gradient die, or grow out of proportion, on its way back through time?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.profile import in_order, is_skipped
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.time_profile import LONGEST, TimeProfile, time_profiles
from lightning_gradflow.detectors.trend import mann_kendall
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point

_PATIENCE = 100  # steps: a default LSTM or GRU over 64 steps heals in fewer, at learning rates from 5e-4 on
_SHARE = 0.2  # of the planned steps: who plans a long run goes slowly, and can wait
_SOONER = 1 / 3  # of the patience, where nothing heals
_STILL_LOST = 0.75  # of the decades: default LSTMs and GRUs get half of them back in ten steps
_SHORT_PATIENCE = 32  # steps, where two thirds of the gradient are lost at each time step
_SHORT_MEMORY = 1.0  # steps; a default RNN has 1.8, a default LSTM and GRU 2.2
_BOUNDED_DECAY = 6.0  # decades: what is left of usual gradients is then below Adam's eps of 1e-8
_FALLING = -2.0  # z score of the loss from which on the run is left alone
_MOVED = 0.3  # of its norm, by the layer that moves fastest: Adam at 1e-3 takes 50 to 100 steps for it
_SHORT_MOVED = 0.15
_MAX_BLOCKS = 200  # of the losses: a trend test looks at all pairs

Spans = list[tuple[int, float]]
"""Step and decades that the gradient gains, row by row."""


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

    Of stacked layers, which torch runs as one module, it compares what comes to the biases of the first with what comes
    to those of the last: `max_decay` decades lost between them are judged in the same way. An optimizer that evens the
    updates out, as Adam does, moves the first layers all the same, and such a stack comes to life after a while; there
    less than 6 decades stay an info.

    A gradient that explodes is a warning at once; where the gradients are clipped, when it has lasted as long and the
    loss does not fall. Clipping bounds the steps, not the state: where no activation bounds that either, as with ReLU,
    it has grown with the gradient, to more than 10 ** (max_growth / 2) times the inputs, and it is a warning at once
    as well. A run that has learnt gets an info.

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
        points = [point for point in history.points if point.name in called] if called else []
        newest = {point: time_profiles(history, point, 2) for point in points}
        newest = {point: found for point, found in newest.items() if found and found[-1][0] == history.rows[-1].step}
        dying = {
            point: time_profiles(history, point)
            for point, found in newest.items()
            if all(one.span <= -self.max_decay for _, one in found)
        }
        growing = {
            point: time_profiles(history, point)
            for point, found in newest.items()
            if all(one.span >= self.max_growth for _, one in found)
        }
        findings = []
        if dying:
            short = any(all(one.memory <= _SHORT_MEMORY for _, one in found) for found in dying.values())
            severity = self._severity_of_decay(history, _spans(dying), short=short)
            findings.append(_finding(history, FindingKind.VANISHING_GRADIENT, severity, dying))
        elif stacks := self._dying_stacks(history):
            findings.append(
                Finding(
                    kind=FindingKind.VANISHING_GRADIENT,
                    severity=self._severity_of_stacks(history, stacks.values()),
                    step=history.rows[-1].step,
                    layers=tuple(stacks),
                    cause="recurrence",
                    evidence={"stack_gain": 10 ** min(spans[-1][1] for spans in stacks.values())},
                )
            )
        if growing:
            severity = self._severity_of_growth(history, growing)
            findings.append(_finding(history, FindingKind.EXPLODING_GRADIENT, severity, growing))
        return findings

    def _dying_stacks(self, history: History) -> dict[str, Spans]:
        """Stacked recurrences in which as much is lost from the last layer to the first, and how much in each row."""
        if "stack_gain" not in history.rows[-1].values:
            return {}
        with np.errstate(divide="ignore"):
            decades = np.log10(history["stack_gain"])
        counts = np.array([not is_skipped(row) for row in history.rows])
        found = {}
        for i in np.flatnonzero(decades[-1] <= -self.max_decay):
            known = counts & ~np.isnan(decades[:, i])
            if (decades[known, i][-2:] <= -self.max_decay).all():
                found[history.layers[i]] = list(
                    zip(history.steps[known].tolist(), decades[known, i].tolist(), strict=True)
                )
        return found

    def _severity_of_stacks(self, history: History, dying: Collection[Spans]) -> Severity:
        if history.scalar("normalised_updates")[-1] > 0 and not any(spans[-1][1] <= -_BOUNDED_DECAY for spans in dying):
            return Severity.INFO
        return self._severity_of_decay(history, dying)

    def _severity_of_decay(self, history: History, dying: Collection[Spans], *, short: bool = False) -> Severity:
        patience = _SHORT_PATIENCE if short else _patience(history)
        lasts = any(
            self._lasts(found, _SOONER * patience if self._heals_slowly(found) and not short else patience)
            for found in dying
        )
        had_its_chance = lasts and _moved(history) >= (_SHORT_MOVED if short else _MOVED)
        stuck = had_its_chance and not has_learnt(history) and not _falls(history)
        return Severity.WARNING if stuck else Severity.INFO

    def _severity_of_growth(self, history: History, growing: dict[Point, list[tuple[int, TimeProfile]]]) -> Severity:
        if has_learnt(history):
            return Severity.INFO
        if not history.scalar("clip_factor")[-1] < 1 or self._state_grows(history, growing):
            return Severity.WARNING
        lasts = any(self._lasts(spans, _patience(history)) for spans in _spans(growing))
        return Severity.WARNING if lasts and not _falls(history) else Severity.INFO

    def _state_grows(self, history: History, growing: dict[Point, list[tuple[int, TimeProfile]]]) -> bool:
        """Whether the state grows with the gradient, by half of the decades against the inputs: no bounds hold it."""
        row = history.rows[-1]
        if any(point.op in BOUNDED for point in history.points if point.name in row.calls):
            return False
        inputs = row.values.get("input_rms", np.empty(0))
        inputs = inputs[np.isfinite(inputs)]
        scale = max(1.0, math.sqrt(np.square(inputs).mean())) if inputs.size else 1.0
        sizes = in_order(row.values.get("output_rms", np.empty(0)), history.point_axis.order)
        return any(sizes[history.points.index(point)] > 10 ** (self.max_growth / 2) * scale for point in growing)

    def _heals_slowly(self, found: Spans) -> bool:
        """Whether most of what was lost at first still is: what heals by itself does most of it in the first steps."""
        first, last = -found[0][1], -found[-1][1]
        return first >= self.max_decay and last >= _STILL_LOST * first

    def _lasts(self, found: Spans, patience: float) -> bool:
        """Whether the signal was lost in every sample of the last `patience` steps, and the run is that old.

        A chaotic recurrence makes it explode in one batch, and vanish in the next where its units saturate.
        """
        last = found[-1][0]
        before = [i for i, (step, _) in enumerate(found) if step <= last - patience]
        spans = [span for _, span in found[before[-1] :]] if before else []
        return bool(spans) and all(span <= -self.max_decay or span >= self.max_growth for span in spans)


def _spans(found: Mapping[Point, list[tuple[int, TimeProfile]]]) -> list[Spans]:
    return [[(step, one.span) for step, one in profiles] for profiles in found.values()]


def _patience(history: History) -> float:
    planned = float(history.scalar("planned_steps")[-1])
    return _PATIENCE if math.isnan(planned) else min(max(_PATIENCE, _SHARE * planned), LONGEST)


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
