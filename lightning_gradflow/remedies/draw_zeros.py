"""Weights that are zero, and that no step can change, are drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.probes.zero_weights import weights_of
from lightning_gradflow.remedies.recurrent import reinitialise_recurrence
from lightning_gradflow.remedies.textbook import assign, initialise, name_for


def draw_zeros(
    module: nn.Module, layers: Iterable[str], around: Mapping[str, tuple[str, str]], seed: int
) -> dict[str, Sequence[nn.Parameter]]:
    r"""Draws what is zero in these layers, and nothing else.

    - Recurrences by `reinitialise_recurrence`, and layers that have a textbook initialisation by the one that is made
      for what follows them, where all their weights are zero.
    - The scales of norm layers, and of whatever else has one number for a feature, become 1.
    - Matrices that a layer of the user's own holds become normal with the variance :math:`1 / fan_{in}`, but for the
      last of several where there is but one such layer: it may stay zero, so that the product does, and moves with the
      next step. In each layer of a chain it would block the others as before.

    Weights that are shared or frozen stay as they are.

    Args:
        module: the model, or a copy of it.
        layers: names of its layers, in order of execution.
        around: for each layer the activations that its input comes from and that follow.
        seed: the same seed gives the same weights on every rank.

    Returns:
        name -> all parameters of the layers in which something was drawn.

    References:
        Hu et al. 2021, LoRA: low-rank adaptation of large language models (one factor drawn, the other one zero);
        LeCun et al. 1998, Efficient backprop.

    Example:
        >>> adapter = nn.ParameterDict({"down": torch.zeros(2, 8), "up": torch.zeros(8, 2)})
        >>> drawn = draw_zeros(nn.Sequential(adapter), ["0"], {}, seed=0)
        >>> list(drawn), bool(adapter["down"].any()), bool(adapter["up"].any())
        (['0'], True, False)
    """
    owners = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    parts = dict(module.named_modules())
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Sequence[nn.Parameter]] = {}
    names = list(dict.fromkeys("" if layer == ROOT else layer for layer in layers))
    for name in names:
        part = parts.get(name)
        if part is None:
            continue
        weights = weights_of(part)
        zero = {key: p for key, p in weights.items() if owners[p] == 1 and not bool(p.detach().any())}
        spared = 1 if len(names) == 1 else 0
        if zero and _draw(part, zero, len(zero) == len(weights), around.get(name, ("", "")), generator, spared):
            drawn[name] = list(part.parameters(recurse=False))
    return drawn


def _draw(
    part: nn.Module,
    zero: Mapping[str, nn.Parameter],
    is_all: bool,
    around: tuple[str, str],
    generator: torch.Generator,
    spared: int,
) -> bool:
    if is_all:
        if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
            return bool(reinitialise_recurrence(part, generator))
        before, after = around
        if initialise(part, name_for(after), generator, before=before, after=after):
            return True
    scales = [p for p in zero.values() if p.dim() < 2]
    matrices = [p for p in zero.values() if p.dim() > 1]
    for parameter in scales:
        assign(parameter, torch.ones(parameter.shape))
    for parameter in matrices[: max(1, len(matrices) - spared)]:
        assign(parameter, _normal(parameter, generator))
    return bool(scales or matrices)


def _normal(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    fan_in = parameter.numel() / len(parameter)
    return torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
