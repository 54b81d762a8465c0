"""Batches in which no sample comes twice."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FEWEST = 2  # samples of a batch: of one there is nothing to deal
_LEFT = 0.5  # of the batches: where fewer are left, samples that are alike are the rule, and not the same ones


def without_repeats(batches: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """The same batches without the samples that came in an earlier one.

    Batches that share samples agree on them, noise or not, and so a sampler that draws with replacement makes targets
    look as if they followed from the inputs. Samples are the same where all numbers of them are.

    Args:
        batches: each with its number; lists, tuples or dictionaries, of tensors with one row for each sample.

    Returns:
        All as they are where one is of another kind, or where hardly anything would be left.

    Example:
        >>> x, y = torch.arange(4.0), torch.arange(4)
        >>> [batch[0].tolist() for batch, _ in without_repeats([([x, y], 0), ([x + 2, y + 2], 1)])]
        [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]]
    """
    seen: set[bytes] = set()
    kept: list[tuple[Any, int]] = []
    for batch, at in batches:
        rows = _rows(batch)
        if rows is None:
            return list(batches)
        new = [i for i, row in enumerate(rows) if row not in seen]
        seen.update(rows)
        if len(new) >= _FEWEST:
            kept.append((batch if len(new) == len(rows) else _chosen(batch, new), at))
    return kept if len(kept) >= _LEFT * len(batches) else list(batches)


def _parts(batch: Any) -> dict[Any, Any] | None:
    if isinstance(batch, MutableMapping):
        return dict(batch)
    return dict(enumerate(batch)) if isinstance(batch, (list, tuple)) else None


def _rows(batch: Any) -> list[bytes] | None:
    """What each sample consists of; None where that cannot be told."""
    parts = _parts(batch)
    tensors = [part for part in (parts or {}).values() if isinstance(part, Tensor)]
    if any(isinstance(part, (Mapping, list, tuple)) for part in (parts or {}).values()):
        return None
    if not tensors or any(not tensor.dim() or len(tensor) != len(tensors[0]) for tensor in tensors):
        return None
    if any(tensor.layout is not torch.strided or len(tensor) == 0 for tensor in tensors):
        return None
    flat = [t.detach().reshape(len(t), -1).contiguous().view(torch.uint8).cpu().numpy() for t in tensors]
    return [b"".join(array[i].tobytes() for array in flat) for i in range(len(flat[0]))]


def _chosen(batch: Any, samples: Sequence[int]) -> Any:
    parts = _parts(batch) or {}
    fewer = {name: part[list(samples)] if isinstance(part, Tensor) else part for name, part in parts.items()}
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        copied.update(fewer)
        return copied
    return type(batch)._make(fewer.values()) if hasattr(batch, "_make") else type(batch)(fewer.values())
