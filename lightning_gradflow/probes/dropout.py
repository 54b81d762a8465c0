"""Which calls make a signal differ at random, so that what differs behind them need not come from the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# place of the share that is dropped, and of whether the network trains, None where nobody asks; then their defaults
_PLACES: dict[Any, tuple[int, int | None, float, bool]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (1, 2, 0.5, True)),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), (1, 2, 0.5, False)),
    torch.dropout: (1, 2, 0.0, False),
    F.scaled_dot_product_attention: (4, None, 0.0, True),
    F.multi_head_attention_forward: (10, 13, 0.0, True),
}

DROPOUTS = frozenset(_PLACES)
"""Every function that may drop entries at random."""


def drops(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call drops anything.

    Args:
        function: one of `DROPOUTS`.
        args: its positional arguments.
        kwargs: its other arguments.

    Example:
        >>> drops(F.dropout, (None,), {"p": 0.1}), drops(F.dropout, (None, 0.1, False), {})
        (True, False)
    """
    share_at, trains_at, share, trains = _PLACES[function]
    share = _given(args, kwargs, share_at, ("p", "dropout_p"), share)
    trains = trains if trains_at is None else _given(args, kwargs, trains_at, ("training", "train"), trains)
    return bool(trains) and share > 0


def drops_inside(module: nn.Module) -> bool:
    """Whether a recurrence drops entries between its layers, where no function is called that tells.

    Example:
        >>> drops_inside(nn.LSTM(2, 2, num_layers=2, dropout=0.1)), drops_inside(nn.LSTM(2, 2).eval())
        (True, False)
    """
    return isinstance(module, nn.RNNBase) and module.training and module.num_layers > 1 and module.dropout > 0


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, names: tuple[str, ...], usual: Any) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), usual)
