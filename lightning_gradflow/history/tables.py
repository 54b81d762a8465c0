"""Arrays that grow by a row at a time, and the values of all rows in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_gradflow.history.rows import Bools, Floats, Ints

Scalar = TypeVar("Scalar", np.float64, np.int64)

_FEW = 4096  # values of which most tell that they need all their digits
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
        self._rows: npt.NDArray[Scalar] | None = None

    def __len__(self) -> int:
        return self._number

    @property
    def room(self) -> int:
        """Rows that there is room for."""
        return len(self._buffer)

    @property
    def rows(self) -> npt.NDArray[Scalar]:
        """(n, ...) all rows, read-only; the same array until a row is added."""
        if self._rows is None:
            self._rows = self._buffer[: self._number]
            self._rows.setflags(write=False)
        return self._rows

    @property
    def width(self) -> int:
        """Numbers of a row that is a list of them."""
        return int(self._buffer.shape[1])

    def append(self, row: Any) -> None:
        """Adds a row, or a number to a list of them."""
        if self._number == len(self._buffer):
            self._make_room(self._number + 1)
        self._buffer[self._number] = row
        self._number += 1
        self._rows = None

    def extend(self, rows: npt.NDArray[Scalar]) -> None:
        """Adds rows (m, ...)."""
        number = self._number + len(rows)
        if number > len(self._buffer):
            self._make_room(number)
        self._buffer[self._number : number] = rows
        self._number = number
        self._rows = None

    def _make_room(self, number: int) -> None:
        larger = np.empty((max(number, 2 * len(self._buffer)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
        larger[: self._number] = self._buffer[: self._number]
        self._buffer = larger


class Tables:
    """Metric -> one row of values for each row of a history that has it, by identity.

    The rows of the history are views of it, so that nothing is held twice. Only of a metric that was asked for there is
    a second table, where not all rows have it, or names are shown in another order than that of their identities.

    Args:
        number: rows that there are already, without any values.
    """

    def __init__(self, number: int = 0) -> None:
        self._number = number
        self._values: dict[str, Grown[np.float64]] = {}
        self._lengths: dict[str, Grown[np.int64]] = {}  # of each row of the values
        self._at: dict[str, Grown[np.int64]] = {}  # which of them a row of the history has; -1 for none
        self._ordered: dict[str, tuple[int, Grown[np.float64]]] = {}

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, row: int) -> RowValues:
        """What a row holds."""
        return RowValues(self, row)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that some row has, or had."""
        return tuple(self._values)

    def append(self, values: Mapping[str, Floats]) -> RowValues:
        """Adds a row, and returns what it holds."""
        for metric, found in values.items():
            if metric not in self._values:
                self._values[metric] = Grown(np.empty((0, 0)))
                self._lengths[metric] = Grown(np.empty(0, dtype=np.int64))
                self._at[metric] = Grown(np.full(self._number, -1, dtype=np.int64))
            table = self._widened(metric, len(found))
            if len(found) < table.width:
                row = np.full(table.width, np.nan)
                row[: len(found)] = found
                table.append(row)
            else:
                table.append(found)
            self._lengths[metric].append(len(found))
        for metric, at in self._at.items():
            at.append(len(self._values[metric]) - 1 if metric in values else -1)
        self._number += 1
        return self[self._number - 1]

    def kept(self, rows: Sequence[int]) -> Tables:
        """Some of the rows alone. What was read of the others stays as it is."""
        chosen = Tables(len(rows))
        for metric, table in self._values.items():
            at = self._at[metric].rows[rows]
            has = at >= 0
            chosen._values[metric] = Grown(table.rows[at[has]], table.room)
            chosen._lengths[metric] = Grown(self._lengths[metric].rows[at[has]], table.room)
            chosen._at[metric] = Grown(_places(has), self._at[metric].room)
        return chosen

    def in_order(self, metric: str, order: Ints, version: int) -> Floats:
        """(R, N) values in an order of identities, read-only; `version` tells whether the order is the one before."""
        if metric not in self._values:
            empty = np.full((self._number, len(order)), np.nan)
            empty.setflags(write=False)
            return empty
        table = self._widened(metric, len(order))
        if len(table) == self._number and bool((order[1:] > order[:-1]).all()):  # all of them; 0, 1, 2, ...
            self._ordered.pop(metric, None)
            return table.rows
        known, ordered = self._ordered.get(metric, (version, None))
        if ordered is None or known != version:
            ordered = Grown(self._full(metric, order, 0), self._at[metric].room)
            self._ordered[metric] = version, ordered
        elif len(ordered) < self._number:
            ordered.extend(self._full(metric, order, len(ordered)))
        return ordered.rows

    def _full(self, metric: str, order: Ints, first: int) -> Floats:
        """The same, from a row on, with NaN where a row does not have the metric."""
        at = self._at[metric].rows[first:]
        full = np.full((len(at), len(order)), np.nan)
        full[at >= 0] = self._values[metric].rows[at[at >= 0]][:, order]
        return full

    def has(self, metric: str, row: int) -> bool:
        """Whether a row has the metric."""
        return metric in self._values and bool(self._at[metric].rows[row] >= 0)

    def row(self, metric: str, row: int) -> Floats:
        """(n,) the values of a row that has the metric, read-only."""
        at = self._at[metric].rows[row]
        return self._values[metric].rows[at, : self._lengths[metric].rows[at]]

    def state_dict(self) -> dict[str, Any]:
        """For each metric the lengths of its rows, -1 for none, and their values one after the other."""
        state = {}
        for metric, table in self._values.items():
            at, own = self._at[metric].rows, self._lengths[metric].rows
            lengths = np.full(self._number, -1, dtype=np.int64)
            lengths[at >= 0] = own
            is_there = np.arange(table.rows.shape[1]) < own[:, None]
            state[metric] = {"lengths": lengths, "values": _narrowed(table.rows[is_there])}
        return state

    @classmethod
    def from_state(cls, number: int, state: Mapping[str, Any]) -> Tables:
        """What `state_dict` described, of so many rows."""
        made = cls(number)
        for metric, found in state.items():
            lengths = np.asarray(found["lengths"], dtype=np.int64)
            own = lengths[lengths >= 0]
            values = np.full((len(own), int(own.max(initial=0))), np.nan)
            values[np.arange(values.shape[1]) < own[:, None]] = found["values"]
            made._values[metric], made._lengths[metric] = Grown(values), Grown(own)
            made._at[metric] = Grown(_places(lengths >= 0))
        return made

    def _widened(self, metric: str, width: int) -> Grown[np.float64]:
        table = self._values[metric]
        if table.width < width:
            wider = np.full((len(table), width), np.nan)
            wider[:, : table.width] = table.rows
            table = self._values[metric] = Grown(wider, table.room)
        return table


def _places(has: Bools) -> Ints:
    """(R,) where the values of each row stand that has some; -1 for the others."""
    return np.where(has, np.cumsum(has) - 1, -1)


def _narrowed(values: Floats) -> npt.NDArray[Any]:
    """The same numbers in as few bytes as hold all of them exactly: many a share is 0 or 1 in every row.

    Example:
        >>> [_narrowed(np.array(numbers)).dtype.name for numbers in ([0.0, 1.0], [0.5, np.nan], [0.1])]
        ['uint8', 'float16', 'float64']
    """
    with np.errstate(all="ignore"):  # what does not fit is told by the comparison
        for dtype in (np.uint8, np.float16, np.float32):
            for some in (values[:_FEW], values):
                narrow = some.astype(dtype)
                if not np.array_equal(narrow, some, equal_nan=True):
                    break
            else:
                return narrow
    return values


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
