"""The gains of norm layers start from 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightning_gradflow.probes.norm_gains import gains_of
from lightning_gradflow.remedies.textbook import assign


def reset_gains(module: nn.Module, layers: Iterable[str]) -> dict[str, Sequence[nn.Parameter]]:
    """Sets the gains of these norm layers to 1, where they are no other's.

    Args:
        module: the model, or a copy of it.
        layers: names of its layers.

    Returns:
        name -> all parameters of the layers whose gains were set.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> _ = nn.init.normal_(net[1].weight, std=0.02)
        >>> list(reset_gains(net, ["0", "1"])), net[1].weight.tolist()
        (['1'], [1.0, 1.0])
    """
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    parts = dict(module.named_modules())
    found: dict[str, Sequence[nn.Parameter]] = {}
    for name in layers:
        gains = gains_of(parts[name]) if name in parts else None
        if gains is not None and owners[gains] == 1:
            assign(gains, torch.ones(gains.shape))
            found[name] = list(parts[name].parameters(recurse=False))
    return found
