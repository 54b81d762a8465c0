"""Names that keep their identity while more of them come in."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from lightning_gradflow.history.rows import Ints

Name = TypeVar("Name", bound=Hashable)


class Axis(Generic[Name]):
    """Names that only grow in number and keep their identity (0, 1, 2, ...), with a separate order to show them in.

    A branch of the network that runs for the first time late gets the next identity, and stands in the order after
    the name that was executed before it.

    Example:
        >>> axis = Axis(["a", "c"])
        >>> axis.merge(["a", "b", "c"])
        >>> axis.names, axis.identity("b")
        (('a', 'b', 'c'), 2)
    """

    def __init__(self, names: Iterable[Name] = ()) -> None:
        self._identity: dict[Name, int] = {}
        self._order: list[Name] = []
        self._names: tuple[Name, ...] = ()
        self._identities = _frozen([])
        self.version = 0
        """Counts the changes: what was read at the same version is the same."""
        self.merge(list(names))

    def __len__(self) -> int:
        return len(self._order)

    @property
    def names(self) -> tuple[Name, ...]:
        """The names in order."""
        return self._names

    @property
    def order(self) -> Ints:
        """(N,) identity of each name, in order; read-only."""
        return self._identities

    def identity(self, name: Name) -> int:
        """The fixed number of a name."""
        return self._identity[name]

    def merge(self, sequence: Sequence[Name]) -> None:
        """Takes in the names of `sequence` that are new, each after the one that precedes it there."""
        number = len(self._order)
        at: int | None = 0  # behind the name before; None where that has yet to be looked up
        before: Name | None = None
        for name in sequence:
            if name in self._identity:
                at = None
            else:
                if at is None:
                    at = number if before == self._order[-1] else self._order.index(before) + 1  # type: ignore[arg-type]
                self._identity[name] = number
                self._order.insert(at, name)
                number, at = number + 1, at + 1
            before = name
        if number > len(self._names):
            self._show()

    def reorder(self, sequence: Sequence[Name]) -> None:
        """Shows the names in the order of `sequence`, which must hold each of them once; identities stay."""
        names = list(sequence)
        if names == self._order:
            return
        if len(names) != len(self._order) or set(names) != set(self._order):
            raise ValueError("sequence must hold each name of the axis once")
        self._order = names
        self._show()

    def _show(self) -> None:
        self._names = tuple(self._order)
        self._identities = _frozen([self._identity[name] for name in self._order])
        self.version += 1


def _frozen(numbers: list[int]) -> Ints:
    array = np.array(numbers, dtype=np.int64)
    array.setflags(write=False)
    return array
