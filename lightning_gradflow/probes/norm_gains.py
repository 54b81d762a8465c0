"""How large are the gains of norm layers, and are they spread around 0?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.shards import is_sharded, is_transformed
from lightning_gradflow.probes.transfer import wide_dtype

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def gains_of(module: nn.Module) -> nn.Parameter | None:
    """What a norm layer of torch's own multiplies its output with, where that trains; else None.

    One with a forward pass of its own may multiply with something else, such as `1 + weight`.

    Example:
        >>> class Offset(nn.LayerNorm):
        ...     def forward(self, x):
        ...         return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)
        >>> [gains_of(norm) is None for norm in (nn.LayerNorm(2), nn.BatchNorm1d(2, affine=False), Offset(2))]
        [False, True, True]
    """
    place = getattr(type(module).forward, "__module__", None) or ""  # a class that was made by exec has none
    is_own = not place.startswith("torch.nn.") or "forward" in vars(module)
    gains = module._parameters.get("weight") if isinstance(module, _NORMS) and not is_own else None
    if gains is None or isinstance(gains, nn.UninitializedParameter) or not gains.requires_grad:
        return None
    return None if is_sharded(gains) or is_transformed(gains) or gains.is_meta or not gains.numel() else gains


@torch.no_grad()
def norm_gains(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Root mean square and |mean| of the gains of a norm layer, on its device; None for any other module.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> norm.weight.data = torch.tensor([0.1, -0.1])
        >>> [round(float(number), 6) for number in norm_gains(norm)]
        [0.1, 0.0]
    """
    gains = gains_of(module)
    if gains is None:
        return None
    values = gains.detach().to(wide_dtype(gains.device))
    return values.square().mean().sqrt(), values.mean().abs()
