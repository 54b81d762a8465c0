"""How weights are set while a forward pass goes on: drawn, centred and scaled by what comes out of each layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.weight_size import TRANSPOSED
from lightning_gradflow.remedies.bare_map import BareMap
from lightning_gradflow.remedies.gains import Link, by_unit
from lightning_gradflow.remedies.sick_layers import size_of
from lightning_gradflow.remedies.weights import set_weight

_MIN_CHANNELS = 4  # fewer would be left too little to tell samples apart by, once their mean makes no difference
_MAX_CENTRE = 8.0  # spreads that a mean may be away: of inputs that hardly vary the spread is no scale
_STEEP = 8.0  # slope behind a first layer: no activation has it, but what is multiplied before one
_PERIODS = 8.0  # deviation of what comes behind it: a sine network starts with 7 to 10, one or two periods either way
_MAX_FACTOR = 8.0  # by which a weight is scaled in one round


@dataclass(frozen=True)
class Centre:
    """Where the inputs of a layer lie on the batch.

    Args:
        mean: (F,) of each feature.
        spread: root mean square of what is around it, over all features; an eighth of that of the mean or more.
    """

    mean: Tensor
    spread: float


def centre_of(layer: nn.Module, source: Tensor) -> Centre | None:
    """Where the inputs of a layer lie; None where that is nearer to 0 than they spread."""
    values = by_unit(layer, source)
    mean = values.mean(0)
    spread = float((values - mean).square().mean().sqrt())
    size = float(mean.square().mean().sqrt())
    return Centre(mean.float().cpu(), max(spread, size / _MAX_CENTRE)) if size > spread > 0 else None


@torch.no_grad()
def draw(layer: nn.Module, generator: torch.Generator, *, keeps_bias: bool = False) -> None:
    """Gives a layer an orthogonal weight, one for each group of a convolution, and a bias of 0.

    Args:
        layer: is changed.
        generator: on the CPU.
        keeps_bias: whether a bias that is finite stays as it is.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    fresh = torch.empty(weight.shape)
    for group in fresh.chunk(getattr(layer, "groups", 1)):
        by_output = group.transpose(0, 1) if isinstance(layer, TRANSPOSED) else group
        drawn = torch.empty(by_output.shape)
        nn.init.orthogonal_(drawn, generator=generator)
        by_output.copy_(drawn)
    set_weight(layer, fresh)
    bias = layer.bias
    if isinstance(bias, nn.Parameter) and bias.requires_grad and not (keeps_bias and bool(torch.isfinite(bias).all())):
        bias.zero_()


@dataclass(frozen=True)
class Adjustment:
    """Centres and scales the layers that were drawn anew, in the course of a forward pass.

    Args:
        names: of these layers.
        last: names of layers whose output no other takes.
        aims: the gain that each is to have.
        known: what the pass before has measured; nothing before the first, and of what is to have variance 1.
        gates: those of these layers that keep their bias.
    """

    names: frozenset[str]
    last: frozenset[str]
    aims: Mapping[str, float]
    known: Mapping[str, Link]
    gates: frozenset[str]
    sizes: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, name: str, layer: nn.Module, source: Tensor, output: Tensor) -> bool:
        """Sets one layer (see `gains.Adjust`); whether it is one of these."""
        if name not in self.names:
            return False
        if _leave_out_mean(layer, source):
            output = layer.forward(source)
        values = by_unit(layer, output)
        mean = values.mean(0)
        if not bool(torch.isfinite(mean).all()):  # what comes in is not
            return False
        factor = self._factor(name, float((values - mean).square().mean().sqrt()))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if name in self.last and (size := size_of(layer)) > 0:
            factor = min(factor, self._largest() / size)
        set_weight(layer, weight * factor)
        self.sizes[name] = size_of(layer)
        if isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad and name not in self.gates:
            layer.bias.copy_((layer.bias.double() - mean.to(layer.bias.device)) * factor)
        return True

    def _largest(self) -> float:
        """How large weights of a last layer may be: as those drawn before it, in the median, or what keeps a size."""
        inner = [size for name, size in self.sizes.items() if name not in self.last]
        return max(statistics.median(inner), 1.0) if inner else 1.0

    def _factor(self, name: str, spread: float) -> float:
        link = self.known.get(name)
        if link is None or link.is_first or link.is_normalised or not link.is_known:
            # at variance 1 no activation is far from where its gain is 1; an output of that size is a safe start
            wanted = self._wanted_spread(link) / spread if spread > 0 else 1.0
            return wanted if math.isfinite(wanted) else 1.0
        wanted = self.aims[name] / link.growth if link.growth > 0 else 1.0
        if not link.is_chain and link.own_gain > 0:  # past a softmax or a norm hardly anything comes through a branch
            wanted = min(wanted, 1 / link.own_gain)
        return min(max(wanted, 1 / _MAX_FACTOR), _MAX_FACTOR) if math.isfinite(wanted) else 1.0

    @staticmethod
    def _wanted_spread(link: Link | None) -> float:
        """Of the output of a first layer: 1, or less where what follows multiplies it, as sin(30 * x) does."""
        is_steep = link is not None and link.is_first and link.gain > _STEEP * link.own_gain > 0
        return _PERIODS * link.own_gain / link.gain if is_steep and link is not None else 1.0


class Look:
    """Takes down where the inputs of these layers lie."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.centres: dict[str, Centre] = {}

    @torch.no_grad()
    def __call__(self, name: str, layer: nn.Module, source: Tensor, _output: Tensor) -> bool:
        """Looks at what one layer takes (see `gains.Adjust`), and changes nothing."""
        if name in self._names and not isinstance(layer, BareMap):
            centre = centre_of(layer, source)
            if centre is not None:
                self.centres[name] = centre
        return False


@torch.no_grad()
def _leave_out_mean(layer: nn.Module, source: Tensor) -> bool:
    """Makes a padded convolution blind to the mean of its inputs, where that is larger than what varies.

    A bias takes the mean away in the middle of an image, not at its border, where the padding is 0 and not the mean:
    what is left there is the same for every sample, and soon larger than what differs.
    """
    padding = getattr(layer, "padding", "valid")
    is_padded = padding == "same" or (isinstance(padding, tuple) and any(padding))
    if not is_padded or isinstance(layer, TRANSPOSED) or getattr(layer, "groups", 1) != 1:
        return False
    centre = centre_of(layer, source)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if centre is None or len(centre.mean) < _MIN_CHANNELS:
        return False
    by_input = weight.movedim(1, -1)
    mean = (centre.mean / centre.mean.norm()).to(weight)
    set_weight(layer, (by_input - (by_input @ mean)[..., None] * mean).movedim(-1, 1))
    torch.clear_autocast_cache()  # it holds the weights as they were
    return True
