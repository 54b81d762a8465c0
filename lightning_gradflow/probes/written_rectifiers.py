"""ReLUs that are written as something else: `x.clamp(min=0)`, `torch.maximum(x, zero)`, `F.threshold(x, 0, 0)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CLAMPS: frozenset[Any] = frozenset(
    {
        *(torch.clamp, torch.clamp_, torch.clip, torch.clip_),
        *(Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_),
    }
)
_FROM_BELOW: frozenset[Any] = frozenset({torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_})
_LARGER: frozenset[Any] = frozenset({torch.maximum, Tensor.maximum, torch.max, Tensor.max})
_THRESHOLDS: frozenset[Any] = frozenset({torch.threshold, torch.threshold_, F.threshold})
LIMITS = _CLAMPS | _FROM_BELOW | _LARGER | _THRESHOLDS
"""Every callable that may be a ReLU, by what it is called with."""


def rectifier(function: Any, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Which rectifier a call of one of `LIMITS` is: `relu`, `relu6`, or none.

    What has no gradient is no activation, but for a first pass without a graph, as activation checkpointing makes it.

    Args:
        function: what was called.
        result: what it gave.
        args: its positional arguments.
        kwargs: those by name.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> rectifier(torch.clamp, x, (x,), {"min": 0}), rectifier(torch.clamp, x, (x, -1, 1), {})
        ('relu', None)
    """
    if not isinstance(result, Tensor) or not (result.requires_grad or not torch.is_grad_enabled()):
        return None
    if function in _LARGER:
        others = [*args[1:], *(kwargs[key] for key in ("other", "input") if key in kwargs), *args[:1]]
        is_rectifier = len(others) > 1 and any(map(_is_zero, others))
        return "relu" if is_rectifier else None
    if function in _THRESHOLDS:
        limits = dict(zip(("threshold", "value"), args[1:], strict=False)) | {**kwargs}
        return "relu" if all(_is_zero(limits.get(key)) for key in ("threshold", "value")) else None
    limits = dict(zip(("min", "max"), args[1:], strict=False)) | {**kwargs}
    if not _is_zero(limits.get("min")):
        return None
    return {None: "relu", 6: "relu6"}.get(_number(limits.get("max")))


def _is_zero(value: Any) -> bool:
    """Whether it is 0, or a tensor of zeros in the memory of the host: another one would have to be waited for."""
    if isinstance(value, Tensor):
        is_at_hand = value.device.type == "cpu" and not value.requires_grad and value.is_floating_point()
        return is_at_hand and not bool(value.any())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float)) else "another"
