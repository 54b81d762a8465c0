"""Ranks that do something together, or not at all."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

_FAILED = -1
_WORDS = 1 << 8  # above all that `worst` is asked


class ApartError(RuntimeError):
    """Another rank has failed, or does something else."""

    def __init__(self) -> None:
        super().__init__("a remedy failed on another rank, or did something else there")


class Together:
    """Meetings of all ranks, so that none waits for one that does not come.

    A collective to which not all ranks come never ends. So they meet before each one, and a rank that has failed comes
    to the next meeting, whichever that is for the others, and says so. Every meeting is the same small collective.
    After one that was in vain there are no more: each rank then puts back what it did, by itself.

    Args:
        device: where the collectives of this rank run.
        ranks: how many there are, in [1, inf); a single one needs no process group.

    Example:
        >>> together = Together(torch.device("cpu"), ranks=1)
        >>> together.agree("the same words")
        >>> together.worst(3)
        3
    """

    def __init__(self, device: torch.device, ranks: int) -> None:
        self._device = device
        self._ranks = ranks
        self._is_over = False

    def agree(self, words: str) -> None:
        """Goes on where every rank says the same.

        Raises:
            ApartError: on every rank, if one has failed, says something else, or is at another meeting.
        """
        smallest, largest = self._meet(_WORDS + zlib.crc32(words.encode()))
        if smallest != largest:
            self._part()

    def worst(self, value: int) -> int:
        """The largest number that a rank brings.

        Args:
            value: in [0, 255].

        Raises:
            ApartError: on every rank, if one has failed, or is at another meeting.
        """
        smallest, largest = self._meet(value)
        if smallest < 0 or largest >= _WORDS:
            self._part()
        return largest

    def fail(self) -> None:
        """Says at the meeting that the others wait at, or come to next, that this rank has failed."""
        if not self._is_over:
            self._meet(_FAILED)
            self._is_over = True

    def _meet(self, code: int) -> tuple[int, int]:
        if self._ranks == 1:
            return code, code
        extremes = torch.tensor([code, -code], device=self._device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, smallest = extremes.tolist()
        return -smallest, largest

    def _part(self) -> None:
        self._is_over = True
        raise ApartError
