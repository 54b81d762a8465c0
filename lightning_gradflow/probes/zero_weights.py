"""Are there weights that are zero, and whose gradient is zero too?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.shards import is_sharded, is_transformed
from lightning_gradflow.probes.transfer import wide_dtype

_ADDED = ("bias", "beta", "shift")  # how parameters are called that are added, and not multiplied by


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself that train and that something is multiplied by, by name.

    The slopes of a PReLU are no factor of what it lets through, and don't count.

    Example:
        >>> list(weights_of(nn.BatchNorm1d(2))), list(weights_of(nn.Linear(2, 2).requires_grad_(False)))
        (['weight'], [])
    """
    if isinstance(module, nn.PReLU):
        return {}
    own = module.named_parameters(recurse=False)
    return {key: parameter for key, parameter in own if parameter.requires_grad and _is_factor(key, parameter)}


@torch.no_grad()
def zero_weights(module: nn.Module) -> Tensor | None:
    """How many of these are zero throughout and have a gradient that is zero throughout.

    No optimizer moves such a weight. It is asked after a step, so that what starts from zero on purpose, and gets a
    gradient, is zero no more.

    Args:
        module: a layer, with the gradients of the step that is over.

    Returns:
        A number on the device; None where no gradient is there.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> layer(torch.zeros(4, 3)).sum().backward()
        >>> zero_weights(layer)
        tensor(1., dtype=torch.float64)
    """
    trained = [p for p in weights_of(module).values() if p.grad is not None and p.grad.layout is torch.strided]
    weights = [p.detach() for p in trained if p.device == trained[0].device]
    if not weights:
        return None
    gradients = [p.grad for p in trained if p.grad is not None and p.device == trained[0].device]
    wide = wide_dtype(weights[0].device)
    # sums, and not squares, which are lost for numbers below 1e-23
    sizes = torch.stack([size.to(wide) for size in torch._foreach_norm([*weights, *gradients], 1)])
    return (sizes.view(2, -1) == 0).all(dim=0).sum().to(wide)


def _is_factor(key: str, parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or is_sharded(parameter) or is_transformed(parameter):
        return False
    if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
        return False
    return parameter.dim() > 1 or not any(word in key.lower() for word in _ADDED)
