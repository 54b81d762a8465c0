"""Are the units of a layer copies of one another?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.transfer import wide_dtype

_ROWS = 4  # that are compared: units that are drawn are never alike, so that more would tell nothing new
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_MADE_OF_UNITS = (nn.Linear, *_CONVOLUTIONS, nn.RNNBase, nn.RNNCellBase)


def has_units(module: nn.Module) -> bool:
    """Whether it is a layer of which one knows where the weights of a unit are, and that has several."""
    return isinstance(module, _MADE_OF_UNITS) and _count(module) > 1


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
    by_unit = tensor.detach().transpose(0, 1) if isinstance(module, _TRANSPOSED) else tensor.detach()
    units = _count(module)
    rows = by_unit[: units : max(1, units // _ROWS)][:_ROWS].to(wide_dtype(tensor.device))
    spread: Tensor = torch.linalg.vector_norm(rows[1:] - rows[:1]) / torch.linalg.vector_norm(rows)
    return spread


def _count(module: nn.Module) -> int:
    """Units that do the same kind of thing: of one gate, of one group of a convolution."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return int(module.hidden_size)
    if isinstance(module, _CONVOLUTIONS):
        return int(module.out_channels // module.groups)
    return int(module.out_features) if isinstance(module, nn.Linear) else 0
