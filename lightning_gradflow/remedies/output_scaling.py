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
    """Where the targets of a layer's outputs lie, and how the loss grows with them.

    Args:
        layer: its name.
        mean: (K,) of the targets of each output.
        deviation: root mean square of what is around it, over all of them.
        power: 2 where the loss grows with the square of the error, 1 where it grows with the error.
    """

    layer: str
    mean: Tensor
    deviation: float
    power: int


class OutputScaling:
    """Lets what gives the outputs train as if the targets were standardised, and leaves targets and loss alone.

    With targets `m + s t` an output layer `W = s V`, `b = s c + m` gives what a network with V and c gives for t. How
    it trains is not repaired by that: a squared error of raw targets is s^2 times as large, and steps whose size is
    given, such as Adam's, are s times too small for W. So the gradient is divided by s^2 where it enters the layer's
    outputs (by s where the loss grows with the error itself), and each optimizer step is made in V and c:

        V = W / s,    c = (b - m) / s,    dV = s dW,    dc = s db

    and taken back after it. Clipping, momentum, second moments and weight decay act as they would on standardised
    targets, and other losses, that do not come through this layer, as before. Between steps the weights are those for
    the raw targets, so that the loss, validation, checkpoints and predictions are in their unit. The optimizer's state
    belongs to V and c.

    Weights are in those coordinates from `before_step` until the optimizer's step is over; a forward pass in between
    (a skipped step, LBFGS) takes them back first.

    Example:
        >>> scaling, layer = OutputScaling(), nn.Linear(1, 1)
        >>> scaling.start(nn.Sequential(layer), TargetScale("0", torch.tensor([5.0]), 8.0, 2))
        >>> _ = layer.weight.data.fill_(16.0)
        >>> (64 * layer(torch.ones(1, 1))).sum().backward()  # a gradient of 64, of which 1 is left
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> scaling.before_step(optimizer)
        >>> layer.weight.item(), layer.weight.grad.item()
        (2.0, 8.0)
        >>> _ = optimizer.step()
        >>> layer.weight.item()
        -48.0
    """

    def __init__(self) -> None:
        self._scale: TargetScale | None = None
        self._layer: nn.Module | None = None
        self._entered: torch.optim.Optimizer | None = None
        self._hooked: list[tuple[torch.optim.Optimizer, RemovableHandle]] = []
        self._on_layer: list[RemovableHandle] = []

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
        self.release()
        if self._scale is not None:
            self._layer = model.get_submodule(self._scale.layer)
            self._on_layer = [
                self._layer.register_forward_pre_hook(lambda *_: self.batch_end()),
                self._layer.register_forward_hook(lambda _module, _args, output: self._follow(output)),
            ]

    def _follow(self, output: Any) -> None:
        if self._scale is not None and isinstance(output, Tensor) and output.requires_grad:
            factor = self._scale.deviation**-self._scale.power
            output.register_hook(lambda gradient: gradient * factor)

    def _own(self) -> tuple[nn.Parameter, nn.Parameter]:
        assert self._layer is not None
        weight, bias = self._layer.weight, self._layer.bias
        assert isinstance(weight, nn.Parameter)
        assert isinstance(bias, nn.Parameter)
        return weight, bias

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings the layer, where it is this optimizer's, to the coordinates of standardised targets.

        To be called with complete gradients, before they are clipped. Nothing is copied to the host.
        """
        if self._scale is None or self._layer is None or self._entered is not None:
            return
        weight, bias = self._own()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not {id(weight), id(bias)} <= held:
            return
        if all(optimizer is not known for known, _ in self._hooked):
            self._hooked.append((optimizer, optimizer.register_step_post_hook(self._after_step)))
        weight.div_(self._scale.deviation)
        bias.sub_(self._scale.mean.to(bias)).div_(self._scale.deviation)
        for parameter in (weight, bias):
            if parameter.grad is not None:
                parameter.grad.mul_(self._scale.deviation)
        self._entered = optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._entered is optimizer:
            self.batch_end()

    @torch.no_grad()
    def batch_end(self) -> None:
        """Takes the weights back, from a step or from one that was skipped."""
        if self._entered is None or self._scale is None:
            return
        self._entered = None
        weight, bias = self._own()
        weight.mul_(self._scale.deviation)
        bias.mul_(self._scale.deviation).add_(self._scale.mean.to(bias))

    def release(self) -> None:
        """Takes all hooks off; the scale stays, for `attach`."""
        self.batch_end()
        for handle in (*self._on_layer, *(handle for _, handle in self._hooked)):
            handle.remove()
        self._on_layer, self._hooked = [], []
        self._layer = None

    def state_dict(self) -> dict[str, Any]:
        """The scale; empty where there is none."""
        it = self._scale
        if it is None:
            return {}
        return {"layer": it.layer, "mean": it.mean, "deviation": it.deviation, "power": it.power}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, once `attach` has been called."""
        self.release()
        self._scale = TargetScale(**state) if state else None
