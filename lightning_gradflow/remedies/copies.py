"""Copies of tensors, and the way back into the tensors that they were made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_gradflow.probes.shards import is_sharded


@dataclass(frozen=True, eq=False)
class Copy:
    """The values of a tensor, and what is needed to make the tensor anew."""

    values: Tensor
    device: torch.device
    spread: tuple[Any, ...] | None  # mesh, placements, shape and stride of a tensor that is spread over ranks

    @classmethod
    def of(cls, tensor: Tensor) -> Copy:
        """Copies to the CPU."""
        part = part_of(tensor)
        spread: Any = tensor
        how = (spread.device_mesh, spread.placements, spread.shape, spread.stride()) if is_sharded(tensor) else None
        return cls(part.to("cpu", copy=True), part.device, how)

    def tensor(self) -> Tensor:
        """A new tensor, where the old one was; no rank waits for another."""
        part = self.values.to(self.device, copy=True)
        if self.spread is None:
            return part
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.spread
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def kept_of(value: Any, copies: dict[int, Copy]) -> Any:
    """The same structure with copies in it; what is one tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = Copy.of(value)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: kept_of(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [kept_of(item, copies) for item in value])
    return copy.deepcopy(value)


class Put:
    """Puts copies back, where it can into the tensors that are there."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}
        self._written: set[int] = set()

    def into(self, kept: Copy, live: Tensor) -> Tensor:
        """Writes into a tensor."""
        part = part_of(live)
        part.copy_(kept.values)
        if part.layout == torch.strided and part.numel():
            self._written.add(part.data_ptr())
        self._made[id(kept)] = live
        return live

    def __call__(self, kept: Any, live: Any) -> Any:
        """What stands for a copy now: `live` where it could be written to, else something new."""
        if isinstance(kept, Copy):
            if id(kept) not in self._made:
                if self._takes(kept, live):
                    self.into(kept, live)
                else:
                    self._made[id(kept)] = kept.tensor()
            return self._made[id(kept)]
        if isinstance(kept, dict):
            there = live if isinstance(live, dict) else {}
            restored = {key: self(item, there.get(key)) for key, item in kept.items()}
            there.clear()
            there.update(restored)
            return there
        if isinstance(kept, (list, tuple)):
            lives = live if isinstance(live, (list, tuple)) and len(live) == len(kept) else [None] * len(kept)
            return _like(kept, [self(item, there) for item, there in zip(kept, lives, strict=True)])
        return copy.deepcopy(kept)

    def _takes(self, kept: Copy, live: Any) -> bool:
        # a tensor made in validation can't be written to, nor can one that repeats its memory; and two names may have
        # come to mean one tensor since, which must not be written to twice
        if not isinstance(live, Tensor) or live.is_inference() or is_sharded(live) != (kept.spread is not None):
            return False
        part = part_of(live)
        if part.layout != torch.strided or part.shape != kept.values.shape or part.dtype != kept.values.dtype:
            return False
        repeats = any(step == 0 and length > 1 for step, length in zip(part.stride(), part.shape, strict=True))
        return not repeats and part.data_ptr() not in self._written


def _like(model: Any, items: list[Any]) -> Any:
    """A list, a tuple or a named tuple of the same kind."""
    return type(model)(*items) if hasattr(model, "_fields") else type(model)(items)


def part_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it; unlike `local`, of sums that are still to be made too: it goes back as it is."""
    spread: Any = tensor.detach()
    part: Tensor = spread.to_local() if is_sharded(tensor) else spread
    return part


def nbytes_of(tensor: Tensor) -> int:
    """The memory of this rank's part."""
    part = part_of(tensor)
    return part.numel() * part.element_size()


def is_unset(tensor: Any) -> bool:
    """Whether it is a parameter of a lazy layer that has seen no batch, without shape and values."""
    return bool(is_lazy(tensor))
