"""Are the units of a layer copies of one another?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.tables import EMBEDDINGS, tables
from lightning_gradflow.probes.transfer import wide_dtype
from lightning_gradflow.probes.weight_size import TRANSPOSED

FEWEST = 4  # entries along an axis: three channels of a grey image are alike, and well
_SOME = 16  # that are compared: which numbers belong to a unit is not known
_ROWS = 4  # that are compared: units that are drawn are never alike, so that more would tell nothing new
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
MADE_OF_UNITS = (nn.Linear, *_CONVOLUTIONS, nn.RNNBase, nn.RNNCellBase)
"""Layers of which one knows where the weights of a unit are."""


def has_units(module: nn.Module) -> bool:
    """Whether it is a layer of which one knows where the weights of a unit are, and that has several."""
    return isinstance(module, MADE_OF_UNITS) and _count(module) > 1


@torch.no_grad()
def unit_spread(module: nn.Module, tensor: Tensor) -> Tensor:
    """How far the units of a layer are from being copies of one another, in its weights or in their gradient.

    sqrt(sum_i |w_i - w_0|^2 / sum_i |w_i|^2) over four units i, evenly spaced: 0 for copies, about 1.2 for units that
    are drawn independently. Of an LSTM or GRU units of the first gate are compared: the gates differ anyway.

    Args:
        module: the layer.
        tensor: (units, ...) a weight of it, or the gradient of that; (inputs, units, ...) of a transposed convolution.

    Returns:
        A number on the device, NaN where all entries are zero.

    Example:
        >>> layer = nn.Linear(3, 8)
        >>> unit_spread(layer, torch.ones(8, 3)), bool(unit_spread(layer, torch.randn(8, 3)) > 0.1)
        (tensor(0., dtype=torch.float64), True)
    """
    by_unit = tensor.detach().transpose(0, 1) if isinstance(module, TRANSPOSED) else tensor.detach()
    units = _count(module)
    rows = by_unit[: units : max(1, units // _ROWS)][:_ROWS].to(wide_dtype(tensor.device))
    spread: Tensor = torch.linalg.vector_norm(rows[1:] - rows[:1]) / torch.linalg.vector_norm(rows)
    return spread


@torch.no_grad()
def matrix_spread(module: nn.Module) -> Tensor | None:
    """How far a matrix of a module of the user's own is from being made of copies, in its weights and its gradient.

    Nothing tells which axis of it counts units. So along each axis of four entries or more 16 of these are compared, as
    in `unit_spread`, in the weights and in their gradient, and what is more of the two counts; of all axes, and all
    matrices, what is least.

    Args:
        module: with the gradients of its parameters.

    Returns:
        A number on the device, infinite where all entries are zero; None where no matrix has a gradient, or an axis
        that is long enough.

    Example:
        >>> module = nn.ParameterList([torch.ones(4, 5)])
        >>> module[0].grad = torch.arange(5.0).expand(4, 5)
        >>> matrix_spread(module)
        tensor(0., dtype=torch.float64)
    """
    found = [
        torch.stack([spread_along(p, axis), spread_along(p.grad, axis)]).nan_to_num(nan=torch.inf).max()
        for p in (tables(module) if not isinstance(module, EMBEDDINGS) else ())
        if p.grad is not None and not p.grad.is_sparse
        for axis in range(p.dim())
        if p.shape[axis] >= FEWEST
    ]
    return torch.stack([one.to(found[0]) for one in found]).min() if found else None


@torch.no_grad()
def spread_along(tensor: Tensor, axis: int) -> Tensor:
    """The same of a tensor, between 16 of the entries along an axis.

    Example:
        >>> ramp = torch.arange(4.0).expand(5, 4)
        >>> bool(spread_along(ramp, 0) == 0), bool(spread_along(ramp, 1) > 0.5)
        (True, True)
    """
    some = tensor.detach()[(slice(None),) * axis + (slice(None, None, max(1, tensor.shape[axis] // _SOME)),)]
    some = some.narrow(axis, 0, min(_SOME, some.shape[axis])).to(wide_dtype(tensor.device))
    spread: Tensor = torch.linalg.vector_norm(some - some.narrow(axis, 0, 1)) / torch.linalg.vector_norm(some)
    return spread


def _count(module: nn.Module) -> int:
    """Units that do the same kind of thing: of one gate, of one group of a convolution."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return int(module.hidden_size)
    if isinstance(module, _CONVOLUTIONS):
        return int(module.out_channels // module.groups)
    return int(module.out_features) if isinstance(module, nn.Linear) else 0
