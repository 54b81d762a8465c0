"""Textbook re-initialisation of layers, by the activation that follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gradflow.activations import BOUNDED, RECTIFIERS, SIGMOIDS
from lightning_gradflow.history import Point

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def activations_around(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """For each layer the activations next to it in order of execution: (what its input comes from, what follows).

    Example:
        >>> activations_around([Point("a", "a"), Point("s", "s", "sigmoid"), Point("b", "b")])
        {'a': ('', 'sigmoid'), 'b': ('sigmoid', '')}
    """
    found: dict[str, tuple[str, str]] = {}
    before, layer = "", ""
    for point in points:
        if point.is_layer:
            found[point.name] = (before, "")
            before, layer = "", point.name
        else:
            before = point.op
            if layer and not found[layer][1]:
                found[layer] = (found[layer][0], point.op)
    return found


@torch.no_grad()
def reinitialise(module: nn.Module, before: str, after: str, generator: torch.Generator) -> list[nn.Parameter]:
    """Draws a layer anew so that the signal keeps its size on the way through it and its activation.

    - before ReLU and its kin: He normal.
    - before tanh: orthogonal, times 2 where the input comes from a sigmoid.
    - before sigmoid: orthogonal, times 4 where the input comes from a sigmoid too, else times 2.
    - before anything else: Glorot normal.

    The bias is 0, or `-weight.sum(1) / 2` where the input comes from a sigmoid, whose mean is 1/2. With
    `sigmoid(x) = (1 + tanh(x / 2)) / 2` a stack of such sigmoid layers *is* a stack of orthogonal tanh layers.

    Args:
        module: a Linear or convolution layer; anything else is left as it is.
        before: the activation that its input comes from, or "".
        after: the activation that follows, or "".
        generator: on the CPU; the same seed gives the same weights on every rank and device, and the global random
            state is not touched.

    Returns:
        The parameters that were drawn anew; frozen ones are left as they are.

    References:
        Glorot and Bengio 2010; Saxe et al. 2014 (orthogonal); He et al. 2015.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> _ = reinitialise(layer, "tanh", "tanh", torch.Generator().manual_seed(0))
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(8), atol=1e-6)
        True
    """
    # the weight of a parametrized layer (weight norm) is computed anew at each use: to write into it has no effect
    if not isinstance(module, _KINDS) or not isinstance(module.weight, nn.Parameter) or not module.weight.requires_grad:
        return []
    fresh = torch.empty(module.weight.shape, dtype=torch.float32)
    if after in RECTIFIERS:
        nn.init.kaiming_normal_(fresh, nonlinearity="relu", generator=generator)
    elif after in BOUNDED:
        nn.init.orthogonal_(fresh, gain=_gain(before, after), generator=generator)
    else:
        nn.init.xavier_normal_(fresh, generator=generator)
    module.weight.copy_(fresh)
    module.weight.grad = None
    changed = [module.weight]
    if isinstance(module.bias, nn.Parameter) and module.bias.requires_grad:
        module.bias.copy_(_centring_bias(fresh) if before in SIGMOIDS else torch.zeros_like(module.bias))
        module.bias.grad = None
        changed.append(module.bias)
    return changed


def _gain(before: str, after: str) -> float:
    """A sigmoid moves half as far as a tanh, and half as fast."""
    return (2.0 if before in SIGMOIDS else 1.0) * (2.0 if after in SIGMOIDS else 1.0)


def _centring_bias(weight: Tensor) -> Tensor:
    """Takes away what the mean 1/2 of a sigmoid's output adds to each unit."""
    return -0.5 * weight.flatten(1).sum(dim=1)
