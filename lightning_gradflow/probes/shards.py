"""Tensors of which each rank holds a part (DTensor), and the parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# private; seen in torch 2.6 to 2.13
is_transformed: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _: False
)
"""Whether a tensor is one of those inside of `torch.func.vmap` and its kin, which can't be taken outside."""

_PLAIN = (Tensor, torch.nn.Parameter)  # those that say no in less time
# a DTensor is known by its methods: to import its class costs a second, and most runs have none


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a tensor that is spread over ranks."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor | None:
    """The part of a tensor that this rank holds; all of a plain one; None where parts must be added up first.

    Example:
        >>> import torch
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        return None
    part: Tensor = spread.to_local()
    return part


def is_cut(tensor: Tensor) -> bool:
    """Whether it is known that the ranks hold different parts of it; of a plain tensor that cannot be known."""
    spread: Any = tensor
    return is_sharded(tensor) and any(_cuts(placement) for placement in spread.placements)


def _cuts(placement: Any) -> bool:
    """Not `is_shard()`: FSDP2 over tensor parallelism cuts in a way of its own (_StridedShard), which says no to it."""
    return not (placement.is_replicate() or placement.is_partial())


def complete(tensor: Tensor) -> Tensor:
    """The same tensor; where parts must be added up first, they are: a collective that all of its ranks make."""
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor
    if not any(placement.is_partial() for placement in spread.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    whole: Tensor = spread.redistribute(placements=[Replicate() if p.is_partial() else p for p in spread.placements])
    return whole


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over ranks: a collective that all of them make. It may be the tensor itself.

    Parts that were moved to the memory of the host (FSDP2 with `CPUOffloadPolicy`) go to where the mesh can send them.

    Example:
        >>> import torch
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor.detach()
    mesh = spread.device_mesh
    if spread.device.type != mesh.device_type:
        from torch.distributed.tensor import DTensor

        part = spread.to_local().to(mesh.device_type)
        spread = DTensor.from_local(
            part, mesh, spread.placements, run_check=False, shape=spread.shape, stride=spread.stride()
        )
    full: Tensor = spread.full_tensor()
    return full


def copies(tensor: Tensor, ranks: int) -> float:
    """How many of the ranks hold the same part of it: all of them where it is replicated, one where it is cut up."""
    if not is_sharded(tensor):
        return float(ranks)
    spread: Any = tensor
    cut = [spread.device_mesh.size(i) for i, placement in enumerate(spread.placements) if _cuts(placement)]
    return float(ranks / math.prod(cut))
