"""Which tensors were computed from the network's and have lost its autograd graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.probes.shards import is_transformed


class Detached:
    """Remembers what came out of `detach()`, `.data`, `argmax` and the like, and what was computed from that.

    A tensor counts as detached if it requires no gradient and an operand of the operation that made it did, and was no
    leaf, as a parameter is. Nothing that is done under `no_grad` counts: that is deliberate, and the first pass of
    activation checkpointing. Views of it count too, and once one went to numpy, what is made of arrays. Nothing is kept
    alive.

    Example:
        >>> weight, detached = torch.ones(2, requires_grad=True), Detached()
        >>> hidden = 2 * weight
        >>> features = hidden.detach()
        >>> detached.note(features, (hidden,))
        >>> detached.holds([features]), detached.holds([torch.ones(2)])
        (True, False)
    """

    def __init__(self) -> None:
        self._by_memory: dict[int, weakref.ref[Any]] = {}
        self._in_numpy = False

    def clear(self) -> None:
        """Forgets everything."""
        self._by_memory = {}
        self._in_numpy = False

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._by_memory)

    def note(self, result: Any, operands: Iterable[Any]) -> None:
        """Looks at the result of an operation."""
        if isinstance(result, np.ndarray):
            if any(map(self._is_known, _tensors(operands))):
                self._in_numpy = True
                self._by_memory[result.__array_interface__["data"][0]] = weakref.ref(result)
            return
        without_graph = [tensor for tensor in _tensors((result,)) if not tensor.requires_grad]
        if not without_graph or not torch.is_grad_enabled():
            return
        if self._stems_from(operands):
            for tensor in without_graph:
                self._by_memory[_memory(tensor)] = weakref.ref(tensor)

    def holds(self, inputs: Iterable[Any]) -> bool:
        """Whether a detached tensor is among the inputs of a layer, and none that brings a graph along."""
        if not self._by_memory:
            return False
        found = list(_tensors(inputs))
        return any(map(self._is_known, found)) and not any(tensor.requires_grad for tensor in found)

    def _stems_from(self, operands: Iterable[Any]) -> bool:
        operands = tuple(operands)
        if self._in_numpy and any(isinstance(operand, np.ndarray) for operand in operands):
            return True
        return any((t.requires_grad and not t.is_leaf) or self._is_known(t) for t in _tensors(operands))

    def _is_known(self, tensor: Tensor) -> bool:
        if not self._by_memory or tensor.requires_grad:
            return False
        known = self._by_memory.get(_memory(tensor))
        return known is not None and known() is not None  # else the memory was freed, and belongs to something else


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The plain tensors with memory of their own among `values` and one list or tuple deep in them."""
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if type(item) in (Tensor, torch.nn.Parameter) and _has_memory(item):
                yield item


def _has_memory(tensor: Tensor) -> bool:
    is_dense = tensor.layout is torch.strided and not is_transformed(tensor)
    return is_dense and tensor.device.type != "meta" and tensor.numel() > 0
