"""Critical initialisation from data: the signal keeps its size in every layer, on a batch of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gradflow.remedies.adjustment import Adjustment, Centre, Look, draw
from lightning_gradflow.remedies.gains import Gains, Link
from lightning_gradflow.remedies.sick_layers import FAR, MAX_OFF, Choice, decades, looks_drawn, size_of
from lightning_gradflow.remedies.weights import parameters_of

_MIN_ROUNDS = 5
"""Forward passes that set the gains, at most, or one for each layer, where that is more: most settle in ten, but behind
a GELU a layer does only after those before it."""
_SETTLED = 0.05  # decades that all gains together may be off
_LARGER = 2.0  # times, of a spread, and of the gain that falls with it: what comes in changes in a round as well


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
    variance 1, or as much less as makes 8 of it behind a slope above that, such as that of `sin(30 * x)`; and so is
    that of the last, unless that takes larger weights than those of the layers drawn before it, in the median, and
    larger ones than `1 / sqrt(fan_in)`; and that of one through which larger weights let less, as where the largest of
    what a bounded activation gives is taken. Where what the next layer takes comes from other layers too, as at the end
    of a residual branch, the gain is `1 / sqrt(number of such layers)`, so that all of them together keep the size.
    Before a last layer that has to stay as it is, such as one tied to an embedding, and whose weights are too large by
    more than a factor of 4, it is that much less. Glorot's, He's and the orthogonal initialisation come out where their
    assumptions hold. A padded convolution is made blind to the mean of its inputs, where that is larger than what
    varies.

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
    - where others are drawn, or most layers are so, its units have more in common than they differ by, as those with
      positive weights have;
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
        gates: layers whose output opens or shuts a gate; they keep their bias, which says how far it stands open,
            unless that takes weights of one of them that are too large by more than a factor of 4.
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
        draw(modules[name], generator, keeps_bias=name in gates)
    if broken:  # nothing can be measured behind a layer that gives NaN
        links = gains.measure(Adjustment(frozenset(broken), _last(links), {}, {}, frozenset(gates)))
    sick = choice.sick(links, broken, max_off, max_spread)
    aims = {name: aim for name, aim in choice.aims(links).items() if name in sick}
    layers = {name: modules[name] for name in sick}
    _set_gains(gains, layers, aims, _last(links), frozenset(gates), generator)
    if any(size_of(layers[name]) > FAR for name in {*gates} & {*sick}):
        # what takes such weights to get anything through holds no part of it back: it shuts the gates
        _set_gains(gains, layers, aims, _last(links), frozenset(), generator)
    changed = {name: parameters_of(modules[name]) for name in sick}
    look = Look(frozenset(sick) | (choice.may & {links[name].follower for name in sick}))
    return Treated(changed, before, gains.measure(look) if sick else before, look.centres)


def _set_gains(
    gains: Gains,
    layers: Mapping[str, nn.Module],
    aims: Mapping[str, float],
    last: frozenset[str],
    gates: frozenset[str],
    generator: torch.Generator,
) -> None:
    """Draws these layers, and scales them in forward passes until each has the gain that it is to have."""
    for name, layer in layers.items():
        draw(layer, generator, keeps_bias=name in gates)
    known: Mapping[str, Link] = {}
    past_peak: set[str] = set()
    for _ in range(max(_MIN_ROUNDS, len(layers)) if layers else 0):
        found = gains.measure(Adjustment(frozenset(layers), last, aims, known, gates))
        both = [name for name in layers if name in known and name in found]  # experts may be called, or not
        past_peak |= {name for name in both if _is_past_peak(known[name], found[name], aims[name])}
        known = {name: link for name, link in found.items() if name not in past_peak}
        if _off(known, [name for name in layers if name in known], aims) < _SETTLED:
            break


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


def _last_spread(links: Mapping[str, Link]) -> float:
    spreads = [link.spread for link in links.values() if not link.follower and math.isfinite(link.spread)]
    return max(spreads, default=math.nan)


def _span(links: Mapping[str, Link]) -> float:
    gains = [link for link in links.values() if link.is_known and link.is_chain and not link.is_first]
    if not gains:
        return math.nan
    return sum(map(decades, gains))
