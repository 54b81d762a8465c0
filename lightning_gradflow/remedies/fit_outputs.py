"""Output layers that start where the targets are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradflow.probes.comparisons import COMPARING, Comparisons
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.output_scaling import TargetScale

_FAR = 10.0  # times the size of the outputs: less is made up soon
_FEWEST = 8  # targets that tell their deviation
_EXACT = 0.05  # that the power of the loss may be off
_USUAL = 0.05  # of the loss on standardised targets: what is below was made small by hand
_COPIES = frozenset({Tensor.float, Tensor.double, Tensor.to, Tensor.type_as, Tensor.contiguous})
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


class _Pair(NamedTuple):
    """A layer, its outputs, and the targets that they are compared with."""

    name: str
    layer: nn.Module
    outputs: Tensor
    targets: Tensor


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
        What was done. None where nothing can be, surely: the loss has to be one mean or sum of squared or absolute
        errors (Huber's too) of what a linear layer or a convolution gives, measured by how it grows with the error,
        and of no other; each output's targets have to be above 10, and ten times as large as it; and that layer has to
        have a bias, to be called once, and not to be shared, frozen or in a format that can't hold such numbers.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.5 (targets); Goodfellow et al. 2016, Deep learning, section
        8.4 (the bias of an output).

    Example:
        >>> net, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(64, 2)
        >>> y = 1000 + 200 * torch.randn(64, 1)
        >>> done = fit_outputs(net, lambda: nn.functional.mse_loss(net(x), y))
        >>> list(done.changed), bool((net(x).mean() - 1000).abs() < 100)
        (['2'], True)
    """
    pair, loss = _only_pair(module, run)
    if pair is None or loss is None:
        return None
    axis = 1 if isinstance(pair.layer, _CONVOLUTIONS) else -1
    outputs, targets = (_by_output(values, axis) for values in (pair.outputs, pair.targets))
    if len(targets) < _FEWEST or not bool(_are_far(outputs, targets)):
        return None
    mean = targets.mean(0)
    deviation = float((targets - mean).square().mean().sqrt())
    if not deviation > 0:
        return None
    fitted = mean + (outputs - outputs.mean(0)) * deviation
    largest = float((mean.abs() + 3 * deviation).max())
    power = _power(loss, pair)
    if power is None or not largest < torch.finfo(pair.outputs.dtype).max:
        return None
    # what the loss is going to be, on standardised targets
    shrinks = float((fitted - targets).norm() / (outputs - targets).norm()) / deviation
    if not float(loss) * shrinks**power >= _USUAL:
        return None
    weight, bias = pair.layer.weight, pair.layer.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    weight.mul_(deviation)
    bias.copy_(mean + (bias.double() - outputs.mean(0)) * deviation)
    scale = TargetScale(pair.name, mean.cpu(), deviation, power)
    return Fitted({pair.name: list(pair.layer.parameters(recurse=False))}, scale)


def _are_far(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the targets of each output are far larger than it is; both (B, K)."""
    sizes, given = (values.square().mean(0).sqrt() for values in (targets, outputs))
    return ((sizes > _FAR * given.clamp(min=1.0)) & sizes.isfinite()).all()


def _power(loss: Tensor, pair: _Pair) -> int | None:
    """With which power of the error a loss grows, 1 or 2; None where with none, so it is made of something else."""
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss, pair.outputs, materialize_grads=True)
    if not float(loss) > 0:
        return None
    errors = (pair.outputs - pair.targets).double()
    power = float((gradient.double() * errors).sum() / loss.double())  # Euler's theorem
    return next((exact for exact in (1, 2) if abs(power - exact) < _EXACT), None)


def _only_pair(module: nn.Module, run: Callable[[], None]) -> tuple[_Pair | None, Tensor | None]:
    """The outputs of a layer that targets are compared with, and the loss; None where there are several, or none."""
    given: list[tuple[str, nn.Module, Tensor, int]] = []

    def take(name: str, layer: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            given.append((name, layer, output, output._version))

    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))}
    handles = [layer.register_forward_hook(partial(take, name)) for name, layer in layers.items()]
    watch = _Watch()
    try:
        with watch, torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if len(watch.pairs) != 1:
        return None, None
    compared, target = watch.pairs[0]
    source = watch.source_of(compared)
    for name, layer, output, version in given:
        is_it = output.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        is_as_it_was = output._version == version and output.numel() == compared.numel()
        is_called_once = sum(one is layer for _, one, _, _ in given) == 1
        if is_it and is_as_it_was and is_called_once and _is_free(layer, owners):
            return _Pair(name, layer, output, target.reshape(output.shape)), watch.loss
    return None, None


def _is_free(layer: nn.Module, owners: Counter[int]) -> bool:
    """Whether its weight and bias may be set."""
    own = [layer.weight, layer.bias]
    return all(
        isinstance(p, nn.Parameter) and p.requires_grad and owners[id(p)] == 1 and not is_sharded(p) for p in own
    )


def _by_output(values: Tensor, axis: int) -> Tensor:
    return values.detach().double().movedim(axis, -1).flatten(0, -2)


class _Watch(TorchFunctionMode):
    """Takes down what is compared with what, copies in other formats, and the last single number: the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.loss: Tensor | None = None
        self._comparisons = Comparisons(lambda outputs, targets: self.pairs.append((outputs, targets)))
        self._copies: list[tuple[Tensor, Tensor]] = []

    def source_of(self, tensor: Tensor) -> Tensor:
        """What it is a copy of."""
        for copy, original in reversed(self._copies):
            if copy.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                tensor = original
        return tensor

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if func in COMPARING:
                self._comparisons.see(func, result, args, kwargs)
            if isinstance(result, Tensor) and result.requires_grad:
                if result.dim() == 0:
                    self.loss = result
                if func in _COPIES and args and result.shape == args[0].shape:
                    self._copies.append((result, args[0]))
        return result
