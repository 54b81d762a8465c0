"""Where an activation is flat: what counts as saturated, and what as the dead side of a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_CHANNELS = ("out_channels", "num_features", "num_channels")
_WIDTHS = ("out_features", "embedding_dim", "hidden_size")
_NEAR = 0.01  # of a bound: there the slope of a sigmoid is below 0.0099, of a tanh below 0.02


def saturated(op: str, output: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Which outputs of a bounded activation are within 1 % of a bound; None for an unbounded activation.

    Example:
        >>> import torch
        >>> saturated("tanh", torch.tensor([-1.0, 0.5, 0.999]), {})
        tensor([ True, False,  True])
    """
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()  # else the limits are rounded to half precision too
    if op in ("sigmoid", "hardsigmoid"):
        return (output < _NEAR) | (output > 1 - _NEAR)
    if op in ("tanh", "softsign"):
        return output.abs() > 1 - _NEAR
    if op == "hardtanh":
        low, high = float(arguments.get("min_val", -1.0)), float(arguments.get("max_val", 1.0))
        margin = _NEAR * (high - low) / 2
        return (output < low + margin) | (output > high - margin)
    return None


def flat(op: str, output: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Which outputs stand on the flat side of an activation that has one; None for the others.

    Exact zeros for ReLU, ReLU6 and Hardswish, and what ReLU6 cuts off at 6; for the smooth ones the last hundredth
    before their lower limit.

    Example:
        >>> import torch
        >>> flat("relu", torch.tensor([0.0, 0.1]), {})
        tensor([ True, False])
    """
    if op == "relu6":
        return (output == 0) | (output == 6)
    if op in ("relu", "hardswish"):
        return output == 0
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    if op in ("gelu", "silu", "mish"):
        return (output <= 0) & (output > -_NEAR)
    if op == "softplus":
        return output < _NEAR
    if op in ("elu", "celu"):
        return output < -(1 - _NEAR) * float(arguments.get("alpha", 1.0))
    if op == "selu":
        return output < -(1 - _NEAR) * 1.7580993  # lambda * alpha of Klambauer et al. 2017
    return None


def always_flat(op: str, output: Tensor, arguments: Mapping[str, Any], axis: int) -> Tensor | None:
    """(U,) which units stand on the flat side for all inputs; None for an activation that has none.

    Args:
        op: the activation.
        output: what came out of it.
        arguments: what it was called with.
        axis: the dimension of the units, not the first one; see `unit_axis`.

    Example:
        >>> import torch
        >>> always_flat("relu", torch.tensor([[0.0, 0.1], [0.0, 0.0]]), {}, axis=1)
        tensor([ True, False])
    """
    if op == "relu6":
        others = [dim for dim in range(output.dim()) if dim != axis]
        return ((output == 0) | (output == 6)).all(dim=others)
    if flat(op, output.new_empty(0), arguments) is None:
        return None
    # between two outputs on one side lies nothing else, and extremes need no mask of all outputs
    is_flat = flat(op, _by_unit(torch.amax, output, axis), arguments)
    if is_flat is None or op == "relu":  # nothing is below its flat side
        return is_flat
    least = flat(op, _by_unit(torch.amin, output, axis), arguments)
    return is_flat & least if least is not None else None


def _by_unit(extreme: Callable[..., Tensor], output: Tensor, axis: int) -> Tensor:
    # along the first dimension it is fast, whatever the others are
    over_samples: Tensor = extreme(output, dim=0)
    others = [dim for dim in range(over_samples.dim()) if dim != axis - 1]
    return extreme(over_samples, dim=others) if others else over_samples


def unit_axis(shape: Sequence[int], layer: nn.Module | None, parts: int = 1) -> int | None:
    """The dimension of the units: channels for convolutions and their norms, else the last one.

    Args:
        shape: of the output of an activation.
        layer: the layer that it follows, whose width tells which dimension the units are on.
        parts: ranks that the units of a layer may be split over, in [1, inf).

    Returns:
        None where no dimension is one of units: a value for each sample (a hinge in the loss), or none as wide as the
        layer.

    Example:
        >>> unit_axis((8, 3, 5, 5), nn.Conv2d(1, 3, 2))
        1
        >>> unit_axis((8, 8), nn.Linear(2, 3)) is None
        True
    """
    if len(shape) < 2:
        return None
    channels = _first_width(layer, _CHANNELS)
    if len(shape) > 2 and channels is not None and _is_width(shape[1], channels, parts):
        return 1
    width = channels if channels is not None else _first_width(layer, _WIDTHS)
    return len(shape) - 1 if width is None or _is_width(shape[-1], width, parts) else None


def _is_width(size: int, width: int, parts: int) -> bool:
    """Whether an axis of that size holds all units of a layer, or those of one of its parts."""
    return size == width or (parts > 1 and width // parts <= size <= -(-width // parts))


def _first_width(layer: nn.Module | None, names: tuple[str, ...]) -> int | None:
    # modules are slow to say that they have no such attribute
    known = (name for name in names if name in vars(layer) or hasattr(type(layer), name)) if layer is not None else ()
    return next((width for name in known if isinstance(width := getattr(layer, name, None), int)), None)
