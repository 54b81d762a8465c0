"""From a finding to the remedy that fits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.findings import Action, Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies.clip import clip, limit_from
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.reinit import activations_around, reinitialise

REMEDIES = ("clip", "reinit")
"""The remedies there are, for `allow`."""


class Mitigation:
    """Applies remedies to a run, in the run.

    Exploding gradients are clipped from then on, in place, before the optimizer uses them. Vanishing gradients get
    their layers drawn anew, as long as the run has learnt nothing yet, with the optimizer's state of them removed.

    Args:
        allow: remedies that may be used, out of `REMEDIES`.
        max_actions: actions in a run at most.
    """

    def __init__(self, allow: Sequence[str], max_actions: int) -> None:
        self._allow = tuple(allow)
        self._max_actions = max_actions
        self._taken = 0
        self.max_norm: float | None = None

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients of an optimizer, once clipping has been decided."""
        if self.max_norm is not None:
            clip([p for group in optimizer.param_groups for p in group["params"]], self.max_norm)

    def act(
        self, opened: Sequence[Finding], history: History, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> list[Action]:
        """Treats the findings that were just opened.

        Args:
            opened: new findings; only alarms are treated.
            history: what was measured.
            model: whose layers may be drawn anew.
            optimizers: whose state of these layers is removed.

        Returns:
            What was done.
        """
        actions = []
        for finding in opened:
            if not finding.severity.is_alarm or self._taken >= self._max_actions:
                continue
            action = None
            if finding.kind is FindingKind.EXPLODING_GRADIENT and "clip" in self._allow and self.max_norm is None:
                action = self._start_clipping(finding, history)
            # new weights do not help where the number format is the cause
            elif (
                finding.kind is FindingKind.VANISHING_GRADIENT
                and finding.cause != "underflow"
                and "reinit" in self._allow
            ):
                action = self._reinit(finding, history, model, optimizers)
            if action is not None:
                self._taken += 1
                actions.append(action)
        return actions

    def _start_clipping(self, finding: Finding, history: History) -> Action:
        self.max_norm = limit_from(history)
        norms = history.scalar("grad_norm_total")
        return Action(
            step=finding.step,
            kind="clip",
            reason=f"{finding.kind} ({finding.cause}): gradient norm clipped to {self.max_norm:.3g}",
            before={"grad_norm_total": float(norms[-1])},
            after={"max_norm": self.max_norm},
        )

    def _reinit(
        self, finding: Finding, history: History, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Action | None:
        if has_learnt(history):
            return None
        around = activations_around(history.points)
        modules = dict(model.named_modules())
        tied = _tied(modules.values())
        generator = torch.Generator().manual_seed(finding.step)
        changed: list[nn.Parameter] = []
        layers = []
        for name in around:  # in order of execution, so that a seed gives the same weights in every run
            if name in finding.layers and name in modules and not tied & set(modules[name].parameters(recurse=False)):
                fresh = reinitialise(modules[name], *around[name], generator)
                if fresh:
                    layers.append(name)
                    changed += fresh
        if not layers:
            return None
        forget(optimizers, changed)
        return Action(
            step=finding.step,
            kind="reinit",
            layers=tuple(layers),
            reason=f"{finding.kind} ({finding.cause}): {len(layers)} layers drawn anew for the activations around them",
            before={name: value for name, value in finding.evidence.items() if name == "span"},
        )

    def state_dict(self) -> dict[str, Any]:
        """What was decided so far."""
        return {"max_norm": self.max_norm, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self.max_norm, self._taken = state["max_norm"], state["taken"]


def _tied(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Parameters that several modules share: what is right for one is wrong for the other, so they stay."""
    owners = Counter(p for module in modules for p in module.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1}
