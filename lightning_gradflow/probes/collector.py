"""Python's garbage collector, out of the way for a moment."""

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
