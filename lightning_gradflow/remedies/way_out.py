"""A rehearsed network, and the weights through which units have an effect on it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.remedies.forward_pass import Pass, Push, Units, look
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.unit_weights import PER_CHANNEL, Edit, Sides

SAME = 1e-3
"""Of the rms: what single precision, and a bias that takes over, leave of a difference."""

_MAX_CONSUMERS = 4
_NO_NUMBER = 1e30  # stands for infinity in a mean over ranks


class Stage:
    """Looks at a rehearsed network. What is decided by is averaged over the ranks, so that all decide the same.

    Args:
        training: the run.
        module: the module that is rehearsed.
        run: makes one forward pass of it.
    """

    def __init__(self, training: Training, module: nn.Module, run: Callable[[], None]) -> None:
        self._training = training
        self._run = run
        self._device = next(module.parameters()).device
        self.layers = LayerMap(module)
        self.sides = Sides(training)

    def look(self, push: Push | None = None) -> Pass:
        """What one forward pass shows."""
        with torch.enable_grad():
            return look(self.layers, self._run, push)

    def averaged(self, values: Tensor) -> Tensor:
        """The mean over the ranks."""
        return self._training.averaged(values.to(self._device))

    def any_rank(self, flags: Tensor) -> Tensor:
        """Whether it is so on any rank."""
        return self.averaged(flags.float()) > 0

    def cut(self, edit: Edit, now: Pass, units: Units, chosen: Tensor) -> bool:
        """Sets the outgoing weights to 0; whether nothing depends on the units then."""
        push = Push(units.point, chosen, self._training.seed)
        for cuts in range(_MAX_CONSUMERS + 1):
            pushed = self.look(push)
            changes = self.changes(now, pushed, units.feeder) > SAME
            if not changes.any():
                return cuts > 0
            layer = self._watched(now, units.feeder)[int(changes.nonzero()[0])]
            if not layer or not self._cut_layer(edit, layer, now, pushed):
                return False
        return False

    def _cut_layer(self, edit: Edit, layer: str, now: Pass, pushed: Pass) -> bool:
        """Sets those weights of a layer to 0 whose input changed; whether that can be done."""
        side = self.sides.outgoing(layer)
        calls = now.inputs.get(layer, []), pushed.inputs.get(layer, [])
        if side is None or [old.shape for old in calls[0]] != [new.shape for new in calls[1]]:
            return False
        old, new = (torch.cat([x.float().movedim(side.on, -1).flatten(0, -2) for x in inputs]) for inputs in calls)
        size = old.square().mean().sqrt()
        fed = self.any_rank(((new - old).abs() > SAME * size).any(0))
        given = self.averaged(old.mean(0))
        # what a dead unit gives is the same for all samples: else something else comes in by the same way
        varies = self.any_rank(((old - given).abs() > SAME * size).any(0))
        if not fed.any() or (varies & fed).any():
            return False
        weight = edit.units(side.weight, side.axis, fed)
        if given[fed].any():
            if not side.bias:
                return False
            outgoing = weight[fed].float().flatten(1) if weight.dim() == 2 else weight[fed].float().flatten(2).sum(-1)
            bias = edit.whole(side.bias)
            bias += (given[fed] @ outgoing).to(bias)
        weight[fed] = 0.0
        return True

    def _watched(self, seen: Pass, but: str) -> list[str]:
        """The layers whose output is to stay, in order of execution, and "" for the loss. Norms pass a unit on."""
        layers = [name for name in seen.outputs if not isinstance(self.layers.module(name), PER_CHANNEL)]
        return [*(name for name in layers if name != but), ""]

    def changes(self, before: Pass, after: Pass, but: str) -> Tensor:
        """How much each of those changed, on the rank where it did most, or nearly so."""
        changes = before.change(after)
        values = torch.stack([changes[name] for name in self._watched(before, but)])
        return self.averaged(values.clamp(max=_NO_NUMBER))

    def loss_change(self, before: Pass, after: Pass) -> float:
        """Of the loss, relative to what it was; the last number that was computed with a graph is taken for it."""
        if not before.numbers or len(before.numbers) != len(after.numbers):
            return math.nan
        old, new = before.numbers[-1].float(), after.numbers[-1].float()
        old, new = self.averaged(torch.stack([old, new])).tolist()
        return (new - old) / abs(old) if math.isfinite(new) and old else math.inf
