"""What was found out about a history, kept as long as it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy.typing as npt

from lightning_gradflow.history.tables import Grown

Fact = TypeVar("Fact")
Column = npt.NDArray[Any]

_MOST = 128  # facts of single rows that are kept of one kind: what is asked at every row looks back 50 rows at most


class Facts:
    """Remembers answers, so that a long history costs no more to judge than a short one.

    What is remembered must not be written to.
    """

    def __init__(self) -> None:
        self._of_now: dict[Hashable, Any] = {}
        self._of_names: dict[Hashable, Any] = {}
        self._of_row: dict[Hashable, dict[Hashable, Any]] = {}
        self._of_rows: dict[Hashable, Grown[Any]] = {}
        self._so_far: dict[Hashable, tuple[int, Column]] = {}

    def grown(self) -> None:
        """A row was added, or losses."""
        self._of_now.clear()

    def thinned(self, kept: Sequence[int]) -> None:
        """These rows are left."""
        self._of_now.clear()
        self._so_far.clear()
        for key, series in self._of_rows.items():
            # those of the newest row may not have been asked for yet
            chosen = [row for row in kept if row < len(series)]
            self._of_rows[key] = Grown(series.rows[chosen], series.room)

    def of_now(self, key: Hashable, find: Callable[[], Fact]) -> Fact:
        """What holds until something is added."""
        if key not in self._of_now:
            self._of_now[key] = find()
        fact: Fact = self._of_now[key]
        return fact

    def of_names(self, key: Hashable, find: Callable[[], Fact]) -> Fact:
        """What holds until a name is added or the order changes."""
        if key not in self._of_names:
            self._of_names[key] = find()
        fact: Fact = self._of_names[key]
        return fact

    def of_row(self, kind: Hashable, key: Hashable, find: Callable[[], Fact], most: int = _MOST) -> Fact:
        """What holds of a single row, for good; of a kind the `most` that were asked for last are kept."""
        known = self._of_row.setdefault(kind, {})
        fact: Fact = known.pop(key) if key in known else find()
        known[key] = fact
        if len(known) > most:
            known.pop(next(iter(known)))
        return fact

    def of_rows(self, key: Hashable, number: int, find: Callable[[int], Column]) -> Column:
        """(R, ...) what holds of each row by itself; `find` is given the first row that has not been asked for."""
        series = self._of_rows.get(key)
        if series is None:
            series = self._of_rows[key] = Grown(find(0))
        elif len(series) < number:
            series.extend(find(len(series)))
        return series.rows

    def so_far(
        self, key: Hashable, number: int, find: Callable[[int], Column], join: Callable[[Column, Column], Column]
    ) -> Column:
        """What holds of all rows together, joined of what holds of the earlier ones and of the rest from a row on."""
        until, found = self._so_far.get(key, (0, None))
        if found is None or until < number:
            newer = find(until)
            found = newer if found is None else join(found, newer)
            self._so_far[key] = number, found
        return found
