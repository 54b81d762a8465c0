"""Python's garbage collector, out of the way for a moment, and with more patience for the objects of a sample."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage is looked for while many tensors are made that are gone a moment later.

    They count, and soon bring on a search through all objects of the process: with thousands of parameters that takes
    longer than all that is measured.

    Example:
        >>> with paused_collector():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


class Patience:
    """Lets so many more objects be made before garbage is looked for, in the course of a sampled batch.

    What a sample holds until it is over outnumbers what the run makes itself, and would bring on the same search. The
    run's own garbage is found as before: the collector is not off, and what the run makes counts as it did.

    Example:
        >>> before, patience = gc.get_threshold(), Patience()
        >>> patience.begin(1000)
        >>> gc.get_threshold()[0] - before[0]
        1000
        >>> patience.end()
        >>> gc.get_threshold() == before
        True
    """

    def __init__(self) -> None:
        self._more = 0

    def begin(self, objects: int) -> None:
        """Lets more of them be made, from now on."""
        self.end()
        first, *others = gc.get_threshold()
        if first:  # 0 switches the collector off
            self._more = objects
            gc.set_threshold(first + objects, *others)

    def end(self) -> None:
        """As it was; may be called at any time."""
        more, self._more = self._more, 0
        first, *others = gc.get_threshold()
        if more and first > more:  # else someone has set it anew
            gc.set_threshold(first - more, *others)
