"""Writes the weight of a layer, also where it is computed from other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

_CLOSE = 0.02  # of its norm: bfloat16 has three digits


def parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer itself, and behind them those that its parametrizations compute others from.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> [tuple(p.shape) for p in parameters_of(layer)]
        [(2,), (2, 1), (2, 3)]
    """
    behind = layer.get_submodule("parametrizations").parameters() if is_parametrized(layer) else ()
    return [*layer.parameters(recurse=False), *behind]


def originals_of(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that the weight of a layer is computed from, or itself; nothing where that is not known.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> len(originals_of(layer)), len(originals_of(nn.utils.parametrizations.weight_norm(layer)))
        (1, 2)
    """
    found: list[Any] = [layer.weight]
    if is_parametrized(layer, "weight"):
        made: Any = layer.get_submodule("parametrizations.weight")
        found = [made.original] if made.is_tensor else [getattr(made, f"original{i}") for i in range(made.ntensors)]
    elif _hook(layer) is not None:
        found = [layer.weight_g, layer.weight_v]
    return found if all(isinstance(one, nn.Parameter) for one in found) else []


def is_settable(layer: nn.Module) -> bool:
    """Whether the weight of a layer can be given any values.

    A parametrization can make what it gives back where its `right_inverse` was given it, as that of `weight_norm` does.
    That of `spectral_norm` takes the scale of all weights away.

    Args:
        layer: one with a weight; it stays as it is.

    Example:
        >>> norms = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
        >>> [is_settable(norm(nn.Linear(3, 3))) for norm in norms]
        [True, False]
    """
    if not is_parametrized(layer, "weight") and _hook(layer) is None:
        return bool(originals_of(layer))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    try:
        return _is_settable(layer)
    finally:
        layer.load_state_dict(before)  # some keep what they were given


def _is_settable(layer: nn.Module) -> bool:
    weight, originals = layer.weight, originals_of(layer)
    if not originals:
        return False
    assert isinstance(weight, Tensor)
    wanted = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        try:
            values = _inverse(layer, wanted)
            found = _computed(layer, values)
        except Exception:  # whatever a user's own code does
            return False
    fits = [value.shape for value in values] == [p.shape for p in originals] and found.shape == wanted.shape
    return fits and bool((found - wanted).norm() <= _CLOSE * wanted.norm())


@torch.no_grad()
def set_weight(layer: nn.Module, values: Tensor) -> None:
    """Gives the weight of a layer these values, where `is_settable` says that it can have them.

    The directions of `weight_norm` get the lengths of the weight too: steps then have the size that they have without.

    Args:
        layer: one with a weight.
        values: on any device.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
        >>> set_weight(layer, torch.tensor([[3.0, 4.0]]))
        >>> layer.parametrizations.weight.original0.tolist(), layer.weight.tolist()
        ([[5.0]], [[3.0, 4.0]])
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(weight, nn.Parameter):
        weight.copy_(values)
        return
    for original, value in zip(originals_of(layer), _inverse(layer, values.to(weight)), strict=True):
        original.copy_(value)
    hook = _hook(layer)
    if hook is not None:  # it would compute it before the next forward pass
        hook(layer, ())


def _hook(layer: nn.Module) -> WeightNorm | None:
    """That of the older `torch.nn.utils.weight_norm`."""
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, WeightNorm) and hook.name == "weight"), None)


def _inverse(layer: nn.Module, weight: Tensor) -> Sequence[Tensor]:
    """What would have to be in these parameters for a weight, if any can make it."""
    hook = _hook(layer)
    if hook is not None:
        return torch.norm_except_dim(weight, 2, hook.dim), weight
    values: Any = weight
    parts: list[Any] = [*layer.get_submodule("parametrizations.weight").children()]
    for part in reversed(parts):
        values = part.right_inverse(values)
    return [values] if isinstance(values, Tensor) else values


def _computed(layer: nn.Module, values: Sequence[Tensor]) -> Tensor:
    """The weight that is computed from these values."""
    hook = _hook(layer)
    if hook is not None:
        return torch._weight_norm(values[1], values[0], hook.dim)
    made: Any = values
    for part in layer.get_submodule("parametrizations.weight").children():
        made = (part(*made),)
    weight: Tensor = made[0]
    return weight
