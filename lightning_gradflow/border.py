"""The border between the monitor and the run: an error inside of us is told once, and never reaches the training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_gradflow.findings import GradFlowWarning

T = TypeVar("T")

RAISE_VARIABLE = "LIGHTNING_GRADFLOW_RAISE"
"""Environment variable: with the value 1, errors inside the monitor are raised; for the tests of this package."""


class Border:
    """Runs parts of the monitor; a part that raises is switched off with one warning, and training goes on.

    A `GradFlowWarning` that a filter of the user's turned into an error is what the user asked for: it goes through.

    Example:
        >>> import warnings
        >>> border = Border()
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     results = [border.run("division", lambda: 1 / 0, default=-1) for _ in range(2)]
        >>> results, len(told), border.is_off("division")
        ([-1, -1], 1, True)
    """

    def __init__(self) -> None:
        self._off: set[str] = set()
        self._told: set[str] = set()
        self._tells = True

    def reset(self, *, tells: bool = True) -> None:
        """A new fit starts: what failed in the last one is tried again.

        Args:
            tells: whether this process warns; of several ranks only the first one does.
        """
        self._off.clear()
        self._told.clear()
        self._tells = tells

    def is_off(self, part: str) -> bool:
        """Whether a part was switched off."""
        return part in self._off

    def run(self, part: str, action: Callable[..., T], *args: Any, default: T) -> T:
        """`action(*args)`, or `default` where the part is off or fails."""
        if part in self._off:
            return default
        try:
            return action(*args)
        except GradFlowWarning:
            raise
        except Exception as error:
            if os.environ.get(RAISE_VARIABLE) == "1":
                raise
            # whichever rank it happened on: the others only learn that it happened
            elsewhere = getattr(error, "is_told_elsewhere", False)
            self.switch_off(part, f"{type(error).__name__}: {error}", everywhere=not elsewhere)
            return default

    def switch_off(self, part: str, reason: str, *, everywhere: bool = False) -> None:
        """Switches a part off and says so.

        Args:
            part: which.
            reason: why.
            everywhere: whether it is said by this process, even if it is not the one that speaks for all.
        """
        self._off.add(part)
        self.tell(f"lightning_gradflow: {part} is switched off ({reason}). Training goes on as it is.", everywhere)

    def tell(self, message: str, everywhere: bool = False) -> None:
        """Warns, once for each message."""
        if (self._tells or everywhere) and message not in self._told:
            self._told.add(message)
            warn(message, GradFlowWarning)


def warn(message: str, category: type[GradFlowWarning]) -> None:
    """Warns past Python's memory of what it has shown: a second fit that finds the same has to say so again.

    No line of ours is named, for no line of ours is wrong; filters work as ever.
    """
    warnings.warn_explicit(message, category, filename="lightning_gradflow", lineno=0, registry={})
