"""Output layers that start where the targets are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.output_scaling import TargetScale

FAR = 10.0
"""Times the size of the outputs that targets are: less a learning rate that suits the rest makes up for."""

_POWERS = {F.mse_loss: 2, F.l1_loss: 1, F.smooth_l1_loss: 1, F.huber_loss: 1}  # of errors above 1
_MINUS = frozenset({torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.__sub__})
_FROM = frozenset({torch.rsub, torch.Tensor.__rsub__})
_ABSOLUTE = frozenset({torch.abs, torch.Tensor.abs, torch.Tensor.__abs__})
_SQUARE = frozenset({torch.square, torch.Tensor.square})
_POWER = frozenset({torch.pow, torch.Tensor.pow, torch.Tensor.__pow__})
_TIMES = frozenset({torch.mul, torch.Tensor.mul, torch.Tensor.__mul__})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Fitted:
    """What came of it.

    Args:
        changed: by the names of their layers, the parameters of these, as they are in the module that was given.
        scale: where the targets lie.
    """

    changed: dict[str, Sequence[nn.Parameter]]
    scale: TargetScale


@torch.no_grad()
def fit_outputs(module: nn.Module, run: Callable[[], None]) -> Fitted | None:
    r"""Gives an output layer the mean and the deviation of targets that are far larger than what it gives.

    A network starts with outputs of size 1, and one that is asked for house prices has first to grow its last layer
    a hundred thousandfold. Here each output :math:`z_k` of that layer becomes :math:`\mu_k + \sigma (z_k - \bar z_k)`,
    with the mean :math:`\mu_k` of its targets and their deviation :math:`\sigma`, one for all outputs as in the loss.
    So the network gives in the targets' unit what it would give if they were standardised.

    Args:
        module: the model, or a copy of it; its weights are changed.
        run: makes a forward pass on a batch, and computes the loss.

    Returns:
        What was done. None where the loss is no squared or absolute error (or Huber's) of what a linear layer or a
        convolution gives, where its targets are below 10, or less than ten times as large as the outputs, and where
        that layer has no bias, is shared or frozen.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.5 (targets); Goodfellow et al. 2016, Deep learning, section
        8.4 (the bias of an output).

    Example:
        >>> net, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(64, 2)
        >>> done = fit_outputs(net, lambda: F.mse_loss(net(x), 1000 + 200 * torch.randn(64, 1)))
        >>> list(done.changed), bool((net(x).mean() - 1000).abs() < 100)
        (['2'], True)
    """
    found = [pair for pair in _pairs(module, run) if _is_far(pair.outputs, pair.targets)]
    if not found:
        return None
    name, layer, outputs, targets, power = found[-1]
    mean, deviation = _moments(targets)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    weight.mul_(deviation)
    bias.copy_(mean + (bias.double() - outputs.mean(0)) * deviation)
    return Fitted({name: list(layer.parameters(recurse=False))}, TargetScale(name, mean.cpu(), deviation, power))


def _moments(targets: Tensor) -> tuple[Tensor, float]:
    """(K,) the mean for each output, and the deviation over all of them."""
    mean = targets.mean(0)
    deviation = float((targets - mean).square().mean().sqrt())
    return mean, deviation if deviation > 0 else 1.0


def _is_far(outputs: Tensor, targets: Tensor) -> bool:
    """Whether the targets are far larger than the outputs; both (B, K)."""
    size, given = (float(values.square().mean().sqrt()) for values in (targets, outputs))
    return FAR * max(given, 1.0) < size < math.inf


class _Pair(NamedTuple):
    """A layer, its outputs and the targets that they are compared with, both (B, K) in double precision."""

    name: str
    layer: nn.Module
    outputs: Tensor
    targets: Tensor
    power: int


def _pairs(module: nn.Module, run: Callable[[], None]) -> list[_Pair]:
    given: list[tuple[str, nn.Module, Tensor]] = []

    def take(name: str, layer: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            given.append((name, layer, output))

    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    handles = [
        layer.register_forward_hook(partial(take, name))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) and _is_free(layer, owners)
    ]
    watch = _Compared()
    try:
        with watch, torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    pairs = []
    for output, target, power in watch.pairs:
        for name, layer, values in given:
            is_it = values.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            calls = sum(one is layer for _, one, _ in given)
            if is_it and calls == 1 and values.numel() == output.numel() == target.numel():
                shaped = target.reshape(output.shape).reshape(values.shape)
                axis = 1 if isinstance(layer, _CONVOLUTIONS) else -1
                pairs.append(_Pair(name, layer, _by_output(values, axis), _by_output(shaped, axis), power))
    return pairs


def _is_free(layer: nn.Module, owners: dict[int, int]) -> bool:
    """Whether its weight and bias may be set."""
    own = [layer.weight, layer.bias]
    return all(
        isinstance(p, nn.Parameter) and p.requires_grad and owners.get(id(p)) == 1 and not is_sharded(p) for p in own
    )


def _by_output(values: Tensor, axis: int) -> Tensor:
    return values.detach().double().movedim(axis, -1).flatten(0, -2)


class _Compared(TorchFunctionMode):
    """Takes down what is compared with what, by a function of the loss or by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor, int]] = []
        self._differences: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in _POWERS:
            both = (*args[:2], *(kwargs[key] for key in ("input", "target") if key in kwargs))
            self._take(lambda pair: self.pairs.append((*pair, _POWERS[func])), *both)
        elif func in _MINUS | _FROM:
            both = args[:2] if func in _MINUS else args[1::-1]
            self._take(lambda pair: self._differences.append((result, pair)), *both)
        elif args and (power := self._power(func, args)):
            self.pairs += [(*pair, power) for difference, pair in self._differences if difference is args[0]]
        return result

    @staticmethod
    def _take(keep: Callable[[tuple[Tensor, Tensor]], None], *both: Any) -> None:
        """Which of the two is an output, and which a target: the graph tells."""
        if len(both) != 2 or not all(isinstance(one, Tensor) for one in both) or both[0].numel() != both[1].numel():
            return
        outputs = [one for one in both if one.requires_grad]
        if len(outputs) == 1:
            keep((outputs[0], both[1] if outputs[0] is both[0] else both[0]))

    @staticmethod
    def _power(func: Any, args: tuple[Any, ...]) -> int:
        """2 where a difference is squared, 1 where its sign is taken away, else 0."""
        is_square = func in _SQUARE or (func in _POWER and args[1:2] == (2,))
        is_square = is_square or (func in _TIMES and len(args) > 1 and args[0] is args[1])
        return 2 if is_square else int(func in _ABSOLUTE)
