"""Arrays that grow by a row at a time, and the values of all rows in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_gradflow.history.rows import Floats, Ints

Scalar = TypeVar("Scalar", np.float64, np.int64)

_FIRST = 16  # rows that there is room for at first; twice as many each time it runs out


class Grown(Generic[Scalar]):
    """Rows of numbers to which more are appended; what was read before never changes, and cannot be written to.

    Appending takes the time of the row alone, but for the doublings of the room, which are few.

    Args:
        start: (n, ...) the first rows.
        room: rows that there is room for without a doubling.

    Example:
        >>> grown = Grown(np.zeros(1))
        >>> before = grown.rows
        >>> grown.append(2.0)
        >>> before, grown.rows
        (array([0.]), array([0., 2.]))
    """

    def __init__(self, start: npt.NDArray[Scalar], room: int = _FIRST) -> None:
        self._number = len(start)
        self._buffer = np.empty((max(room, len(start)), *start.shape[1:]), dtype=start.dtype)
        self._buffer[: len(start)] = start
        self._show()

    def __len__(self) -> int:
        return self._number

    @property
    def room(self) -> int:
        """Rows that there is room for."""
        return len(self._buffer)

    @property
    def rows(self) -> npt.NDArray[Scalar]:
        """(n, ...) all rows, read-only; the same array until a row is added."""
        return self._rows

    def append(self, row: Any) -> None:
        """Adds a row, or a number to a list of them."""
        self.extend(np.asarray(row, dtype=self._buffer.dtype)[None])

    def extend(self, rows: npt.NDArray[Scalar]) -> None:
        """Adds rows (m, ...)."""
        number = self._number + len(rows)
        if number > len(self._buffer):
            larger = np.empty((max(number, 2 * len(self._buffer)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            larger[: self._number] = self._buffer[: self._number]
            self._buffer = larger
        self._buffer[self._number : number] = rows
        self._number = number
        self._show()

    def _show(self) -> None:
        self._rows = self._buffer[: self._number]
        self._rows.setflags(write=False)


class Tables:
    """Metric -> one row of values for each row of a history, by identity.

    The rows of the history are views of it, so that nothing is held twice. Only where names are shown in another order
    than that of their identities, there is a second table for each metric that was asked for.

    Args:
        number: rows that there are already, without any values.
    """

    def __init__(self, number: int = 0) -> None:
        self._number = number
        self._values: dict[str, Grown[np.float64]] = {}
        self._lengths: dict[str, Grown[np.int64]] = {}  # of each row; -1 where it does not have the metric
        self._ordered: dict[str, tuple[int, Grown[np.float64]]] = {}

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, row: int) -> RowValues:
        """What a row holds."""
        return RowValues(self, row)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that some row has."""
        return tuple(self._values)

    def append(self, values: Mapping[str, Floats]) -> RowValues:
        """Adds a row, and returns what it holds."""
        for metric in values:
            if metric not in self._values:
                self._values[metric] = Grown(np.full((self._number, 0), np.nan))
                self._lengths[metric] = Grown(np.full(self._number, -1, dtype=np.int64))
        for metric, table in self._values.items():
            found = values.get(metric)
            length = -1 if found is None else len(found)
            row = np.full(max(table.rows.shape[1], length), np.nan)
            if found is not None:
                row[:length] = found
            self._widened(metric, len(row)).append(row)
            self._lengths[metric].append(length)
        self._number += 1
        return self[self._number - 1]

    def kept(self, rows: Sequence[int]) -> Tables:
        """Some of the rows alone. What was read of the others stays as it is."""
        chosen = Tables(len(rows))
        for metric, table in self._values.items():
            chosen._values[metric] = Grown(table.rows[rows], table.room)
            chosen._lengths[metric] = Grown(self._lengths[metric].rows[rows], table.room)
        return chosen

    def in_order(self, metric: str, order: Ints, version: int) -> Floats:
        """(R, N) values in an order of identities, read-only; `version` tells whether the order is the one before."""
        if metric not in self._values:
            empty = np.full((self._number, len(order)), np.nan)
            empty.setflags(write=False)
            return empty
        table = self._widened(metric, len(order))
        if bool((order[1:] > order[:-1]).all()):  # 0, 1, 2, ...
            self._ordered.pop(metric, None)
            return table.rows
        known, ordered = self._ordered.get(metric, (version, None))
        if ordered is None or known != version:
            ordered = Grown(table.rows[:, order], table.room)
            self._ordered[metric] = version, ordered
        elif len(ordered) < len(table):
            ordered.extend(table.rows[len(ordered) :, order])
        return ordered.rows

    def has(self, metric: str, row: int) -> bool:
        """Whether a row has the metric."""
        return metric in self._values and bool(self._lengths[metric].rows[row] >= 0)

    def row(self, metric: str, row: int) -> Floats:
        """(n,) the values of a row, read-only."""
        return self._values[metric].rows[row, : self._lengths[metric].rows[row]]

    def state_dict(self) -> dict[str, Any]:
        """For each metric the lengths of its rows, and their values one after the other."""
        state = {}
        for metric, table in self._values.items():
            lengths = self._lengths[metric].rows
            is_there = np.arange(table.rows.shape[1]) < lengths[:, None]
            state[metric] = {"lengths": lengths.copy(), "values": table.rows[is_there]}
        return state

    @classmethod
    def from_state(cls, number: int, state: Mapping[str, Any]) -> Tables:
        """What `state_dict` described, of so many rows."""
        made = cls(number)
        for metric, found in state.items():
            lengths = np.asarray(found["lengths"], dtype=np.int64)
            values = np.full((number, max(0, int(lengths.max(initial=0)))), np.nan)
            values[np.arange(values.shape[1]) < lengths[:, None]] = found["values"]
            made._values[metric], made._lengths[metric] = Grown(values), Grown(lengths)
        return made

    def _widened(self, metric: str, width: int) -> Grown[np.float64]:
        table = self._values[metric]
        if table.rows.shape[1] < width:
            wider = np.full((len(table), width), np.nan)
            wider[:, : table.rows.shape[1]] = table.rows
            table = self._values[metric] = Grown(wider, table.room)
        return table


class RowValues(Mapping[str, Floats]):
    """What one row of the tables holds: metric -> (n,) values by identity, read-only."""

    __slots__ = ("_row", "_tables")

    def __init__(self, tables: Tables, row: int) -> None:
        self._tables = tables
        self._row = row

    def __getitem__(self, metric: str) -> Floats:
        if metric not in self:
            raise KeyError(metric)
        return self._tables.row(metric, self._row)

    def __contains__(self, metric: object) -> bool:
        return isinstance(metric, str) and self._tables.has(metric, self._row)

    def __iter__(self) -> Iterator[str]:
        return (metric for metric in self._tables.metrics if metric in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({metric: values.copy() for metric, values in self.items()},)


def pack(arrays: Sequence[npt.NDArray[Scalar] | None], dtype: type[Scalar]) -> dict[str, Any]:
    """Arrays of any length as two: a checkpoint with thousands of them would be slow to write.

    Example:
        >>> pack([np.ones(2), None], np.float64)
        {'lengths': array([ 2, -1]), 'values': array([1., 1.])}
    """
    lengths = np.array([-1 if array is None else len(array) for array in arrays], dtype=np.int64)
    there: list[npt.NDArray[Scalar]] = [np.asarray(array, dtype=dtype) for array in arrays if array is not None]
    return {"lengths": lengths, "values": np.concatenate([np.empty(0, dtype=dtype), *there])}


def unpack(state: Mapping[str, Any], dtype: type[Scalar]) -> list[npt.NDArray[Scalar] | None]:
    """What `pack` was given."""
    values: npt.NDArray[Scalar] = np.asarray(state["values"], dtype=dtype)
    found: list[npt.NDArray[Scalar] | None] = []
    at = 0
    for length in np.asarray(state["lengths"]).tolist():
        found.append(values[at : at + length] if length >= 0 else None)
        at += max(0, length)
    return found
