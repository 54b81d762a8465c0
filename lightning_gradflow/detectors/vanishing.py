"""Does the gradient die on its way to the first layers?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.decay import (
    LASTING_DECAY,
    MAX_DECAY,
    Decay,
    cause_of,
    decay_of,
    is_evened_out,
    recent_decay,
)
from lightning_gradflow.detectors.known import skipped_rows
from lightning_gradflow.detectors.onset import loss_rose
from lightning_gradflow.detectors.profile import is_same_pass, recent_profiles
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.saddle import saddle_of
from lightning_gradflow.detectors.small_gains import small_gains
from lightning_gradflow.detectors.smothered import best_share, is_smothered
from lightning_gradflow.detectors.underflow import MIN_HEADROOM, Underflow, recent_underflow, underflow_of
from lightning_gradflow.detectors.update_sizes import medians_of
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_BOUNDED_DECAY = 6.0  # decades: what is left of usual gradients is then below Adam's eps of 1e-8
_PATIENCE = 50  # steps: of the runs that heal most do so in fewer
_FEW_LOST = 0.25  # of the layers: with fewer lost, most networks learn as they do in fp32
_LARGE_STEP = 0.1  # share of the weights that one step changes: ten times what is usual at the start
_MANY_LOST = 0.5  # of the layers: what has lost so many for 50 steps, and learnt nothing, hardly ever recovers


@dataclass(frozen=True)
class VanishingGradient:
    """Finds a signal that shrinks exponentially with depth, whatever the size of the loss.

    The span of the depth profile (see `DepthProfile`) must be at or below `-max_decay` decades in the last two samples,
    or in the first: what is so at initialisation is said at once, a single odd batch later on is not enough. A section
    of the network that loses twice as much is one too, though a normalisation before it makes the norms grow again, and
    so is one layer with next to no weights before which nothing gets a thousandth of what is behind it.

    How bad it is depends on the optimizer. Where it moves the layers that get little about as fast as the others
    (`update_ratio` within a factor of 20, as with Adam while its eps is far below the gradients), they learn all the
    same, or heal within their first hundred steps: up to `critical_decay` that is an info, which becomes a warning
    when 4 decades or more have lasted 50 steps and nothing was learnt, or when the signal had come through before and
    the loss has risen since. Bounded activations do not heal, since no weight makes their slope larger: there 6 decades
    are a warning at once. Where the updates are as small as the gradients, as with plain SGD, it is a warning at once.
    A run that has learnt gets an info, and a warning from `critical_decay` on: what it has learnt is in the last
    layers.

    Less than `max_decay` is enough where a run had time to learn and stands still, and what its inputs differ by is
    lost on the way forward as the gradient is on the way back, so that no layer has both (see `is_smothered`).

    Norm layers all of whose gains were drawn around 0, as weights are, are one too, where no planned step makes up for
    it (see `small_gains`).

    The cause is where the loss of signal happens: in the activations (bounded ones: `saturation`; rectifiers:
    `dead_units`) or in the weights (`weight_scale` where a layer and its activation lose more than weights of the right
    scale would, else `depth`: each layer loses a little, there are just too many of them). Where the first sample did
    not lose half of `max_decay`, and a step since changed the median layer by a tenth of it or more, it is such steps
    which made them what they are (`learning_rate_too_large`); what bounded activations lose they lose either way.

    A short span is a finding too where the number format ends before the network does (`underflow`): in fp16 without a
    gradient scaler whatever is below 6e-8 becomes zero. It is so where the bits run out on the way to the first layers,
    and not where a weight of zeros, dead units or an unused branch stop the gradient, which happens at once. If the
    decay, carried on to the first layer, reaches 4 decades, then a wider format would not help, and the cause is the
    ordinary one. It is an info until it has lasted 50 steps and nothing was learnt, then a warning where a quarter of
    the layers get nothing, and critical where half do: no optimizer can scale a zero. Where the delta goes from a few
    bits to zero in one step, a layer of zeros could be the reason as well as pooling, and nothing is said before. Where
    everything is zero from the loss on, in fp16 and with a loss that is not zero, it is critical in the second sample.

    Args:
        max_decay: decades that the signal may lose from the last to the first layer, in (0, 100). Plain stacks that
            lose more than the default of 3 decades do not learn with SGD in their first hundred steps.
        critical_decay: decades from which it is critical whatever the optimizer, in [max_decay, 100). By default 8:
            what is left is then below the resolution of float32 beside the last layer.
        min_headroom: bits between the rms of a delta and the smallest number of its format, in (-20, 20), below which
            it counts as lost. By default -3: fewer than one entry in 64 is left then. Networks in fp16 still learn
            with all their layers at 0 bits, and with the first one at -2.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Hochreiter 1991; Bengio et al. 1994; Glorot and Bengio 2010; Schoenholz et al. 2017; Micikevicius et al. 2018.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(5)])
        >>> history.append(Row(step=0, values={"delta_norm": np.array([1e-8, 1e-6, 1e-4, 1e-2, 1.0])}))
        >>> [(f.severity.value, f.cause, f.layers) for f in VanishingGradient(max_decay=4).judge(history)]
        [('critical', 'weight_scale', ('fc0', 'fc1', 'fc2'))]
    """

    max_decay: float = MAX_DECAY
    critical_decay: float = 8.0
    min_headroom: float = MIN_HEADROOM

    def __post_init__(self) -> None:
        check_range("max_decay", self.max_decay, 0, 100)
        check_range("critical_decay", self.critical_decay, self.max_decay, 100, open_low=False)
        check_range("min_headroom", self.min_headroom, -20, 20)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        profiles = recent_profiles(history, 1)
        if not profiles or profiles[0].step != history.rows[-1].step:
            return []
        underflow = recent_underflow(history, self.min_headroom)
        decay = recent_decay(history, self.max_decay, self.min_headroom)
        if decay is not None and (underflow is None or decay.span <= -max(self.max_decay, LASTING_DECAY)):
            return [self._of_decay(history, decay, underflow)]
        if underflow is None:
            return self._of_saddle(history) or self._of_smothered(history) or small_gains(history)
        finding = self._of_underflow(history, underflow)
        return [finding] if underflow.is_sure or finding.severity.is_alarm else []

    def _of_decay(self, history: History, decay: Decay, underflow: Underflow | None) -> Finding:
        cause = cause_of(decay)
        if cause != "saturation" and self._was_overwritten(history, decay):
            cause = "learning_rate_too_large"
        severities = [self._severity_of_decay(history, decay, cause)]
        if underflow is not None:
            severities.append(self._severity_of_underflow(history, underflow))
        return Finding(
            kind=FindingKind.VANISHING_GRADIENT,
            severity=max(severities, key=lambda severity: severity.rank),
            step=decay.profile.step,
            layers=decay.layers,
            cause=cause,
            evidence=decay.evidence,
        )

    def _was_overwritten(self, history: History, decay: Decay) -> bool:
        """Whether the signal came through at first, and a step since was far too large for the weights."""
        medians = medians_of(history)
        if history.scalar("optimizers")[-1] > 1 or not (medians[:-1] >= _LARGE_STEP).any():
            return False
        first = underflow_of(history, 0, self.min_headroom)
        if first is None or not is_same_pass(first.profile, decay.profile):
            return False
        return decay_of(first, self.max_decay / 2) is None

    def _of_saddle(self, history: History) -> list[Finding]:
        saddle = saddle_of(history, self.max_decay)
        if saddle is None or not saddle.wait >= _PATIENCE or has_learnt(history):
            return []
        evidence = {"span": saddle.span, "points": float(saddle.points), "wait_steps": saddle.wait}
        return [
            Finding(
                kind=FindingKind.VANISHING_GRADIENT,
                severity=Severity.WARNING,
                step=history.rows[-1].step,
                layers=saddle.layers,
                cause="weight_scale",
                evidence=evidence | {"weight_gain": saddle.backward},
            )
        ]

    def _of_smothered(self, history: History) -> list[Finding]:
        """A decay that is short, of what the inputs differ by as well as of the gradient."""
        newest = underflow_of(history, -1, self.min_headroom)
        if newest is None or not newest.span < 0 or not is_smothered(history):
            return []
        profile = newest.profile
        decay = Decay(profile, 0, len(profile.points), newest.span, newest.where)
        return [
            Finding(
                kind=FindingKind.VANISHING_GRADIENT,
                severity=Severity.WARNING,
                step=profile.step,
                layers=decay.layers or profile.modules(profile.usable)[:-1],
                cause=cause_of(decay),
                evidence={**decay.evidence, "best_share": best_share(history, len(history) - 1)},
            )
        ]

    def _of_underflow(self, history: History, underflow: Underflow) -> Finding:
        measured = ~np.isnan(underflow.profile.headroom)
        return Finding(
            kind=FindingKind.VANISHING_GRADIENT,
            severity=self._severity_of_underflow(history, underflow),
            step=history.rows[-1].step,
            layers=underflow.profile.modules(underflow.where),
            cause="underflow",
            evidence={
                "lost_share": float(underflow.where[measured].mean()),
                "points": float(measured.sum()),
                **({"headroom": underflow.headroom} if np.isfinite(underflow.headroom) else {}),
            },
        )

    def _severity_of_decay(self, history: History, decay: Decay, cause: str) -> Severity:
        is_critical = decay.span <= -self.critical_decay
        if has_learnt(history):
            return Severity.WARNING if is_critical else Severity.INFO
        if is_critical:
            return Severity.CRITICAL
        if not is_evened_out(history, decay.layers) or is_smothered(history):
            return Severity.WARNING
        if decay.span <= -_BOUNDED_DECAY and cause == "saturation":
            return Severity.WARNING
        if self._came_with_loss(history):
            return Severity.WARNING
        limit = max(self.max_decay, LASTING_DECAY)
        lasts = self._lasts(history, lambda one: decay_of(one, limit) is not None)
        return Severity.WARNING if lasts else Severity.INFO

    def _came_with_loss(self, history: History) -> bool:
        """Whether the signal came through before, and the loss has risen since."""
        newest = underflow_of(history, -1, self.min_headroom)
        if newest is None or history.scalar("optimizers")[-1] > 1:  # losses that play against each other
            return False
        for row in range(len(history) - 2, -1, -1):
            if not self._carried(history, row):
                continue
            one = underflow_of(history, row, self.min_headroom)
            if one is not None and is_same_pass(one.profile, newest.profile):
                return loss_rose(history, row)
        return False

    def _carried(self, history: History, row: int) -> bool:
        """Whether the signal came through in a row; remembered of all rows, since a decay may be as old as the run."""

        def find() -> bool:
            one = underflow_of(history, row, self.min_headroom)
            return one is not None and decay_of(one, self.max_decay) is None

        kind = ("carried", self.max_decay, self.min_headroom)
        return history.facts.of_row(kind, history.rows[row].step, find, len(history))

    def _severity_of_underflow(self, history: History, underflow: Underflow) -> Severity:
        if underflow.share < _FEW_LOST or has_learnt(history):
            return Severity.INFO
        before = underflow_of(history, -2, self.min_headroom) if len(history) > 1 else None
        if before is not None and before.headroom == underflow.headroom == -math.inf:
            return Severity.CRITICAL  # no step can change a weight
        # a sample in which everything is zero tells nothing
        if not self._lasts(history, lambda one: bool(one.where.any()) or math.isnan(one.headroom)):
            return Severity.INFO
        return Severity.CRITICAL if underflow.share >= _MANY_LOST else Severity.WARNING

    def _lasts(self, history: History, is_so: Callable[[Underflow], bool]) -> bool:
        """Whether it was so in every sample of the last 50 steps, and the run is that old."""
        last = history.rows[-1].step
        rows = np.flatnonzero((history.steps >= last - _PATIENCE) & ~skipped_rows(history))
        # the sample before them says that it was there when they began, where none was taken at that very step
        found = [underflow_of(history, i, self.min_headroom) for i in range(max(0, int(rows[0]) - 1), len(history))]
        seen = [one for one in found if one is not None and found[-1] and is_same_pass(one.profile, found[-1].profile)]
        return seen[0].profile.step <= last - _PATIENCE and all(is_so(one) for one in seen)


def vanished_before(
    history: History, row: int, max_decay: float = MAX_DECAY, min_headroom: float = MIN_HEADROOM
) -> bool:
    """Whether an earlier row lost half of what is lost now, or of `max_decay` if more: its weights are no better."""
    then, now = underflow_of(history, row, min_headroom), underflow_of(history, -1, min_headroom)
    if then is None or now is None or not is_same_pass(then.profile, now.profile):
        return False
    return decay_of(then, max(max_decay, -now.span) / 2) is not None


def is_vanishing(history: History, max_decay: float = MAX_DECAY, min_headroom: float = MIN_HEADROOM) -> bool:
    """Whether the signal does not reach the first layers: it decays on its way, or its number format ends.

    It decays if it lost `max_decay` decades or more in the last two samples that have it, or in the only one; four at
    least where the optimizer moves the layers that get little as fast as the others.
    """
    decay = recent_decay(history, max_decay, min_headroom)
    if decay is not None and (decay.span <= -LASTING_DECAY or not is_evened_out(history, decay.layers)):
        return True
    return recent_underflow(history, min_headroom) is not None
