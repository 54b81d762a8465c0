"""Which columns of what goes into a layer are data, beside those that other layers have made."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn


def raw_columns(values: Tensor, dim: int) -> npt.NDArray[np.bool_] | None:
    """(F,) which entries along a dimension come from nothing that trains, as autograd tells it.

    A tensor without a history is data as a whole. What was put together by `torch.cat`, such as embeddings beside raw
    numbers, is told apart piece by piece; of any other tensor with a history no column is data.

    Args:
        values: what goes into a layer, where autograd is on.
        dim: that of the features.

    Returns:
        None where it cannot be told: data stands in several places among pieces that other layers have made.

    Example:
        >>> import torch
        >>> embedded, numbers = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 2)
        >>> raw_columns(torch.cat([embedded, numbers], dim=1), 1).tolist()
        [False, False, False, True, True]
    """
    if values.grad_fn is None:
        return np.full(values.shape[dim], not isinstance(values, nn.Parameter))
    return _of_node(values.grad_fn, values.shape[dim], dim, values.dim())


def _of_node(node: Any, width: int, dim: int, dims: int) -> npt.NDArray[np.bool_] | None:
    nothing = np.zeros(width, dtype=bool)
    if type(node).__name__ != "CatBackward0" or not any(it is None for it, _ in node.next_functions):
        return nothing
    if _signed(node._saved_dim) % dims != dim % dims:  # data stands behind or before, in each of the columns
        return nothing
    pieces = [None if it is None else _width(it, number, dim) for it, number in node.next_functions]
    known = [piece for piece in pieces if piece is not None]
    first = pieces.index(None)
    last = len(pieces) - pieces[::-1].index(None)
    if any(piece is not None for piece in pieces[first:last]) or sum(known) > width:
        return None
    start = sum(piece for piece in pieces[:first] if piece is not None)
    nothing[start : start + width - sum(known)] = True
    return nothing


def _signed(dim: int) -> int:
    return dim - (1 << 64) if dim >= 1 << 63 else dim  # autograd keeps it without a sign


def _width(node: Any, number: int, dim: int) -> int:
    return int(node._input_metadata[number].shape[dim])
