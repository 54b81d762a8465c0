"""Recurrences and embeddings that no usual initialisation gives, drawn anew by the book."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.recurrent import reinitialise_recurrence
from lightning_gradflow.remedies.textbook import initialise
from lightning_gradflow.remedies.through_time import TimeWatch

_SHUT = 4.0  # of a bias: a sigmoid is within 2 % of its bound
_MOST = 0.5  # of the gates: biases made for a long memory shut two kinds out of four
_MAX_GROWTH = 3.0  # decades through time: networks that learn gain up to 2.5
_COPIES = 0.01  # share of a matrix that its rows differ by
_FEWEST_ROWS, _FEWEST = 4, 64  # of a matrix, and entries: a few numbers are alike by chance
_ALIKE = 0.7  # of its size, what the rows of a matrix differ by: 1 of independent ones, 0.5 of entries in (0, 1)
_SMALL, _LARGE = 0.1, 4.0  # the weights of a recurrence, or an embedding, times sqrt(fan_in); large ones make chaos


def draw_unusual(
    module: nn.Module, run: Callable[[], None], seed: int, *, with_small_tables: bool = True
) -> dict[str, Sequence[nn.Parameter]]:
    """Draws recurrences and embeddings anew whose weights no usual initialisation gives, by the book.

    They have no gain that could be measured from one layer to the next: it is their weights that are above
    `4 / sqrt(fan_in)`, below `0.1 / sqrt(fan_in)`, or, of a recurrence, the same in all rows. That from one time step
    to the next is taken to the power of their number: weights of a usual size are unusual where it blows a gradient up.
    So are biases that shut most of the gates.

    Args:
        module: whose parameters are changed.
        run: makes a forward pass of it.
        seed: the same on all ranks.
        with_small_tables: whether embeddings that are too small count, too.

    Returns:
        By the names of their modules, the parameters of these. Left alone is what is frozen, tied or looks trained.

    Example:
        >>> net = nn.Sequential(nn.Embedding(50, 16))
        >>> net[0].weight.data *= 100
        >>> list(draw_unusual(net, lambda: None, seed=0)), bool(net[0].weight.std() < 2)
        (['0'], True)
    """
    generator = torch.Generator().manual_seed(seed)
    steps = _blown_up(module, run, seed)
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, (nn.RNNBase, nn.RNNCellBase, nn.Embedding)):
            continue
        own = list(part.parameters(recurse=False))
        weights = [p for p in own if p.dim() > 1]
        is_own = all(owners[p] == 1 and p.requires_grad and looks_fresh(p) for p in weights)
        least = 0.0 if isinstance(part, nn.Embedding) and not with_small_tables else _SMALL
        is_usual = all(_is_usual(part, p, least) for p in weights) and not _is_shut(part) and name not in steps
        if not is_own or is_usual:
            continue
        if isinstance(part, nn.Embedding):
            fresh = initialise(part, "lecun", generator)
        else:
            fresh = reinitialise_recurrence(part, generator, steps.get(name))
        if fresh:
            drawn[name] = own
    return drawn


def is_too_large(weight: Tensor) -> bool:
    """Whether weights that look as drawn are of a size that no usual initialisation gives.

    Args:
        weight: (units, inputs, ...).

    Example:
        >>> is_too_large(torch.randn(8, 64, generator=torch.Generator().manual_seed(0))), is_too_large(torch.eye(8))
        (True, False)
    """
    return _rms(weight) * math.sqrt(weight[0].numel()) > _LARGE and looks_fresh(weight)


def _blown_up(module: nn.Module, run: Callable[[], None], seed: int) -> dict[str, int]:
    """Recurrence -> its time steps, of those in which a random gradient gains more than any that learns does."""
    names = [name for name, part in module.named_modules() if isinstance(part, (nn.RNNBase, nn.RNNCellBase))]
    if not names:
        return {}
    watch = TimeWatch(module, names, run, seed)
    profiles = {name: watch.profile(name) for name in names}
    return {name: it.steps for name, it in profiles.items() if it is not None and it.span > _MAX_GROWTH}


def _is_usual(part: nn.RNNBase | nn.RNNCellBase | nn.Embedding, weight: Tensor, least: float) -> bool:
    """Initialisations differ in what they go by: inputs or units of the state, one token or the width of embeddings."""
    if not isinstance(part, nn.Embedding) and are_alike(weight):  # a table of gains starts with ones
        return False
    size = _rms(weight)
    fans = (1, weight.shape[1]) if isinstance(part, nn.Embedding) else (weight.shape[1], part.hidden_size)
    return size * math.sqrt(max(fans)) >= least and size * math.sqrt(min(fans)) <= _LARGE


def _rms(weight: Tensor) -> float:
    return float(weight.detach().double().square().mean().sqrt())


@torch.no_grad()
def are_alike(weight: Tensor) -> bool:
    """Whether the rows of a matrix have more in common than they differ by: all units look at nearly the same sum.

    Example:
        >>> are_alike(torch.full((8, 4), 0.01)), are_alike(torch.eye(4)), are_alike(torch.zeros(4, 4))
        (True, False, False)
        >>> are_alike(torch.rand(64, 64))
        True
    """
    rows = weight.detach().flatten(1).double()
    share = _ALIKE if len(rows) >= _FEWEST_ROWS and rows.numel() >= _FEWEST else _COPIES
    return len(rows) > 1 and bool((rows - rows.mean(0)).norm() < share * rows.norm())


@torch.no_grad()
def _is_shut(part: nn.Module) -> bool:
    """Whether the biases alone shut most of the gates of a recurrence, in some layer of it."""
    biases: dict[str, Tensor] = {}
    for key, bias in part.named_parameters(recurse=False):
        if key.startswith("bias_") and not isinstance(part, nn.Embedding):
            layer = key.replace("_ih", "").replace("_hh", "")
            biases[layer] = biases.get(layer, torch.zeros(())) + bias.cpu().double()
    return any(float((bias.abs() > _SHUT).double().mean()) > _MOST for bias in biases.values())
