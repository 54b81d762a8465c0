"""What a remedy is applied to, and what it has done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lightning_gradflow.findings import Finding
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.training import Training


@dataclass(frozen=True)
class Treatment:
    """What a remedy has done.

    Args:
        layers: that it changed; empty for all.
        before: numbers from before.
        after: the same from after it.
        note: what else it did.
    """

    layers: tuple[str, ...] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Patient:
    """What a remedy is applied to.

    Args:
        training: the run, between two optimizer steps; where it broke, with its last good weights.
        finding: what is to be cured.
        held: the remedies in force.
        has_past: whether the run had learnt something before.
        good_step: the step of its last good weights; -1 for those that it started from.
        allow: remedies that may be used, out of `plan.REMEDIES`, where one needs another.
    """

    training: Training
    finding: Finding
    held: Held
    has_past: bool
    good_step: int = -1
    allow: Collection[str] = ()
