"""Numpy arrays in a checkpoint: `weights_only` loading takes tensors and refuses arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_checkpoint(state: Any) -> Any:
    """A nested state with each array as a tensor.

    Example:
        >>> to_checkpoint({"a": [np.zeros(2)]})
        {'a': [tensor([0., 0.], dtype=torch.float64)]}
    """
    return _map(state, np.ndarray, lambda array: torch.from_numpy(array.copy()))


def from_checkpoint(state: Any) -> Any:
    """What `to_checkpoint` was given."""
    return _map(state, Tensor, lambda tensor: tensor.cpu().numpy())


def _map(state: Any, kind: type, convert: Any) -> Any:
    if isinstance(state, kind):
        return convert(state)
    if isinstance(state, dict):
        return {key: _map(value, kind, convert) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_map(value, kind, convert) for value in state]
    return state
