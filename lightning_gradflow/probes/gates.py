"""Which bounded activations are gates: what comes out of them is multiplied with another signal."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key")

PRODUCTS: frozenset[Any] = frozenset(
    {
        *(torch.mul, Tensor.mul, Tensor.mul_, torch.multiply, Tensor.multiply, Tensor.multiply_),
        *(torch.lerp, Tensor.lerp, torch.addcmul, Tensor.addcmul),
        *(torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm, torch.einsum),
    }
)
"""Every callable that multiplies signals with each other."""


class Gates(Generic[Key]):
    """Remembers the outputs of bounded activations, and tells which of them go into a product.

    A gate (of an LSTM written by hand, a highway layer, squeeze and excitation, attention with a sigmoid) is open or
    shut by design. The other factor must be a signal: a number or a parameter only scales.

    Example:
        >>> gates = Gates()
        >>> x = torch.ones(2, 2)
        >>> gate = torch.sigmoid(x)
        >>> gates.add(gate, "sigmoid")
        >>> list(gates.among((gate[:, :1], x))), list(gates.among((gate, 2.0)))
        (['sigmoid'], [])
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all outputs."""
        # by identity, and weakly: the monitor must not keep alive what the run lets go
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Key]] = {}

    def add(self, output: Tensor, key: Key) -> None:
        """Remembers an output under a key."""
        self._outputs[id(output)] = (weakref.ref(output), key)

    def among(self, arguments: Iterable[Any]) -> Iterator[Key]:
        """The keys of those factors of a product that are remembered outputs, or views of such."""
        if not self._outputs:
            return
        signals = [x for x in arguments if isinstance(x, Tensor) and not _is_weight(x) and x.numel() > 1]
        if len(signals) < 2:
            return
        for factor in signals:
            for tensor in (factor, factor._base):
                output, key = self._outputs.get(id(tensor), (None, None))
                if output is not None and key is not None and output() is tensor:
                    yield key


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
