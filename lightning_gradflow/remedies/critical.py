"""Critical initialisation from data: the signal keeps its size in every layer, on a batch of the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.weight_size import TRANSPOSED
from lightning_gradflow.remedies.bare_map import BareMap
from lightning_gradflow.remedies.gains import Gains, Link, by_unit
from lightning_gradflow.remedies.sick_layers import MAX_OFF, Choice, decades, looks_drawn, size_of
from lightning_gradflow.remedies.weights import parameters_of, set_weight

_MIN_ROUNDS = 5
"""Forward passes that set the gains, at most, or one for each layer, where that is more: most settle in ten, but behind
a GELU a layer does only after those before it."""
_SETTLED = 0.05  # decades that all gains together may be off
_MIN_CHANNELS = 4  # fewer would be left too little to tell samples apart by, once their mean makes no difference
_MAX_CENTRE = 8.0  # spreads that a mean may be away: of inputs that hardly vary the spread is no scale
_MAX_FACTOR = 8.0  # by which a weight is scaled in one round
_LARGER = 2.0  # times, of a spread, and of the gain that falls with it: what comes in changes in a round as well


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


@dataclass(frozen=True)
class Treated:
    """What came of it.

    Args:
        changed: name -> the parameters that were drawn anew, as they are in the module that was given.
        before: layer -> what was measured, in order of execution.
        after: the same afterwards.
        centres: of these layers and those that follow them, such as an output layer, those whose inputs lie farther
            from 0 than they spread, as those behind a sigmoid do.
    """

    changed: Mapping[str, Sequence[nn.Parameter]]
    before: Mapping[str, Link]
    after: Mapping[str, Link]
    centres: Mapping[str, Centre]

    @property
    def spans(self) -> tuple[float, float]:
        """Decades that the signal gains on its way back through all layers whose gain is known, before and after."""
        return _span(self.before), _span(self.after)

    @property
    def outputs(self) -> tuple[float, float]:
        """The largest spread of an output that no layer takes, before and after; NaN where none is finite."""
        return _last_spread(self.before), _last_spread(self.after)


def make_critical(
    module: nn.Module,
    forward: Callable[[], None],
    seed: int = 0,
    max_off: float = MAX_OFF,
    max_spread: float = math.inf,
    only: Collection[str] | None = None,
    gates: Collection[str] = (),
    always: Collection[str] = (),
) -> Treated:
    """Draws the layers anew that do not keep the size of the signal, and sets their gain to 1 on the batch.

    Each such layer gets an orthogonal weight, one for each group of a convolution. Then, in forward passes until it
    settles, and layer by layer in order of execution, its bias, where it has one, is shifted so that each unit's output
    has mean 0 on the batch, and its weight is scaled so that the norm of a random gradient is the same at the next
    layer's input and at its own; that of the first layer, to whose input no gradient goes, so that its output has
    variance 1; and so is that of the last, unless that takes larger weights than those of the layers drawn before it,
    in the median, and larger ones than `1 / sqrt(fan_in)`; and that of one through which larger weights let less, as
    where the largest of what a bounded activation gives is taken. Where what the next layer takes comes from other
    layers too, as at the end of a residual branch, the gain is `1 / sqrt(number of such layers)`, so that all of them
    together keep the size. Before a last layer that has to stay as it is, such as one tied to an embedding, and whose
    weights are too large by more than a factor of 4, it is that much less. Glorot's, He's and the orthogonal
    initialisation come out where their assumptions hold. A padded convolution is made blind to the mean of its inputs,
    where that is larger than what varies.

    A layer is drawn anew if it has entries that are not finite, or if its weights look as they were drawn and

    - its gain is off by more than `max_off`, and either is above 4, or the gains of the layers that follow each other
      without a residual or a branch between change the signal by more than a factor of 10 together: less has no say in
      whether a network learns; or, between two others, its output has a spread above 4, where a bounded activation is
      at its bounds;
    - as a first layer, its output has a spread off 1 by more than a factor of 10, or the slope behind it is a tenth or
      less;
    - as a first layer of a network in which others are drawn, its output has a spread off 1 by more than `max_off`,
      where that is below 4: those behind it are made for 1. A slope behind it above 10, as that of `sin(30 * x)`, is
      meant: there a spread of 1 is none that the others are made for;
    - as a last one, its weights are off `1 / sqrt(fan_in)` by more than a factor of 10, and not 0;
    - as an end of a branch, its gain and that of its weights alone are above what the gain is to be by more than a
      factor of 4; or of 2, where the outputs of such ends grow tenfold from one to a later one: each adds to the sum,
      and takes it in;
    - where others are drawn, its weights are above `1 / sqrt(fan_in)` by more than a factor of 2: they were drawn as
      badly, and what follows, such as the norm of a sum of branches that are all too large, hides it;
    - where others are drawn, its weights are off `1 / sqrt(fan_in)` by more than a factor of 10, even if what follows
      makes up for it, as a norm does, and is no residual: steps are far too large beside weights that are too small;
    - where no layer is off by itself, its weights are so, and those of all such layers are above that by more than a
      factor of 10 together; or an output that none takes has a spread above 10: together they make it, and so do layers
      that gain more than a factor of 2 without a residual, as sums over neighbours do with usual weights. Only the
      former counts where `max_off` is 4 or more.

    A random gradient tells how a layer treats noise. What samples differ in may grow far more: behind weights that have
    a mean, or a sum or mean over numbers that are alike, as over the neighbours in a graph. Where it grows by more than
    twice the gain, that counts as the gain, unless it is too small. The weights of the end of a branch never gain more
    than 1 by themselves: through a softmax hardly any gradient comes, however large they are.

    The gain of a layer that is called several times in a pass is that of its first call, and counts as often in what
    layers do together.

    Left as they are: layers of less than 16 units or inputs in a network of which another layer looks trained; layers
    that are called with autograd off alone, that share weights, are frozen, or have a parametrization that can't make
    any weight that is asked for (weight norm can, spectral norm not).

    Args:
        module: the model, or a copy of it; its weights are changed.
        forward: makes a forward pass on a batch, with autograd on, always the same.
        seed: the same seed gives the same weights on every rank and device, but for rounding.
        max_off: factor by which a gain may be off before a layer is treated.
        max_spread: of a layer's output, before it is treated.
        only: names of the layers that may be drawn; None for all.
        gates: layers whose output opens or shuts a gate; they keep their bias, which says how far it stands open.
        always: layers that are drawn whatever was measured of them, unless they look trained, are tied or frozen.

    Returns:
        What was drawn, and what was measured before and after.

    References:
        Mishkin and Matas 2016, All you need is a good init; Schoenholz et al. 2017, Deep information propagation;
        Saxe et al. 2014; Zhang et al. 2019, Fixup initialization.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(*[m for _ in range(9) for m in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 2))
        >>> batch = torch.rand(64, 16)
        >>> before, after = make_critical(net, lambda: net(batch)).spans
        >>> before < -6, abs(after) < 0.3
        (True, True)
    """
    gains = Gains(module, forward, seed)
    modules = dict(module.named_modules())
    before = links = gains.measure()
    choice = Choice(module, before)
    if only is not None:
        choice.may &= {*only}
    generator = torch.Generator().manual_seed(seed)
    chosen = {name for name in always if name in before and looks_drawn(modules[name])}
    broken = [name for name in before if name in choice.may and (name in chosen or not _is_finite(modules[name]))]
    for name in broken:
        _draw(modules[name], generator, keeps_bias=name in gates)
    if broken:  # nothing can be measured behind a layer that gives NaN
        links = gains.measure(_Adjustment(frozenset(broken), _last(links), {}, {}, frozenset(gates)))
    sick = choice.sick(links, broken, max_off, max_spread)
    aims = choice.aims(links)
    for name in sick:
        _draw(modules[name], generator, keeps_bias=name in gates)
    last = _last(links)
    known: Mapping[str, Link] = {}
    past_peak: set[str] = set()
    for _ in range(max(_MIN_ROUNDS, len(sick)) if sick else 0):
        found = gains.measure(_Adjustment(frozenset(sick), last, aims, known, frozenset(gates)))
        both = [name for name in sick if name in known and name in found]  # experts may be called, or not
        past_peak |= {name for name in both if _is_past_peak(known[name], found[name], aims[name])}
        known = {name: link for name, link in found.items() if name not in past_peak}
        if _off(known, [name for name in sick if name in known], aims) < _SETTLED:
            break
    changed = {name: parameters_of(modules[name]) for name in sick}
    look = _Look(frozenset(sick) | (choice.may & {links[name].follower for name in sick}))
    return Treated(changed, before, gains.measure(look) if sick else before, look.centres)


def _last(links: Mapping[str, Link]) -> frozenset[str]:
    return frozenset(name for name, link in links.items() if link.is_last)


def _off(links: Mapping[str, Link], names: Sequence[str], aims: Mapping[str, float]) -> float:
    """Decades that the gains of these layers are off, all together."""
    told = [name for name in names if links[name].is_known and not links[name].is_normalised]
    set_by_gain = [name for name in told if not links[name].is_first]
    return sum(abs(decades(links[name]) - math.log10(aims[name])) for name in set_by_gain)


def _is_past_peak(before: Link, after: Link, aim: float) -> bool:
    """Whether larger weights let far less through, as where the largest of what a bounded activation gives is taken."""
    was_enlarged = before.growth < aim and after.spread > _LARGER * before.spread
    return was_enlarged and after.growth < before.growth / _LARGER


def _is_finite(layer: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters_of(layer))


@torch.no_grad()
def _draw(layer: nn.Module, generator: torch.Generator, *, keeps_bias: bool = False) -> None:
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
class _Adjustment:
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
            wanted = 1 / spread if spread > 0 else 1.0
            return wanted if math.isfinite(wanted) else 1.0
        wanted = self.aims[name] / link.growth if link.growth > 0 else 1.0
        if not link.is_chain and link.own_gain > 0:  # past a softmax or a norm hardly anything comes through a branch
            wanted = min(wanted, 1 / link.own_gain)
        return min(max(wanted, 1 / _MAX_FACTOR), _MAX_FACTOR) if math.isfinite(wanted) else 1.0


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


class _Look:
    """Takes down where the inputs of these layers lie."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.centres: dict[str, Centre] = {}

    @torch.no_grad()
    def __call__(self, name: str, layer: nn.Module, source: Tensor, _output: Tensor) -> bool:
        if name in self._names and not isinstance(layer, BareMap):
            centre = centre_of(layer, source)
            if centre is not None:
                self.centres[name] = centre
        return False


def _last_spread(links: Mapping[str, Link]) -> float:
    spreads = [link.spread for link in links.values() if not link.follower and math.isfinite(link.spread)]
    return max(spreads, default=math.nan)


def _span(links: Mapping[str, Link]) -> float:
    gains = [link for link in links.values() if link.is_known and link.is_chain and not link.is_first]
    if not gains:
        return math.nan
    return sum(map(decades, gains))
