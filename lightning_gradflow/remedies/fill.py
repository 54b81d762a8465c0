"""Values for weights that have none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_ADDED = ("bias", "beta", "shift")  # how parameters are called that are added, and not multiplied by


@torch.no_grad()
def fill_missing(module: nn.Module, seed: int) -> dict[str, Sequence[nn.Parameter]]:
    r"""Draws the layers anew in which a weight is NaN or infinite.

    A layer without others in it that can draw itself (`reset_parameters`) does. What is not finite then, as of a layer
    of the user's own, becomes normal with the variance :math:`1 / fan_{in}` where it has two dimensions or more; of one
    dimension the entries become zero if it is called a bias or a shift, else one. The random state of torch stays as it
    is.

    Args:
        module: the model, or a copy of it.
        seed: the same on all ranks.

    Returns:
        The parameters of these layers, by the names of the layers.

    References:
        LeCun et al. 1998, Efficient backprop.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.bias.data[0] = math.nan
        >>> [*fill_missing(nn.Sequential(layer), seed=0)], bool(layer.bias.isfinite().all())
        (['0'], True)
    """
    filled: dict[str, Sequence[nn.Parameter]] = {}
    for name, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
        if all(_is_fine(parameter) for parameter in own.values()):
            continue
        if next(layer.children(), None) is None:  # of others it might draw what was learnt
            _let_draw(layer, own, seed)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in own.items():
            if not _is_fine(parameter):
                values = _values(key, parameter, generator)
                kept = parameter.isfinite() if parameter.dim() < 2 else torch.zeros((), dtype=torch.bool)
                parameter.copy_(torch.where(kept.cpu(), parameter.cpu(), values))
        filled[name] = list(own.values())
    return filled


def _let_draw(layer: nn.Module, own: Mapping[str, nn.Parameter], seed: int) -> None:
    """Lets a layer draw its parameters, if it can; those that are frozen stay."""
    reset = getattr(layer, "reset_parameters", None)
    frozen = [(parameter, parameter.clone()) for parameter in own.values() if not parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):  # whatever a user's own code does
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        if callable(reset):
            reset()
    for key, parameter in own.items():
        fresh = getattr(layer, key)
        if fresh is not parameter:  # the optimizer has the old one
            if parameter.shape == fresh.shape:
                parameter.copy_(fresh)
            setattr(layer, key, parameter)
    for parameter, values in frozen:
        parameter.copy_(values)


def _is_fine(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or not parameter.requires_grad:
        return True
    return bool(torch.isfinite(parameter).all())


def _values(key: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    if parameter.dim() > 1:
        fan_in = parameter.numel() / len(parameter)
        return torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
    is_added = any(word in key.lower() for word in _ADDED)
    return torch.zeros(parameter.shape) if is_added else torch.ones(parameter.shape)
