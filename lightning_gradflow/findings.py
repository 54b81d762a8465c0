"""What the detectors say, and the ledger that turns repeated statements into intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class FindingKind(str, Enum):
    """What is wrong. A string: `FindingKind.LOSS_PLATEAU == "loss_plateau"`."""

    VANISHING_GRADIENT = "vanishing_gradient"
    EXPLODING_GRADIENT = "exploding_gradient"
    NONFINITE_GRADIENT = "nonfinite_gradient"
    DEAD_UNITS = "dead_units"
    SATURATED_ACTIVATION = "saturated_activation"
    LOSS_PLATEAU = "loss_plateau"
    LOSS_MISMATCH = "loss_mismatch"
    MIXED_SAMPLES = "mixed_samples"
    NO_GRADIENT = "no_gradient"
    UPDATE_RATIO = "update_ratio"

    __str__ = str.__str__


class Severity(str, Enum):
    """How bad it is. `info` never raises a Python warning; `warning` and `critical` are alarms."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    __str__ = str.__str__

    @property
    def rank(self) -> int:
        """0 for info, 1 for warning, 2 for critical."""
        return ("info", "warning", "critical").index(self.value)

    @property
    def is_alarm(self) -> bool:
        """Whether people are warned."""
        return self is not Severity.INFO


class GradFlowWarning(UserWarning):
    """Base of all warnings of this package; raised as it is when a part of the monitor is switched off."""


class VanishingGradientWarning(GradFlowWarning):
    """The gradient dies on its way to the first layers."""


class ExplodingGradientWarning(GradFlowWarning):
    """The gradient grows on its way to the first layers, or against the run's own past."""


class NonfiniteGradientWarning(GradFlowWarning):
    """NaN or infinity in the gradients or in the forward pass."""


class DeadUnitsWarning(GradFlowWarning):
    """Units that give the same flat output for every sample."""


class SaturatedActivationWarning(GradFlowWarning):
    """A hidden activation works at its bounds and blocks the gradient."""


class LossPlateauWarning(GradFlowWarning):
    """The loss does not fall although the run has hardly begun to learn."""


class LossMismatchWarning(GradFlowWarning):
    """The loss function gets something that it is not made for."""


class MixedSamplesWarning(GradFlowWarning):
    """A layer takes the samples of a batch for the time steps of a sequence."""


class NoGradientWarning(GradFlowWarning):
    """Parameters that the optimizer holds never get a gradient."""


class UpdateRatioWarning(GradFlowWarning):
    """Updates are out of proportion to the weights."""


WARNINGS: dict[FindingKind, type[GradFlowWarning]] = {
    FindingKind.VANISHING_GRADIENT: VanishingGradientWarning,
    FindingKind.EXPLODING_GRADIENT: ExplodingGradientWarning,
    FindingKind.NONFINITE_GRADIENT: NonfiniteGradientWarning,
    FindingKind.DEAD_UNITS: DeadUnitsWarning,
    FindingKind.SATURATED_ACTIVATION: SaturatedActivationWarning,
    FindingKind.LOSS_PLATEAU: LossPlateauWarning,
    FindingKind.LOSS_MISMATCH: LossMismatchWarning,
    FindingKind.MIXED_SAMPLES: MixedSamplesWarning,
    FindingKind.NO_GRADIENT: NoGradientWarning,
    FindingKind.UPDATE_RATIO: UpdateRatioWarning,
}
"""The Python warning category of each kind of finding."""


@dataclass(frozen=True)
class Suggestion:
    """One thing to change.

    Args:
        title: what to do, in a line.
        code: Python to write, with the user's own layer names; may be empty.
        reason: why it helps.
        reference: the source, such as a paper.
    """

    title: str
    code: str
    reason: str
    reference: str


@dataclass(frozen=True)
class Finding:
    """Something found to be wrong, from the step at which it was opened until it was resolved.

    Args:
        kind: what is wrong.
        severity: how bad it is.
        step: the optimizer step at which it was first seen.
        layers: module names as in `named_modules()`, worst first.
        cause: one word of a fixed vocabulary, such as `saturation` or `weight_scale`.
        message: the finding in a sentence or two.
        evidence: the numbers behind it.
        suggestions: what to change, best first. Not part of equality: they depend on the mitigator, not on the run.
        resolved_step: the step at which it was seen to be over, or None while it lasts.

    Example:
        >>> finding = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, step=400)
        >>> str(finding.kind), finding.is_open
        ('loss_plateau', True)
    """

    kind: FindingKind
    severity: Severity
    step: int
    layers: tuple[str, ...] = ()
    cause: str = "unknown"
    message: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)
    suggestions: tuple[Suggestion, ...] = field(default=(), compare=False)
    resolved_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether it still lasts."""
        return self.resolved_step is None

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain strings, numbers and lists; `from_dict` takes it back."""
        return {
            "kind": self.kind.value,
            "severity": self.severity.value,
            "step": self.step,
            "layers": list(self.layers),
            "cause": self.cause,
            "message": self.message,
            "evidence": dict(self.evidence),
            "suggestions": [[s.title, s.code, s.reason, s.reference] for s in self.suggestions],
            "resolved_step": self.resolved_step,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Finding:
        """The finding that `to_dict` described."""
        return cls(
            **{
                **state,
                "kind": FindingKind(state["kind"]),
                "severity": Severity(state["severity"]),
                "layers": tuple(state["layers"]),
                "suggestions": tuple(Suggestion(*s) for s in state["suggestions"]),
            }
        )


@dataclass(frozen=True)
class Action:
    """Something the mitigator did to the run: first on trial, then kept or taken back.

    Args:
        step: the optimizer step after which it was done.
        kind: the remedy, such as `clip` or `reinit`.
        layers: the module names it touched; empty for all.
        reason: why, in a few words, such as `vanishing gradient, saturation`.
        before: numbers from before the action, such as `{"span": -8.1, "loss": 2.3}`.
        after: the same numbers from after it, as far as they are known yet; `loss` is that of the end of the trial.
        outcome: `applied` while the trial lasts, then `kept` or `rolled_back`.
        decided_step: the optimizer step at which the trial ended, or None while it lasts.

    Example:
        >>> action = Action(1, "reinit", ("fc1",), "vanishing gradient, depth", {"span": -8.1}, {"span": -0.3})
        >>> action.is_open, replace(action, outcome="kept", decided_step=25).is_open
        (True, False)
    """

    step: int
    kind: str
    layers: tuple[str, ...] = ()
    reason: str = ""
    before: Mapping[str, float] = field(default_factory=dict, hash=False)
    after: Mapping[str, float] = field(default_factory=dict, hash=False)
    outcome: str = "applied"
    decided_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still on trial."""
        return self.outcome == "applied"

    def to_dict(self) -> dict[str, Any]:
        """The action as plain strings, numbers and lists; `from_dict` takes it back."""
        return {
            "step": self.step,
            "kind": self.kind,
            "layers": list(self.layers),
            "reason": self.reason,
            "before": dict(self.before),
            "after": dict(self.after),
            "outcome": self.outcome,
            "decided_step": self.decided_step,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Action:
        """The action that `to_dict` described."""
        return cls(**{**state, "layers": tuple(state["layers"])})


class Ledger:
    """Turns what detectors say at every sample into intervals: opened, ongoing, resolved.

    A kind has at most one open finding. It is opened once, stays open while detectors repeat it, and is closed and
    opened anew when it becomes more severe. After `patience` samples without it, or with nothing as severe, it is
    resolved.

    Args:
        patience: samples in a row without the finding before it counts as resolved, in [1, inf). The default of 3
            keeps a finding that flickers around its limit from being told again and again.

    Raises:
        ValueError: if `patience` is below 1.

    Example:
        >>> ledger = Ledger(patience=1)
        >>> plateau = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, step=400)
        >>> [len(ledger.update(step, found)) for step, found in [(400, [plateau]), (450, [plateau]), (500, [])]]
        [1, 0, 0]
        >>> ledger.findings[0].resolved_step
        500
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience must be in [1, inf), got {patience!r}")
        self._patience = patience
        self._findings: list[Finding] = []
        self._open: dict[FindingKind, int] = {}
        self._missed: dict[FindingKind, int] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that was ever opened, in order."""
        return tuple(self._findings)

    @property
    def open(self) -> tuple[Finding, ...]:
        """What still lasts, in order of opening."""
        return tuple(f for f in self._findings if f.is_open)

    def is_news(self, finding: Finding) -> bool:
        """Whether `update` would open this finding: of a kind that is not open, or more severe than the open one."""
        index = self._open.get(finding.kind)
        return index is None or finding.severity.rank > self._findings[index].severity.rank

    def update(
        self,
        step: int,
        found: Iterable[Finding],
        is_sample: bool = True,
        was_seen: Callable[[Finding], bool] = lambda _: True,
    ) -> list[Finding]:
        """Takes what was found at `step` and returns what was opened by it.

        Args:
            step: the optimizer step of the sample.
            found: what the detectors said; of several findings of a kind the most severe counts.
            is_sample: whether everything was measured, so that what was not found is not there.
            was_seen: whether the sample shows anything of the layers of a finding; if not, it stays as it is.

        Returns:
            The findings that were opened, most severe first.
        """
        worst: dict[FindingKind, Finding] = {}
        for finding in found:
            if finding.kind not in worst or finding.severity.rank > worst[finding.kind].severity.rank:
                worst[finding.kind] = finding
        opened = [finding for finding in worst.values() if self.is_news(finding)]
        for finding in opened:
            if finding.kind in self._open:
                self._resolve(finding.kind, step)
            self._open[finding.kind] = len(self._findings)
            self._findings.append(finding)
        for kind in tuple(self._open):
            if kind not in worst and not (is_sample and was_seen(self._findings[self._open[kind]])):
                continue
            repeated = kind in worst and worst[kind].severity.rank >= self._findings[self._open[kind]].severity.rank
            self._missed[kind] = 0 if repeated else self._missed.get(kind, 0) + 1
            if self._missed[kind] >= self._patience:
                self._resolve(kind, step)
        return sorted(opened, key=lambda f: -f.severity.rank)

    def amend(self, change: Callable[[Suggestion], Suggestion]) -> None:
        """Changes the suggestions of all findings, now that more is known."""
        self._findings = [
            replace(finding, suggestions=tuple(map(change, finding.suggestions))) for finding in self._findings
        ]

    def _resolve(self, kind: FindingKind, step: int) -> None:
        index = self._open.pop(kind)
        self._findings[index] = replace(self._findings[index], resolved_step=step)
        self._missed.pop(kind, None)

    def state_dict(self) -> dict[str, Any]:
        """The ledger as lists, strings and numbers."""
        return {
            "findings": [finding.to_dict() for finding in self._findings],
            "missed": {kind.value: count for kind, count in self._missed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._findings = [Finding.from_dict(item) for item in state["findings"]]
        self._open = {finding.kind: i for i, finding in enumerate(self._findings) if finding.is_open}
        self._missed = {FindingKind(kind): count for kind, count in state["missed"].items()}
