"""Attention of torch's drawn anew, whose weights are hidden from what measures the gain of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lightning_gradflow.detectors.small_weights import SmallWeights
from lightning_gradflow.probes.weight_size import weight_size
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.sick_layers import FAR
from lightning_gradflow.remedies.textbook import initialise
from lightning_gradflow.remedies.unusual import are_alike


@torch.no_grad()
def draw_attention(module: nn.Module, seed: int) -> dict[str, Sequence[nn.Parameter]]:
    """Draws each `MultiheadAttention` anew whose weights no usual initialisation gives.

    Its weights are multiplied with in one function, so that no gain can be measured of them. The logits grow with the
    square of them, and a softmax of large logits takes one position each and lets no gradient through. All of it is
    drawn by the book (Glorot, by block) where a weight is above `1 / sqrt(fan_in)` by more than a factor of 4, the root
    mean square of its entries; where one of the inputs is below that by a factor of 25, and not zero; or where its rows
    are all but alike, as positive ones are.

    Args:
        module: the model, or a copy of it.
        seed: the same on all ranks.

    Returns:
        Name -> parameters, of what was drawn. Weights that are shared or look trained are left as they are.

    References:
        Vaswani et al. 2017, Attention is all you need; Zhai et al. 2023, Stabilizing transformer training by preventing
        attention entropy collapse.

    Example:
        >>> attention = nn.MultiheadAttention(16, 2)
        >>> _ = nn.init.normal_(attention.in_proj_weight, std=2.0, generator=torch.Generator().manual_seed(0))
        >>> [*draw_attention(attention, 0)], bool(attention.in_proj_weight.std() < 0.3)
        (['', 'out_proj'], True)
    """
    generator = torch.Generator().manual_seed(seed)
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, nn.MultiheadAttention):
            continue
        weights = [p for p in part.parameters() if p.dim() == 2 and p.requires_grad]
        is_own = all(owners[p] == 1 and (are_alike(p) or looks_fresh(p)) for p in weights)
        if not is_own or all(_is_usual(part, p) for p in weights):
            continue
        for key, one in ((name, part), (f"{name}.out_proj".lstrip("."), part.out_proj)):
            if initialise(one, "glorot", generator):
                drawn[key] = list(one.parameters(recurse=False))
    return drawn


def _is_usual(attention: nn.MultiheadAttention, weight: nn.Parameter) -> bool:
    """Whether some initialisation gives such a weight; that of the output may be made for many residual branches."""
    size = float(weight_size(attention, weight))
    least = 0.0 if weight is attention.out_proj.weight else SmallWeights.min_size
    return size == 0 or (least <= size <= FAR and not are_alike(weight))
