"""Units that are copies of one another are drawn anew, each by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lightning_gradflow.probes.copied_units import FEWEST, spread_along
from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.probes.tables import EMBEDDINGS, tables
from lightning_gradflow.remedies.recurrent import reinitialise_recurrence
from lightning_gradflow.remedies.textbook import assign, initialise, name_for

_ALIKE = 1e-3  # of their size, as where it is found


def break_symmetry(
    module: nn.Module, layers: Iterable[str], around: Mapping[str, tuple[str, str]], seed: int
) -> dict[str, Sequence[nn.Parameter]]:
    """Draws these layers by the initialisation that is made for what follows them.

    Of a module of the user's own those matrices are drawn, by Glorot's initialisation, that are made of copies along
    some axis. Layers that share weights, are frozen in part, or of a kind that no initialisation is known for, are left
    as they are.

    Args:
        module: the model, or a copy of it.
        layers: names of its layers, in order of execution.
        around: for each layer the activations that its input comes from and that follow.
        seed: the same seed gives the same weights on every rank.

    Returns:
        name -> the parameters that were drawn.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = nn.init.constant_(net[0].weight, 0.1)
        >>> drawn = break_symmetry(net, ["0"], {"0": ("", "relu")}, seed=0)
        >>> list(drawn), bool(net[0].weight.std(0).min() > 0)
        (['0'], True)
    """
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    parts = dict(module.named_modules())
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    for layer in layers:
        name = "" if layer == ROOT else layer
        part = parts.get(name)
        own = list(part.parameters(recurse=False)) if part is not None else []
        if part is None or not all(owners[p] == 1 and p.requires_grad for p in own):
            continue
        fresh: Sequence[nn.Parameter]
        if matrices := [p for p in tables(part) if not isinstance(part, EMBEDDINGS) and _is_copied(p)]:
            for matrix in matrices:
                assign(matrix, nn.init.xavier_normal_(torch.empty(matrix.shape), generator=generator))
            fresh = matrices
        elif isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
            fresh = reinitialise_recurrence(part, generator)
        else:
            before, after = around.get(name, ("", ""))
            fresh = initialise(part, name_for(after), generator, before=before, after=after)
        if fresh:
            drawn[name] = own
    return drawn


def _is_copied(matrix: nn.Parameter) -> bool:
    axes = [axis for axis in range(matrix.dim()) if matrix.shape[axis] >= FEWEST]
    return any(bool(spread_along(matrix, axis) < _ALIKE) for axis in axes)
