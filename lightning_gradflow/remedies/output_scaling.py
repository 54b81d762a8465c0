"""The scale of the targets, folded into the layer that gives the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class TargetScale:
    """Where the targets of a layer's outputs lie, and what its loss makes of their size.

    Args:
        layer: its name.
        mean: (K,) of the targets of each output.
        deviation: root mean square of what is around it, over all of them.
        power: 2 where the loss is made of squares, 1 where it is made of absolute values.
    """

    layer: str
    mean: Tensor
    deviation: float
    power: int


class OutputScaling:
    """Lets a network train as if the targets were standardised, and leaves targets and loss alone.

    With targets `m + s t` an output layer `W = s V`, `b = s c + m` gives what a network with V and c gives for t. How
    it trains is not repaired by that: a squared error of raw targets is s^2 times as large, and steps whose size is
    given, such as Adam's, are s times too small for W. So each optimizer step is made in V and c, with gradients of the
    loss over s^2 (over s where it is made of absolute values):

        V = W / s,    c = (b - m) / s,    dV = s dW / s^p,    dc = s db / s^p,    all others / s^p

    and taken back after it. Clipping, momentum, second moments and weight decay act as they would on standardised
    targets. Between steps the weights are those for the raw ones, so that the loss, validation, checkpoints and
    predictions are in their unit.

    Weights are in those coordinates from `before_step` until the optimizer's step is over.

    Example:
        >>> scaling, layer = OutputScaling(), nn.Linear(1, 1)
        >>> scaling.start(nn.Sequential(layer), TargetScale("0", torch.tensor([5.0]), 8.0, 2))
        >>> _ = layer.weight.data.fill_(16.0)
        >>> layer.weight.grad, layer.bias.grad = torch.full((1, 1), 8.0), torch.zeros(1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> scaling.before_step(optimizer)
        >>> layer.weight.item(), layer.weight.grad.item()
        (2.0, 1.0)
        >>> _ = optimizer.step()
        >>> layer.weight.item()
        8.0
    """

    def __init__(self) -> None:
        self._scale: TargetScale | None = None
        self._own: tuple[nn.Parameter, nn.Parameter] | None = None
        self._entered: torch.optim.Optimizer | None = None
        self._hooked: list[tuple[torch.optim.Optimizer, RemovableHandle]] = []

    @property
    def layer(self) -> str | None:
        """The layer that is treated; None where there is none."""
        return self._scale.layer if self._scale is not None else None

    def start(self, model: nn.Module, scale: TargetScale) -> None:
        """Trains so from now on; the weights are those for the raw targets already."""
        self._scale = scale
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Finds its layer in a model: once after `load_state_dict`, when the model has its final modules."""
        self.batch_end()
        if self._scale is not None:
            layer = model.get_submodule(self._scale.layer)
            assert isinstance(layer.weight, nn.Parameter)
            assert isinstance(layer.bias, nn.Parameter)
            self._own = layer.weight, layer.bias

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings weights and gradients of this optimizer to those of standardised targets.

        To be called with complete gradients, before they are clipped. Nothing is copied to the host.
        """
        if self._scale is None or self._own is None or self._entered is not None:
            return
        if all(optimizer is not known for known, _ in self._hooked):
            self._hooked.append((optimizer, optimizer.register_step_post_hook(self._after_step)))
        deviation, power = self._scale.deviation, self._scale.power
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None]
        dense = [gradient for gradient in gradients if not gradient.is_sparse]
        if dense:
            torch._foreach_mul_(dense, deviation**-power)
        for gradient in gradients:
            if gradient.is_sparse:
                gradient.mul_(deviation**-power)
        weight, bias = self._own
        known = {id(p) for p in held}
        if id(weight) in known and id(bias) in known:
            weight.div_(deviation)
            bias.sub_(self._scale.mean.to(bias)).div_(deviation)
            for parameter in self._own:
                if parameter.grad is not None:
                    parameter.grad.mul_(deviation)
            self._entered = optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._entered is optimizer:
            self.batch_end()

    @torch.no_grad()
    def batch_end(self) -> None:
        """Takes the weights back, from a step or from one that was skipped."""
        if self._entered is None or self._scale is None or self._own is None:
            return
        self._entered = None
        weight, bias = self._own
        weight.mul_(self._scale.deviation)
        bias.mul_(self._scale.deviation).add_(self._scale.mean.to(bias))

    def release(self) -> None:
        """Takes all hooks off; the scale stays: the next `before_step` goes on."""
        self.batch_end()
        for _, handle in self._hooked:
            handle.remove()
        self._hooked = []

    def state_dict(self) -> dict[str, Any]:
        """The scale; empty where there is none."""
        it = self._scale
        if it is None:
            return {}
        return {"layer": it.layer, "mean": it.mean, "deviation": it.deviation, "power": it.power}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, once `attach` has been called."""
        self.batch_end()
        self._own = None
        self._scale = TargetScale(**state) if state else None
