"""The gains of norm layers start from 1, and biases from 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.norm_gains import gains_of
from lightning_gradflow.remedies.gains import WEIGHTED
from lightning_gradflow.remedies.textbook import assign

_SHUT = 4.0  # deviations of what a norm gives, and a number: a sigmoid is within 2 % of its bound
_MOST = 0.5  # of the units
_FAR = 8.0  # that of a probability of one in three thousand, for a score
_SHUTTING = 2.0  # more than what most inputs of usual size bring


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


def reset_biases(module: nn.Module, kept: Collection[str] = ()) -> dict[str, Sequence[nn.Parameter]]:
    """Sets the biases of norm layers to 0 that shut most of the units behind them, where they are no other's.

    No weights before a norm can make up for these: it takes their size away. Most biases are above 4, and above 4
    times the gain, which is the deviation of what the norm gives.

    Args:
        module: the model, or a copy of it.
        kept: names of layers that keep theirs: before a gate it may be meant so, and the last one shuts nothing.

    Returns:
        name -> all parameters of the layers whose biases were set.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sigmoid())
        >>> _ = nn.init.constant_(net[1].bias, -10.0)
        >>> list(reset_biases(net)), net[1].bias.tolist()
        (['1'], [0.0, 0.0])
    """

    def limit(part: nn.Module) -> Tensor | None:
        gains = gains_of(part)
        return _SHUT * gains.detach().abs().clamp(min=1.0) if gains is not None else None

    return _without_biases(module, kept, limit)


def reset_far_biases(module: nn.Module, kept: Collection[str] = ()) -> dict[str, Sequence[nn.Parameter]]:
    """Sets the biases of linear layers and convolutions to 0 that are above 8 in most units, where they are no other's.

    No weights before make up for what comes of it: behind an exponential that is a factor of three thousand.

    Args:
        module: the model, or a copy of it.
        kept: names of layers that keep theirs: where targets lie may be known.

    Returns:
        name -> all parameters of the layers whose biases were set.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = nn.init.constant_(net[0].bias, 12.0)
        >>> list(reset_far_biases(net)), net[0].bias.tolist()
        (['0'], [0.0, 0.0])
    """
    return _without_biases(module, kept, lambda part: torch.tensor(_FAR) if isinstance(part, WEIGHTED) else None)


def reset_shutting(
    module: nn.Module, layers: Collection[str], kept: Collection[str] = ()
) -> dict[str, Sequence[nn.Parameter]]:
    """Sets those of some layers to 0 that are below -2 in most units: the ends of residual branches add theirs up.

    Args:
        module: the model, or a copy of it.
        layers: names of its layers.
        kept: names of layers that keep theirs.

    Returns:
        name -> all parameters of the layers whose biases were set.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = nn.init.constant_(net[0].bias, -4.0), nn.init.constant_(net[1].bias, 4.0)
        >>> list(reset_shutting(net, ["0", "1"]))
        ['0']
    """
    others = {name for name, _ in module.named_modules() if name not in layers}

    def limit(part: nn.Module) -> Tensor | None:
        bias = part._parameters.get("bias")
        is_negative = bias is not None and bool((bias.detach() < 0).double().mean() > _MOST)
        return torch.tensor(_SHUTTING) if isinstance(part, WEIGHTED) and is_negative else None

    return _without_biases(module, others | {*kept}, limit)


def _without_biases(
    module: nn.Module, kept: Collection[str], limit_of: Callable[[nn.Module], Tensor | None]
) -> dict[str, Sequence[nn.Parameter]]:
    """Sets the biases to 0 of which most are above a limit; a part without a limit keeps its own."""
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    found: dict[str, Sequence[nn.Parameter]] = {}
    for name, part in module.named_modules():
        limit, bias = limit_of(part), part._parameters.get("bias")
        if limit is None or bias is None or name in kept or not bias.requires_grad or owners[bias] > 1:
            continue
        if float((bias.detach().abs() > limit.to(bias.device)).double().mean()) > _MOST:
            assign(bias, torch.zeros(bias.shape))
            found[name] = list(part.parameters(recurse=False))
    return found
