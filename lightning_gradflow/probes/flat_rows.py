"""Rows of several lengths, one behind the other in one array: thousands of them cost hardly more than one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats, Ints
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Rows:
    """The name of an array that is made of rows.

    Args:
        kind: what the rows tell.
        names: (N,) what each of them belongs to.
    """

    kind: str
    names: Sequence[Hashable]


class RowsTransfer:
    """Hands rows to a transfer: all of a kind in one array, or one by one where ranks have to agree on their names.

    Args:
        transfer: takes them.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._topology = transfer.topology

    def padded(self, length: int) -> int:
        """Ranks agree on lengths, and sequences differ: few lengths are few agreements."""
        return length if self._transfer.is_alone else 1 << (length - 1).bit_length()

    def share(self, kind: str, names: Sequence[Hashable], flat: Tensor, lengths: Sequence[int]) -> None:
        """Takes (sum of lengths,) numbers of the device: a row of so many for each name, to be summed over ranks."""
        if self._transfer.is_alone:
            self._transfer.share(Rows(kind, names), flat)
            return
        parts, part = self._topology.model, self._topology.model_rank
        for name, row in zip(names, flat.split(list(lengths)), strict=True):
            if parts > 1:  # each part of a split model has a row of its own: equal rows are one and the same thing
                table = row.new_zeros((parts, row.numel()))
                table[part] = row
                row = table.flatten()
            self._transfer.share((kind, name), row)

    def share_numbers(
        self, kind: str, names: Sequence[Hashable], numbers: Sequence[float], lengths: Sequence[int]
    ) -> None:
        """The same of numbers that are on the host."""
        if self._transfer.is_alone:
            self._transfer.share_numbers(Rows(kind, names), numbers)
            return
        parts, part, end = self._topology.model, self._topology.model_rank, 0
        for name, length in zip(names, lengths, strict=True):
            before, after = [0.0] * (length * part), [0.0] * (length * (parts - 1 - part))
            self._transfer.share_numbers((kind, name), [*before, *numbers[end : end + length], *after])
            end += length


class Fetched:
    """What was fetched, kind by kind, whether its rows came in one array or one by one.

    Args:
        host: what was fetched.

    Example:
        >>> fetched = Fetched({("kind", "a"): np.array([1.0]), ("kind", "b"): np.array([2.0, 3.0])})
        >>> fetched.names("kind"), fetched.flat("kind", ["b", "a"])
        (['a', 'b'], array([2., 3., 1.]))
    """

    def __init__(self, host: Mapping[Hashable, Floats]) -> None:
        self._host = host
        self._names: dict[str, list[Any]] = {}
        self._flat: dict[str, Floats] = {}
        for name, array in host.items():
            if isinstance(name, Rows):
                self._names[name.kind], self._flat[name.kind] = list(name.names), array
            elif isinstance(name, tuple) and len(name) == 2:
                self._names.setdefault(name[0], []).append(name[1])

    def names(self, kind: str) -> list[Any]:
        """What the rows of a kind belong to, in order of execution."""
        return self._names.get(kind, [])

    def flat(self, kind: str, names: Sequence[Hashable]) -> Floats:
        """The rows of these names; all that there are where they came in one array."""
        if kind in self._flat:
            return self._flat[kind]
        return np.concatenate([np.empty(0), *(self._host[kind, name] for name in names)])


def one_behind_the_other(pieces: Sequence[Tensor | float | None]) -> Tensor:
    """() or (n,) tensors and numbers as one vector of wide floats, on the device of the first tensor.

    Args:
        pieces: what comes one behind the other; zero stands for None.

    Example:
        >>> one_behind_the_other([torch.tensor(True), torch.tensor([2.0, 3.0]), None])
        tensor([1., 2., 3., 0.], dtype=torch.float64)
        >>> one_behind_the_other([1, 2.5])
        tensor([1.0000, 2.5000], dtype=torch.float64)
    """
    alike: dict[Hashable, list[int]] = {}
    for i, piece in enumerate(pieces):
        alike.setdefault((piece.device, piece.dtype) if isinstance(piece, Tensor) else None, []).append(i)
    # to convert or move them one by one costs as much as all else
    joined = [_joined([pieces[i] for i in group]) for group in alike.values()]
    device = next((piece.device for key, piece in zip(alike, joined, strict=True) if key is not None), _HOST)
    joined = [piece.to(device, wide_dtype(device)) for piece in joined]
    if len(joined) == 1:
        return joined[0]
    order = [i for group in alike.values() for i in group]
    sizes = [piece.numel() if isinstance(piece := pieces[i], Tensor) else 1 for i in order]
    apart = torch.cat(joined).split(sizes)
    return torch.cat([piece for _, piece in sorted(zip(order, apart, strict=True), key=lambda pair: pair[0])])


def _joined(pieces: Sequence[Any]) -> Tensor:
    if isinstance(pieces[0], Tensor):
        return torch.hstack(list(pieces))
    return torch.tensor([piece or 0.0 for piece in pieces], dtype=torch.float64)


def starts(lengths: Ints) -> Ints:
    """(N,) where each row begins.

    Example:
        >>> starts(np.array([2, 1, 3]))
        array([0, 2, 3])
    """
    begins: Ints = np.cumsum(lengths) - lengths
    return begins


def places(lengths: Ints) -> Ints:
    """(sum of lengths,) place of each number in its row.

    Example:
        >>> places(np.array([2, 1, 3]))
        array([0, 1, 0, 0, 1, 2])
    """
    inside: Ints = np.arange(int(lengths.sum())) - np.repeat(starts(lengths), lengths)
    return inside
