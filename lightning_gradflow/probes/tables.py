"""The tables of a network: how large they are, and whether its loss asks for them to be smaller."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import is_of_torch
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.transfer import wide_dtype

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_MOST = 1 << 30  # entries of a product that all libraries can count


def tables(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of an embedding, or of a module of the user's own, which may be looked up in as well.

    Example:
        >>> [table.shape for table in tables(nn.Embedding(3, 2))], tables(nn.Linear(3, 2))
        ([torch.Size([3, 2])], [])
    """
    if is_of_torch(module) and not isinstance(module, EMBEDDINGS):
        return []
    return [p for p in module.parameters(recurse=False) if _is_there(p) and p.dim() > 1]


@torch.no_grad()
def table_rms(module: nn.Module) -> Tensor | None:
    """Root mean square of the entries, of the table where it is largest; None without one.

    Example:
        >>> table = nn.Embedding(3, 2)
        >>> _ = nn.init.constant_(table.weight, 2.0)
        >>> table_rms(table)
        tensor(2., dtype=torch.float64)
    """
    sizes = [
        torch.linalg.vector_norm(table, dtype=wide_dtype(table.device)) / math.sqrt(table.numel())
        for table in tables(module)
    ]
    return torch.stack([size.to(sizes[0]) for size in sizes]).max() if sizes else None


@torch.no_grad()
def table_cosine(module: nn.Module) -> Tensor | None:
    r"""Cosine between the tables W of a module and their gradient G, 0 where it is negative.

    .. math:: c = \max\Bigl(0, \frac{\langle W, G \rangle}{\|w\| \, \|g\|}\Bigr)

    The norms are those of all parameters of the module that have a gradient, so that :math:`c \, \|w\| \, \|g\|` is by
    how much the loss falls if the tables become smaller, relative to their size: its derivative by the logarithm of a
    factor on them. What scales the gradients, such as clipping or a gradient scaler, makes no difference to c.

    Returns:
        None where there is no table with a gradient, or it is sparse; NaN where both are zero.

    Example:
        >>> table = nn.Embedding(1, 2)
        >>> table.weight.data = torch.tensor([[3.0, 4.0]])
        >>> table(torch.tensor([0])).square().sum().backward()  # the gradient of a square points along the weights
        >>> round(float(table_cosine(table)), 6)
        1.0
    """
    known = {id(table) for table in tables(module)}
    parts = [p for p in module.parameters(recurse=False) if _is_there(p) and p.grad is not None]
    if any(p.grad is not None and p.grad.is_sparse for p in parts):  # to sort its rows would cost more than all else
        return None
    of_tables = [p for p in parts if id(p) in known]
    if not of_tables:
        return None
    device = of_tables[0].device
    wide = wide_dtype(device)
    dot = torch.stack([_dot(p).to(device, wide) for p in of_tables]).sum()
    norms = [
        torch.stack([torch.linalg.vector_norm(one, dtype=wide_dtype(one.device)).to(device) for one in some]).norm()
        for some in (parts, [p.grad for p in parts if p.grad is not None])
    ]
    cosine: Tensor = dot / (norms[0] * norms[1])
    return cosine.clamp(0.0, 1.0)


def _is_there(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or is_sharded(parameter) or parameter.is_meta:
        return False
    return parameter.numel() > 0 and parameter.dtype in _FLOATS


def _dot(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    weight = parameter.detach()
    weight, gradient = weight.flatten(), gradient.flatten()
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight, gradient = weight.float(), gradient.float()
    parts = zip(weight.split(_MOST), gradient.to(weight.dtype).split(_MOST), strict=True)
    return torch.stack([torch.dot(*part) for part in parts]).sum()
