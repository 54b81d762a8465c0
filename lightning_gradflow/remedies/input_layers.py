"""Layers that take inputs: where their weights are, and the coordinates of standardised inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.probes.shards import is_sharded, local
from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.input_statistics import CONVOLUTIONS
from lightning_gradflow.remedies.training import Training

_KINDS = (nn.Linear, *CONVOLUTIONS, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


class ScaledLayer:
    """One layer and the coordinates that it is to train in: `x -> (I - u u^T) (x - shift) / scale`.

    Args:
        module: the layer.
        scale: (F,), above 0.
        shift: (F,); all 0 where there is no bias to take it up.
        along: (F,) the direction u that is made smaller, in which lengths are `1 - |u|^2` of what they were, for each
            group of a convolution; None for none.

    Attributes:
        optimizer: whose step is being made in these coordinates; None between steps, when the weights are those for x.
    """

    def __init__(self, module: nn.Module, scale: Tensor, shift: Tensor, along: Tensor | None = None) -> None:
        self._module = module
        self._scale, self._shift, self._along = scale, shift, along
        self._has_shift = bool(shift.any())
        self._handle: RemovableHandle | None = None
        self._ready: tuple[Tensor, Tensor] | None = None
        self._ready_along: tuple[Tensor, Tensor] | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
        """Each weight with the bias that takes its shift up."""
        own = self._module._parameters
        for key, other in _places(self._module):
            weight = own[key]
            if weight is not None:
                yield weight, own[other] if self._has_shift else None

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """From the weights for x to those for `(x - shift) / scale`, and their gradients with them."""
        if self.optimizer is not None:
            return
        self.optimizer = optimizer
        # a scaler skipped the step, or the optimizer calls its closure again: the inputs are raw
        self._handle = self._module.register_forward_pre_hook(lambda *_: self.leave())
        for weight, bias in self.parameters():
            (w, dw), (b, db) = _parts(weight), _parts(bias)
            if w is None:
                continue
            scale, shift = self._vectors(w)
            if b is not None:
                b += (w * shift).flatten(1).sum(1)
            w *= scale
            if dw is not None and db is not None:
                dw -= _column(db, dw) * shift
            if dw is not None:
                dw /= scale
            self._stretch(w)
            self._shrink(dw)

    @torch.no_grad()
    def leave(self) -> None:
        """Back again, the gradients too: others read them after the step."""
        self.optimizer = None
        if self._handle is not None:
            self._handle.remove()
        for weight, bias in self.parameters():
            (w, dw), (b, db) = _parts(weight), _parts(bias)
            if w is None:
                continue
            scale, shift = self._vectors(w)
            self._shrink(w)
            self._stretch(dw)
            w /= scale
            if b is not None:
                b -= (w * shift).flatten(1).sum(1)
            if dw is not None:
                dw *= scale
            if dw is not None and db is not None:
                dw += _column(db, dw) * shift

    def _shrink(self, values: Tensor | None) -> None:
        """Times `I - u u^T`."""
        if values is not None and self._along is not None:
            u, _ = self._direction(values, self._along)
            values -= (values * u).sum(1, keepdim=True) * u

    def _stretch(self, values: Tensor | None) -> None:
        """And back again."""
        if values is not None and self._along is not None:
            u, back = self._direction(values, self._along)
            values += (values * u).sum(1, keepdim=True) * back

    def _direction(self, weight: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """U and `u / (1 - |u|^2)`, in the shape of a weight."""
        if self._ready_along is None:
            groups = int(getattr(self._module, "groups", 1))
            wide = torch.promote_types(weight.dtype, torch.float32)
            u = along.to(wide).double().view(groups, -1)
            # not from what single precision makes of it: each step would change the weights a little, the same way
            back = u / (1 - u.square().sum(1, keepdim=True))
            u, back = (_spread(it.flatten().to(weight.device, wide), weight, groups) for it in (u, back))
            self._ready_along = u, back
        return self._ready_along

    def _vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift in the shape of a weight, at least in single precision: (1 or out, in / groups, 1, ...)."""
        if self._ready is None:
            groups = int(getattr(self._module, "groups", 1))
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._ready = (
                _spread(self._scale.to(weight.device, wide), weight, groups),
                _spread(self._shift.to(weight.device, wide), weight, groups),
            )
        return self._ready


def around_mean(training: Training, module: nn.Module, centre: Centre) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Coordinates of a layer in which the mean of its inputs is no larger than what is around it.

    Descent on W is slow where the inputs hardly differ from their mean m: their second moments `s^2 I + m m^T` have one
    direction that is far larger than the others. Where a bias can take m up, m is subtracted; where none can, as at a
    border of zeros, which differs from m, the direction is made smaller by `s / sqrt(s^2 + |m|^2)`, which does the same
    and leaves the bias alone.

    What is left is scaled by the root of s, rounded to a power of two, so that to go there and back changes nothing.
    In full scale a network of 50 layers would take steps that add up to too much; in none, a short one too little.

    Args:
        training: the run.
        module: a Linear or a convolution.
        centre: m and s of its inputs.

    Returns:
        Scale, shift and direction, as `ScaledLayer` takes them; None where half precision has not the digits.

    Example:
        >>> from lightning_gradflow.history import History
        >>> net = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1))
        >>> training = Training(net, [torch.optim.SGD(net.parameters(), lr=0.1)], History())
        >>> scale, shift, along = around_mean(training, net[0], Centre(torch.tensor([0.3, 0.4]), 0.25))
        >>> scale.tolist(), shift.tolist(), round(1 - float(along.square().sum()), 3)  # 0.25 / sqrt(0.25^2 + 0.5^2)
        ([0.5, 0.5], [0.0, 0.0], 0.447)
    """
    mean, spread = centre.mean, centre.spread
    scale = torch.full_like(mean, 2.0 ** round(math.log2(spread) / 2))
    if can_shift(training, module) and not pads_with_zeros(module):
        return scale, mean, None
    if any(torch.finfo(weight.dtype).bits < 32 for weight in module.parameters(recurse=False)):
        return None
    rows = mean.double().view(int(getattr(module, "groups", 1)), -1)
    size = rows.norm(dim=1, keepdim=True)
    shrunk = spread / (spread**2 + size.square()).sqrt()
    along = (1 - shrunk).sqrt() * rows / size.clamp(min=torch.finfo(torch.float64).tiny)
    return scale, torch.zeros_like(mean), along.flatten().to(mean)


def _spread(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    rows = vector.view(groups, -1)
    if groups > 1:
        rows = rows.repeat_interleave(len(weight) // groups, 0)
    return rows.view(*rows.shape, *[1] * (weight.dim() - 2))


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1)).to(torch.promote_types(vector.dtype, torch.float32))


def _parts(parameter: nn.Parameter | None) -> tuple[Tensor | None, Tensor | None]:
    """A parameter and its gradient, as far as this rank holds them."""
    if parameter is None:
        return None, None
    return local(parameter), None if parameter.grad is None else local(parameter.grad)


def _places(module: nn.Module) -> list[tuple[str, str]]:
    """The names of the weights that the input is multiplied with, and of the biases that are added to that."""
    if isinstance(module, nn.RNNBase):
        ways = ("", "_reverse") if module.bidirectional else ("",)
        return [(f"weight_ih_l0{way}", f"bias_ih_l0{way}") for way in ways]
    return [("weight_ih", "bias_ih")] if isinstance(module, nn.RNNCellBase) else [("weight", "bias")]


def can_treat(training: Training, name: str) -> bool:
    """Whether the scale of its input can be folded into a layer, whatever that input is.

    Args:
        training: the run; its optimizers must hold the layer's own weight, and it must be the layer's alone.
        name: of a module of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> from lightning_gradflow.history import History
        >>> training = Training(net, [torch.optim.SGD(net.parameters(), lr=0.1)], History())
        >>> can_treat(training, "0"), can_treat(training, "1")
        (True, False)
    """
    module = training.model.get_submodule(name)
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    owned = [p for m in training.model.modules() for p in m._parameters.values() if p is not None]
    for key, _ in _places(module):
        weight = module._parameters.get(key)
        if weight is None or not weight.requires_grad or _optimizer_of(training, weight) is None:
            return False
        if sum(weight is p for p in owned) > 1 or not weight.is_floating_point() or weight.dim() < 2:
            return False
        # rows of a group start anywhere in a part
        if is_sharded(weight) and (not _is_in_rows(weight) or getattr(module, "groups", 1) > 1):
            return False
    return True


def _optimizer_of(training: Training, parameter: nn.Parameter) -> torch.optim.Optimizer | None:
    for optimizer in training.optimizers:
        if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return None


def _is_in_rows(parameter: Any) -> bool:
    return all(it.is_replicate() or it.is_shard(0) for it in parameter.placements)


def can_shift(training: Training, module: nn.Module) -> bool:
    """Whether each bias trains in the same steps as its weight, and is cut over ranks in the same way."""
    for key, other in _places(module):
        weight, bias = module._parameters[key], module._parameters.get(other)
        if weight is None or bias is None or not bias.requires_grad:
            return False
        if _optimizer_of(training, bias) is not _optimizer_of(training, weight):
            return False
        if is_sharded(bias) != is_sharded(weight) or (is_sharded(bias) and not _is_in_rows(bias)):
            return False
    return True


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether it is a convolution with a border of zeros."""
    if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" if isinstance(module.padding, str) else any(module.padding)
