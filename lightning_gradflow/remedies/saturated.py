"""Fresh weights for layers whose size is usual, and whose activation stands at its bounds all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.history import Point
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.textbook import initialise, name_for


@torch.no_grad()
def draw_saturated(
    module: nn.Module, names: Sequence[str], points: Sequence[Point], seed: int
) -> Mapping[str, Sequence[nn.Parameter]]:
    """Draws by the book the layers right before activations that saturate: a bias alone may hold these at a bound.

    Layers that look trained, are frozen or share parameters stay.

    Args:
        module: the model, or a copy of it.
        names: modules of the activations, or of the layers that they are called behind.
        points: of the model, in order of execution.
        seed: the same on all ranks.

    Returns:
        The parameters of the layers that were drawn, by the names of the layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Sigmoid())
        >>> _ = nn.init.constant_(net[0].bias, 25.0)
        >>> points = [Point("0", "0"), Point("1", "1", "sigmoid")]
        >>> [*draw_saturated(net, ["1"], points, seed=0)], net[0].bias.tolist()
        (['0'], [0.0, 0.0])
    """
    modules = dict(module.named_modules())
    owners = Counter(p for part in modules.values() for p in part.parameters(recurse=False))
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    layer = ""
    for point in points:
        if point.is_layer:
            layer = point.module
        elif point.op in BOUNDED and point.module in names and layer in modules and layer not in drawn:
            own = list(modules[layer].parameters(recurse=False))
            is_free = all(owners[p] == 1 and p.requires_grad and (p.dim() < 2 or looks_fresh(p)) for p in own)
            if is_free and initialise(modules[layer], name_for(point.op), generator, after=point.op):
                drawn[layer] = own
    return drawn
