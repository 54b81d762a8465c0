"""Are the steps out of proportion to the weights: so small that nothing moves, or so large that nothing stays?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.decay import was_cut_off
from lightning_gradflow.detectors.inputs import feature_evidence, offending_features
from lightning_gradflow.detectors.known import first_values, how_often_known, is_always
from lightning_gradflow.detectors.overwritten import not_by_steps, overwritten, start_of_steps
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.small_steps import MIN_REACH, too_small
from lightning_gradflow.detectors.smothered import was_smothered
from lightning_gradflow.detectors.standstill import keeps_residual
from lightning_gradflow.detectors.update_sizes import finding_of, medians_of, ratios_of
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import Floats, History

_MIN_SAMPLES = 3  # the first step of momentum is a tenth of what is to come, the third a third
_WARM = 50  # steps that steps get before they are judged by what they left of the weights
_AT_ONCE = 2.0  # times max_ratio: what may be judged by the third loss
_WORSE = 3.0  # times the loss at the start: weights that were merely shaken do better within four steps
_FALLEN = 8  # steps after which those of Adagrad are judged: a third of the first is left by then
_NO_BETTER = 1.1  # times the loss at the start, when there was time to recover
_RECOVERED = 32  # steps in which nets with a large first step come back below their starting loss
_LARGE = 0.1  # share of the weights that one step changes: a hundred times what is usual
_USUAL_GAIN = 0.5  # largest singular value; most initialisations give 0.6 to 3
_OVERGROWN = 3.0  # times the norm of the first weights, in the median layer: a ninth of the square is left of them
_SHRUNK = 0.1  # times the same
_GAINED = 0.1  # of the very first loss: less is what outputs gain by becoming a constant
_LEFT = 0.5  # of the very first loss, where it stands since
_STANDS = 0.02  # of the loss, between the third and the last quarter of the run so far
_JUMP = 30.0  # times the run's own update ratio; a restarted schedule makes less of it
_RATE_JUMP = 3.0  # times the largest learning rate so far
_LOOK_BACK = 6  # samples in which a jump is looked for


@dataclass(frozen=True)
class UpdateRatio:
    """Finds steps that cannot get anywhere, and steps that overwrite the weights.

    update ratio of a layer = norm of the step / norm of the weights, from the optimizer's real step. Layers that start
    at zero are left out, for they have no scale. Neither rule depends on the size of the loss.

    Too small: reach = largest update ratio of all layers and samples * planned steps. It bounds how far any layer can
    move in the whole run. It is found from the third sample on if the reach is below `min_reach` and the gradient
    promises to lower the loss by less than 5 % in the planned steps (sum of step norm * gradient norm, over the loss).
    Runs of fewer than 50 planned steps are not judged. Under a schedule only after 50 steps, and not while the learning
    rate rises or is below a tenth of its maximum. A rate that never rose, and in the first half of the run was below a
    hundredth of its maximum for 32 steps, is judged by those steps.

    Too much weight decay: after 50 steps, weights that were of no unusually small size have a tenth of the norm they
    started with, in the median layer, and 90 % of the very first loss is left.

    Too large: the median of the layers was above `max_ratio` in some sample, and the loss is three times what it was at
    the start, or after 32 steps still above it. At the third loss twice `max_ratio` is asked for, and those of Adagrad
    are not judged in the first eight steps: they come to a usual size by themselves. Where a sample showed a tenth of
    it, growth by `max_ratio` in each step until the next sample counts as well: steps that feed on themselves are
    largest where nobody looks. A tenth of `max_ratio` is enough where, after 50 steps, the weights of the median layer
    have three times the norm they started with, which was no unusually small one, and 90 % of the very first loss is
    left: what the initialisation was made for is gone, and nothing has come of it. So it is where some layer could tell
    the samples apart in the first row and none can any more (see `best_share`), or where the gradient came through in
    the first row and loses four decades in the newest three: a collapse needs no growth where norms take the size out
    of the signal. Half of the loss is enough where a step was above `max_ratio` and the loss stands still since, and
    any loss where the gradient is exactly zero as well, or where that of a cross-entropy at the output is half of the
    first one or more (see `keeps_residual`). These four go by the layers with a matrix. Later on it
    is a jump to 30 times the run's own ratio, or of the learning rate, that makes the loss three times what it was.
    Large steps alone are no finding: many a network starts with one and learns. Weights that were changed by something
    else than steps are told apart (see `overwritten`). Not judged with several optimizers, whose losses play against
    each other.

    Args:
        min_reach: share of its norm that some layer must be able to move by in the planned run, in [0, 1). By default
            0.01: of 17 small networks with 4 optimizers each, none with less learnt more than 5 % of what the best
            learning rate did. Even a network in the lazy regime moves by about 0.01.
        max_ratio: share of their norm by which one step may change the weights of the median layer, in (0, inf). By
            default 1: then the step is as large as what it changes.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Chizat et al. 2019, On lazy training in differentiable programming; Karpathy, CS231n, Ratio of weights:updates.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> for step in range(3):
        ...     ratio = {"update_ratio": np.array([1e-7, 2e-7]), "weight_norm": np.ones(2)}
        ...     history.append(Row(step, ratio, {"lr": 1e-8, "planned_steps": 1000.0}))
        >>> [(f.cause, round(f.evidence["reach"], 6)) for f in UpdateRatio().judge(history)]
        [('learning_rate_too_small', 0.0002)]
    """

    min_reach: float = MIN_REACH
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_range("min_reach", self.min_reach, 0, 1, open_low=False)
        check_range("max_ratio", self.max_ratio, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        ratios = ratios_of(history)
        if not ratios.size or np.isnan(ratios[-1]).all():
            return []
        if how_often_known(history, "grad_norm").any() and is_always(history, "grad_norm", 0).all():
            return self._too_large(history, ratios)  # of no gradient at all no rate makes anything
        return too_small(history, ratios, self.min_reach) or self._too_large(history, ratios)

    def _too_large(self, history: History, ratios: Floats) -> list[Finding]:
        steps, losses = history.loss_steps, history.losses
        if history.scalar("optimizers")[-1] > 1 or len(losses) < _MIN_SAMPLES or not np.isfinite(losses[-1]):
            return []
        medians = medians_of(history)
        return (
            _decayed(history, losses)
            or self._from_the_start(history, ratios, _with_growth(history, medians, self.max_ratio), losses)
            or self._all_together(history, ratios, losses)
            or self._from_now_on(history, ratios, medians, steps, losses)
            or overwritten(history)
        )

    def _from_the_start(self, history: History, ratios: Floats, medians: Floats, losses: Floats) -> list[Finding]:
        step, start = history.rows[-1].step, abs(float(losses[0]))
        peak = int(np.nanargmax(medians))
        if medians[peak] < self.max_ratio or has_learnt(history):
            return []
        if step < _RECOVERED:
            # a linear model comes back from anywhere
            if (~np.isnan(ratios[peak])).sum() < 2 or (step < 4 and medians[peak] < _AT_ONCE * self.max_ratio):
                return []
            if step < _FALLEN and history.scalar("falling_updates")[-1] > 0:
                return []
            recent = losses[2:][-2:] if step < 8 else losses[-(step // 2) :]
            now, limit = float(recent.min() if step < 8 else np.median(recent)), _WORSE
        else:
            now, limit = float(np.median(losses[-(step // 2) :])), _NO_BETTER
        if not now >= limit * start:
            return []
        evidence = {"update_ratio": float(medians[peak]), "growth": now / start if start > 0 else math.inf, "loss": now}
        return [_too_large(history, -ratios[peak], evidence | _when(history, peak))]

    def _all_together(self, history: History, ratios: Floats, losses: Floats) -> list[Finding]:
        """Steps that have left next to nothing of the weights that the run started from, and led nowhere."""
        medians = _of_matrices(history)
        if history.steps[-1] < _WARM or np.isnan(medians).all() or np.nanmax(medians) < _LARGE * self.max_ratio:
            return []
        start = start_of_steps(history)
        medians, since = medians[start:], losses[history.loss_steps >= history.steps[start]]
        if history.steps[-1] - history.steps[start] < _WARM or np.isnan(medians).all():
            return []
        peak = int(np.nanargmax(medians))
        # not `has_learnt`: such steps raise the loss first, and what only comes down from there would count
        now, first = _present(history, losses), float(since[0])
        growth = _growth(history, start)
        known = growth[np.isfinite(ratios[start + peak]) & np.isfinite(growth)]
        if medians[peak] < _LARGE * self.max_ratio or not known.size:
            return []
        is_lost = np.median(known) >= _OVERGROWN or was_smothered(history, start) or was_cut_off(history, start)
        if not is_lost:
            return []
        is_stuck = medians[peak] >= self.max_ratio and _stands(since)
        is_stuck &= now >= first - _LEFT * abs(first) or _has_no_gradient(history)
        # of squares it would be half of the first deviation, which noise alone may leave
        is_stuck |= bool((history.scalar("score_classes") > 1).any()) and keeps_residual(history) and _stands(since)
        if not (now >= first - _GAINED * abs(first) or is_stuck):
            return []
        evidence = {"update_ratio": float(medians[peak]), "weight_growth": float(np.median(known)), "loss": now}
        return [_too_large(history, -ratios[start + peak], evidence | _when(history, start + peak))]

    def _from_now_on(
        self, history: History, ratios: Floats, medians: Floats, steps: Floats, losses: Floats
    ) -> list[Finding]:
        at, rates = history.steps, history.scalar("lr")
        if len(at) <= _LOOK_BACK:
            return []
        now = float(np.median(losses[steps > at[-2]])) if (steps > at[-2]).any() else math.nan
        for back in range(2, _LOOK_BACK):
            past, last = medians[:-back], medians[-back:]
            before = losses[steps <= at[-back - 1]][-_WARM:]
            if np.isnan(past).all() or np.isnan(last).all() or len(before) < _MIN_SAMPLES:
                continue
            usual, peak = float(np.nanmedian(past)), float(np.nanmax(last))
            jumps = peak >= self.max_ratio and peak >= _JUMP * usual
            jumps |= bool(rates[-back:].max() > _RATE_JUMP * rates[:-back].max())
            if jumps and now >= _WORSE * abs(float(np.median(before))):
                growth = now / max(abs(float(np.median(before))), 1e-300)
                evidence = {"update_ratio": peak, "growth": growth, "loss": now}
                row = ratios[len(ratios) - back + int(np.nanargmax(last))]
                return [_too_large(history, -row, evidence)]
        return []


def _decayed(history: History, losses: Floats) -> list[Finding]:
    """Weights that are all but gone, where next to nothing was learnt: no steps after the gradient make them so."""
    start = start_of_steps(history)
    since = losses[history.loss_steps >= history.steps[start]]
    if history.steps[-1] - history.steps[start] < _WARM or not since.size:
        return []
    growth, now, first = _growth(history, start), _present(history, losses), float(since[0])
    known = growth[np.isfinite(growth)]
    if not known.size or not np.median(known) <= _SHRUNK or not now >= first - _GAINED * abs(first):
        return []
    return [finding_of(history, "weight_decay", growth, {"weight_growth": float(np.median(known)), "loss": now})]


def _present(history: History, losses: Floats) -> float:
    """The median of the newest 50 losses."""
    return float(np.median(losses[history.loss_steps > history.steps[-1] - _WARM]))


def _growth(history: History, start: int) -> Floats:
    """(L,) weight norms relative to those of a row; NaN where these were small: to grow is the way out of that."""
    with np.errstate(all="ignore"):  # weights that started from zero have no growth
        growth = history["weight_norm"][-1] / history["weight_norm"][start]
    return np.where(history["spectral_norm"][start] >= _USUAL_GAIN, growth, np.nan)


def _of_matrices(history: History) -> Floats:
    """(R,) the median update ratio of layers with a matrix: steps of a size are small beside gains of 1."""
    matrices = np.isfinite(first_values(history, "spectral_norm"))
    return medians_of(history, matrices if matrices.any() else None)


def _with_growth(history: History, medians: Floats, max_ratio: float) -> Floats:
    """(R,) the median update ratio, or that by which the median layer grew in each step until the next sample.

    Steps that feed on themselves are largest where nobody looks. Weights that grow behind usual steps are another
    matter: somebody may have set them.
    """
    norms, steps = history["weight_norm"], history.steps
    with np.errstate(all="ignore"):
        grown = (norms[1:] / norms[:-1] - 1) / np.diff(steps)[:, None]
    grown[~np.isfinite(grown) | not_by_steps(norms, history["update_norm"], steps)] = np.nan
    is_known = ~np.isnan(grown).all(axis=1) & (medians[:-1] >= _LARGE * max_ratio)
    most = medians.copy()
    most[:-1][is_known] = np.fmax(medians[:-1][is_known], np.nanmedian(grown[is_known], axis=1))
    return most


def _stands(losses: Floats) -> bool:
    """Whether the loss has not fallen since the third quarter of some."""
    quarter = len(losses) // 4
    if quarter < _WARM // 2:
        return False
    before, now = float(np.median(losses[-2 * quarter : -quarter])), float(np.median(losses[-quarter:]))
    return before - now < _STANDS * abs(before)


def _has_no_gradient(history: History) -> bool:
    """Whether it is exactly zero everywhere: there is no way on from there."""
    norms = history["grad_norm"][-_MIN_SAMPLES:]
    known = norms[np.isfinite(norms)]
    return bool(known.size and not known.any())


def _when(history: History, row: int) -> dict[str, float]:
    """The step of a row that is not the newest."""
    return {} if row == len(history) - 1 else {"largest_step": float(history.steps[row])}


def overwrites(history: History, row: int, max_ratio: float = 1.0) -> bool:
    """Whether one of the three samples before a row changed the median layer by more than there was of it."""
    recent = medians_of(history)[max(0, row - _MIN_SAMPLES) : row]
    return bool((recent >= max_ratio).any())


def _too_large(history: History, badness: Floats, evidence: dict[str, float]) -> Finding:
    """Whoever feeds inputs of a size that the weights are not made for makes any step too large."""
    if offending_features(history):
        return finding_of(history, "unscaled_inputs", badness, evidence | feature_evidence(history))
    return finding_of(history, "learning_rate_too_large", badness, evidence)
