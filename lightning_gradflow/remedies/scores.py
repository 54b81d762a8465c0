"""The scores of attention, whose softmax stands at its bounds where they are large."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradflow.probes.comparisons import around_mean
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.softmax_scores import CHOOSING, choices
from lightning_gradflow.remedies.bare_uses import eager
from lightning_gradflow.remedies.fresh import looks_fresh

_LARGE = 2.0  # deviation: with more a few positions take it all
_ROUNDS = 64  # softmaxes of a network that are seen to
_ONE_FACTOR = (0.8, 1.2)  # d ln(deviation) / d ln(weight) of what makes one side of a product; biases take a little


def calm_scores(module: nn.Module, forward: Callable[[], None]) -> dict[str, Sequence[nn.Parameter]]:
    r"""Scales queries and keys down whose products are large, so that the scores of each softmax have deviation 1.

    Weights that keep the size of a signal give queries and keys whose entries have variance 1, and the product of two
    with d entries has the deviation :math:`\sqrt d` unless it is divided by that. The softmax of large scores takes one
    position each, and lets no gradient through. Where their deviation s over the positions is above 2, all weights W
    with

    .. math:: \frac{1}{s} \left\langle W, \frac{\partial s}{\partial W} \right\rangle \approx 1

    which make one side of the product each, are multiplied by the same factor. Weights before a normalisation have 0
    there, those that feed both sides 2. Of a weight that makes queries, keys and values in one, the first two thirds of
    the rows are such sides.

    Args:
        module: the model, or a copy of it.
        forward: makes a forward pass of it on a batch, with autograd on, always the same.

    Returns:
        Name -> parameters, of the modules whose weights were scaled. Weights that are shared, frozen or look trained
        are left as they are.

    References:
        Vaswani et al. 2017, Attention is all you need, section 3.2.1.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        ...         for layer in (self.q, self.k, self.v):
        ...             _ = nn.init.orthogonal_(layer.weight)
        ...
        ...     def forward(self, x):
        ...         return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        >>> net, x = Attention(), torch.randn(4, 9, 64)
        >>> [*calm_scores(net, lambda: net(x))], bool(net.q.weight[0].norm() < 0.5)
        (['q', 'k'], True)
    """
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    parts = {p: (name, part) for name, part in module.named_modules() for p in part.parameters(recurse=False)}
    weights = [p for p in parts if p.dim() > 1 and p.requires_grad and owners[p] == 1 and not is_sharded(p)]
    changed: dict[str, Sequence[nn.Parameter]] = {}
    first = 0
    for _ in range(_ROUNDS if weights else 0):
        with eager(), _Watch() as watch:
            forward()
        # what is changed changes all that comes later
        for at, spread in enumerate(watch.spreads[first:], first):
            sides = [(p, rows) for p, rows in _sides(spread, weights) if looks_fresh(p)]
            if sides:
                with torch.no_grad():
                    for weight, rows in sides:
                        weight[rows].mul_(float(spread.detach()) ** (-1 / len(sides)))
                weights = [p for p in weights if all(p is not side for side, _ in sides)]
                changed |= {parts[p][0]: list(parts[p][1].parameters(recurse=False)) for p, _ in sides}
                first = at + 1
                break
        else:
            break
    return changed


def _sides(spread: Tensor, weights: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, slice]]:
    """The weights that make one side of the product each, and their rows that do, of scores that are too large."""
    size = float(spread.detach())
    if not _LARGE < size < math.inf:
        return []
    slopes: Sequence[Tensor | None] = torch.autograd.grad(spread, weights, allow_unused=True, retain_graph=True)
    found = []
    for weight, slope in zip(weights, slopes, strict=True):
        if slope is None:
            continue
        by_row = (weight.detach() * slope).double().flatten(1).sum(1) / size
        third = len(by_row) // 3
        queries, keys = slice(0, third), slice(third, 2 * third)
        if _is_side(by_row):
            found.append((weight, slice(None)))
        elif len(by_row) == 3 * third and _is_side(by_row[queries]) and _is_side(by_row[keys]):
            found += [(weight, queries), (weight, keys)]
    return found


def _is_side(by_row: Tensor) -> bool:
    low, high = _ONE_FACTOR
    return low < float(by_row.sum()) < high


class _Watch(TorchFunctionMode):
    """Takes down the deviation of the scores of each softmax, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in CHOOSING:
            with torch._C.DisableTorchFunction():
                scores = choices(func, args, kwargs)
                if scores is not None:
                    self._see(scores)
        return result

    def _see(self, scores: Tensor) -> None:
        if scores.dim() < 2 or not scores.requires_grad or scores.shape[-1] < 2:
            return
        deviations, there = around_mean(scores.float())
        self.spreads.append((deviations.square().sum() / there.sum().clamp(min=1)).sqrt())
