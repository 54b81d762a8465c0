"""What the ranks of a distributed run saw, summed in one collective."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gradflow.history import Axis, Floats

_FLAGS = 2  # at the front of what is summed: ranks with something new, ranks that failed


@dataclass(frozen=True)
class Topology:
    """How the ranks divide the work.

    Args:
        data: groups of ranks that have batches of their own, in [1, inf): data parallelism, sharded or not.
        model: ranks that hold parts of one copy of the model and see the same batch, in [1, inf): tensor parallelism.
        model_rank: which of these parts is here, in [0, model).

    Example:
        >>> Topology(data=4, model=2).ranks
        8
    """

    data: int = 1
    model: int = 1
    model_rank: int = 0

    @property
    def ranks(self) -> int:
        """All ranks that train together."""
        return self.data * self.model


class RankFailedError(RuntimeError):
    """Another rank could not measure; every rank learns of it in the same collective, so that none waits."""

    is_told_elsewhere = True


class RankSums:
    """Sums named vectors over all ranks: one collective, as long as each rank brings the names that it brought before.

    Ranks may see different things (a branch that one batch takes and another does not). They agree on a layout, the
    union of all names in order of execution; who lacks a name adds zeros. A new name on any rank costs a second
    round, in which the layout is agreed anew.

    Args:
        device: where the collective is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layout: dict[Hashable, int] = {}
        self.meetings = 0

    def reduce(self, pieces: Mapping[Hashable, Tensor], failed: bool) -> Tensor:
        """The summed vector, on the device; `is_agreed` and `unpack` read its copy on the host."""
        news = any(self._layout.get(name) != piece.numel() for name, piece in pieces.items())
        flags = torch.tensor([float(news), float(failed)], dtype=torch.float64).to(self._device, non_blocking=True)
        parts = [flags]
        for name, length in self._layout.items():
            piece = pieces.get(name)
            if piece is None or piece.numel() != length:
                piece = torch.zeros(length, dtype=torch.float64, device=self._device)
            parts.append(piece.to(self._device, torch.float64))
        vector = torch.cat(parts)
        self.meetings += 1
        dist.all_reduce(vector)
        return vector

    def is_agreed(self, summed: Floats) -> bool:
        """Whether every rank could place all that it brought.

        Raises:
            RankFailedError: if a rank failed.
        """
        if summed[1] > 0:
            raise RankFailedError(f"an error on {int(summed[1])} of the ranks, which says more")
        return bool(summed[0] == 0)

    def agree(self, pieces: Mapping[Hashable, Tensor]) -> None:
        """Takes the new names of all ranks into the layout.

        Raises:
            ValueError: if a name has two lengths.
        """
        mine = {name: piece.numel() for name, piece in pieces.items()}
        everyone: list[dict[Hashable, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        lengths: dict[Hashable, int] = dict(self._layout)
        order: Axis[Hashable] = Axis(self._layout)
        for theirs in everyone:
            order.merge(list(theirs))
            for name, length in theirs.items():
                if lengths.setdefault(name, length) != length:
                    raise ValueError(f"length of {name} must be the same on all ranks, got {length}, {lengths[name]}")
        self._layout = {name: lengths[name] for name in order.names}

    def unpack(self, summed: Floats) -> dict[Hashable, Floats]:
        """Name -> (N,) sums over all ranks, in the order that was agreed on."""
        found, at = {}, _FLAGS
        for name, length in self._layout.items():
            found[name] = summed[at : at + length]
            at += length
        return found


def anyone_failed(failed: bool, device: torch.device) -> bool:
    """Whether any of the ranks failed; all of them have to ask."""
    failures = torch.tensor([float(failed)], device=device)
    dist.all_reduce(failures)
    return bool(failures.item() > 0)
