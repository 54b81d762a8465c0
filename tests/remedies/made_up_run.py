"""A run that is made up: losses and findings as a test says them, and a small net that remedies act on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.findings import Action, Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.plan import REMEDIES
from lightning_gradflow.remedies.training import Rehearsal, Training
from lightning_gradflow.remedies.trial import Mitigation

PLANNED = 200
"""Steps of the whole run: a trial lasts a tenth of them."""


def net() -> nn.Sequential:
    """Two layers of sigmoids and a head, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))


def finding(
    kind: FindingKind = FindingKind.VANISHING_GRADIENT, cause: str = "saturation", severity: Severity = Severity.WARNING
) -> Finding:
    """An alarm about the two layers before a sigmoid."""
    return Finding(kind, severity, 0, ("0", "2"), cause)


class Run:
    """Lets time go by, and does at each sample what the callback does.

    Args:
        allow: as for `Mitigation`.
        model: instead of the small net.
        rehearse: what remedies may rehearse with.
        scale: what all losses are multiplied by.
        planned: steps of the whole run.
        **kwargs: for `Mitigation`.
    """

    def __init__(
        self,
        allow: Any = REMEDIES,
        model: nn.Module | None = None,
        rehearse: Rehearsal | None = None,
        scale: float = 1.0,
        planned: float = PLANNED,
        **kwargs: Any,
    ) -> None:
        self.net = net() if model is None else model
        self.optimizer = torch.optim.SGD([*self.net.parameters(), nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
        self.history = History()
        self.history.add_points([Point(str(i), str(i), "sigmoid" if i % 2 else "") for i in range(5)])
        self.training = Training(self.net, [self.optimizer], self.history, rehearse)
        self.mitigation = Mitigation(allow, **{"max_actions": 3, **kwargs})
        self.mitigation.start(self.training)
        self.step = -1
        self._scale = scale
        self._planned = planned

    def go(
        self,
        loss: float,
        *found: Finding,
        steps: int = 4,
        progress: float = math.nan,
        ratio: float = 0.0,
        decades: float = math.nan,
        residual: float = 1.0,
        dead: float = math.nan,
    ) -> Any:
        """So many steps with this loss, then a sample in which something is found.

        Args:
            loss: of each of the steps.
            *found: what is wrong.
            steps: how many.
            progress: share of the run that is done.
            ratio: size of the updates, if it is known.
            decades: that the gradient loses from the last layer to the first, if it was measured.
            residual: norm of the gradient at the output, where that is so.
            dead: share of the units, if it was measured.

        Returns:
            The action that was taken or decided about, or None.
        """
        self.step += steps
        self.history.layer_axis.merge(["0"])
        values = {"update_ratio": np.array([ratio])} if ratio else {}
        if not math.isnan(decades):
            values["delta_norm"] = residual * np.logspace(-decades, 0, 5)
        if not math.isnan(dead):
            values["dead_fraction"] = np.array([math.nan, dead, math.nan, 0.0, math.nan])
        scalars = {"planned_steps": float(self._planned), "grad_norm_total": 2.0}
        self.history.append(Row(self.step, values, scalars, losses=np.full(steps, loss * self._scale)))
        self.mitigation.keep_good(found, self.training)
        decision = self.mitigation.decide(found, self.history, progress)
        return self.mitigation.carry_out(decision, self.training) if decision is not None else None

    def learns(self, rows: int = 12) -> None:
        """The loss falls from 2 to 0.2, and all is well."""
        for loss in np.linspace(2.0, 0.2, rows):
            assert self.go(loss) is None

    def train(self) -> None:
        """A step of the optimizer, which changes weights and makes it remember something."""
        self.net(torch.ones(1, 4)).sum().backward()
        self.mitigation.before_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Tensor:
        """All of them, in a row."""
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    @property
    def actions(self) -> list[tuple[str, str]]:
        """What was done, and what has come of it."""
        return [(action.kind, action.outcome) for action in self.mitigation.actions]

    @property
    def newest(self) -> Action:
        """The last action."""
        return self.mitigation.actions[-1]

    @property
    def held(self) -> Any:
        """The remedies in force."""
        assert self.mitigation._held is not None
        return self.mitigation._held
