"""The joint norm of many gradients on their devices and ranks, and their common factor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gradflow.probes.shards import copies, is_sharded
from lightning_gradflow.probes.transfer import wide_dtype


def joint_norms(
    parameters: list[nn.Parameter], gradients: list[Tensor], device: torch.device, is_shared: bool, weigh: bool
) -> tuple[Tensor, Tensor]:
    """The joint L2 norm of all gradients, and that of the weights that have them.

    The norm of a tensor is computed in its own precision, in float32 at least, and all are put together in float64: to
    convert every entry would cost a hundred times as much on a CPU. So in float32 a tensor whose norm is above 1.8e19,
    where the squares overflow, counts as not finite. Nothing is copied to the host.

    Args:
        parameters: N parameters that have a gradient on this rank.
        gradients: what `here` gives of their gradients.
        device: where the norms are wanted.
        is_shared: whether any parameter is sharded; then all ranks must call, and meet in one collective. A part that
            several of them hold counts once.
        weigh: whether the norm of the weights is wanted; else it is 0.

    Returns:
        Two scalars, the same on all ranks.

    Example:
        >>> weight = nn.Parameter(torch.tensor([6.0, 8.0]))
        >>> [norm.item() for norm in joint_norms([weight], [torch.tensor([3.0, 4.0])], weight.device, False, True)]
        [5.0, 10.0]
    """
    found = [_norms(gradients, device), _norms([here(p.detach()) for p in parameters] if weigh else [], device)]
    if not is_shared:
        return torch.linalg.vector_norm(found[0]), torch.linalg.vector_norm(found[1])
    ranks = dist.get_world_size()
    shares = torch.tensor([1 / copies(p, ranks) for p in parameters], dtype=found[0].dtype)
    shares = shares.to(device, non_blocking=True)
    squares = torch.stack([(norms.square() * shares[: len(norms)]).sum() for norms in found])
    dist.all_reduce(squares)
    return squares[0].sqrt(), squares[1].sqrt()


def _norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """(N,) in the order of the tensors, whatever devices they are on."""
    norms = [torch.zeros(0)] * len(tensors)
    for (_, dtype), where in alike(tensors).items():
        narrow = dtype in (torch.float16, torch.bfloat16)
        its = torch._foreach_norm([tensors[i] for i in where], 2, dtype=torch.float32 if narrow else None)
        for i, norm in zip(where, its, strict=True):
            norms[i] = norm.to(device, wide_dtype(device), non_blocking=True)
    return torch.stack(norms) if norms else torch.zeros(0, dtype=wide_dtype(device), device=device)


def multiply(gradients: list[Tensor], factor: Tensor, drops: Tensor | None = None) -> None:
    """Multiplies gradients in place.

    Args:
        gradients: what `here` gives of them.
        factor: a scalar, on any device.
        drops: a boolean scalar: whether all become 0, which a factor of 0 makes of no NaN.

    Example:
        >>> gradient = torch.tensor([2.0, float("nan")])
        >>> multiply([gradient], torch.tensor(0.5))
        >>> gradient
        tensor([1., nan])
        >>> multiply([gradient], torch.tensor(0.0), drops=torch.tensor(True))
        >>> gradient
        tensor([0., 0.])
    """
    for (device, _), where in alike(gradients).items():
        its = [gradients[i] for i in where]
        torch._foreach_mul_(its, factor.to(device, wide_dtype(device), non_blocking=True))
        if drops is not None:
            are_dropped = drops.to(device, non_blocking=True)
            for gradient in its:
                gradient.masked_fill_(are_dropped, 0)


def alike(tensors: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Which of the tensors are of one device and type: only such ones go through one fused kernel."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return groups


def here(tensor: Tensor) -> Tensor:
    """The memory that this rank holds of a tensor, as real numbers: what is written to it is written to the tensor.

    Of a sparse one, which must be coalesced, the stored entries.

    Example:
        >>> gradient = torch.tensor([3 + 4j])
        >>> here(gradient)
        tensor([[3., 4.]])
    """
    spread: Any = tensor
    part: Tensor = spread.to_local() if is_sharded(tensor) else tensor
    part = part._values() if part.is_sparse else part
    return torch.view_as_real(part) if part.is_complex() else part
