"""Tables that are far too large for what is done with their rows, drawn anew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import ROOT, module_named
from lightning_gradflow.probes.tables import EMBEDDINGS, tables
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.textbook import assign

_SHORT = 0.1  # of a row, where 1 is usual
_MAX_PRODUCT = 2.0  # deviation of the product of two rows: those that were trained for targets of size 1 give less


@torch.no_grad()
def draw_tables(
    module: nn.Module, layers: Collection[str], multiplied: Collection[tuple[str, str]], seed: int
) -> dict[str, Sequence[nn.Parameter]]:
    r"""Draws the tables of these layers so that their rows have length 1.

    A row of d entries with variance :math:`1 / d` has length 1, and the product of two of them, which lies in
    [-1, 1], the variance :math:`1 / d`: so it is for two tables whose rows are multiplied with each other, for one that
    is the output matrix as well, and takes what a normalisation gives, and for the sum over the pairs of a few. What
    has the size of a row is no more than what others add to it. This is LeCun's rule, with the width as the fan-in.

    Beside rows of length 1 those of other tables that are added to them, such as the positions of a transformer, would
    be all that is seen. What is added to what is not looked at: large tables whose rows have as many entries are drawn
    with them.

    Args:
        module: whose parameters are changed.
        layers: the embeddings, and modules of the user's own, that it is about.
        multiplied: owner and name of matrices that something is multiplied by as by those of a layer: they are none.
        seed: the same on all ranks.

    Returns:
        By the names of their modules, the parameters of these. Left alone are tables that are frozen or look trained,
        and those of which the product of two rows has a deviation of 2 or less; rows for padding stay zero.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.6; Rendle 2010, Factorization machines.

    Example:
        >>> net = nn.Sequential(nn.Embedding(50, 16))
        >>> list(draw_tables(net, ["0"], (), seed=0)), bool(net[0].weight.std() < 0.3)
        (['0'], True)
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    lengths: set[int] = set()
    names = dict.fromkeys("" if layer == ROOT else layer for layer in layers)
    beside = [name for name, _ in module.named_modules() if name not in names]
    for name in (*names, *beside):
        part = module_named(module, name)
        own = {id(p): key for key, p in part.named_parameters(recurse=False)}
        for table in tables(part):
            if (name, own[id(table)]) in multiplied or not table.requires_grad or not _is_large(table):
                continue
            if name in names:
                lengths.add(table.shape[-1])
            elif table.shape[-1] not in lengths:
                continue
            fresh = torch.empty(table.shape).normal_(0, 1 / math.sqrt(table.shape[-1]), generator=generator)
            if isinstance(part, EMBEDDINGS) and part.padding_idx is not None:
                fresh[part.padding_idx] = 0
            assign(table, fresh)
            drawn[name] = list(part.parameters(recurse=False))
    return drawn


def tied_embeddings(module: nn.Module) -> list[str]:
    """The embeddings whose table is a parameter of another module as well, such as the output layer.

    Example:
        >>> net = nn.ModuleList([nn.Embedding(5, 2), nn.Linear(2, 5), nn.Embedding(5, 2)])
        >>> net[1].weight = net[0].weight
        >>> tied_embeddings(net)
        ['0']
    """
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    embeddings = ((name, part) for name, part in module.named_modules() if isinstance(part, EMBEDDINGS))
    return [name for name, part in embeddings if any(owners[p] > 1 for p in part.parameters(recurse=False))]


def has_short_rows(module: nn.Module) -> bool:
    """Whether the rows of a tied embedding are a tenth as long as usual, or less.

    Beside others that are drawn anew, such as the positions of a transformer, they would not be seen; and what is right
    for a table is not for the output layer that shares it.

    Example:
        >>> net = nn.ModuleList([nn.Embedding(50, 16), nn.Linear(16, 50)])
        >>> net[1].weight = net[0].weight
        >>> _ = nn.init.normal_(net[0].weight, std=1e-3)
        >>> has_short_rows(net), has_short_rows(net[:1])
        (True, False)
    """
    shared = (p for name in tied_embeddings(module) for p in module.get_submodule(name).parameters(recurse=False))
    return any(float(p.detach().double().square().mean()) * p.shape[-1] < _SHORT**2 for p in shared)


def _is_large(table: Tensor) -> bool:
    """Whether products of its rows are too large, and it is as it was drawn."""
    rows = table.detach().reshape(-1, table.shape[-1])
    product = float(rows.double().square().mean()) * math.sqrt(rows.shape[1])
    return product > _MAX_PRODUCT and looks_fresh(rows)
