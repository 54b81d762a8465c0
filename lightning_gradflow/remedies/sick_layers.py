"""Which layers do not keep the size of the signal, and may be drawn anew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from torch import Tensor, nn

from lightning_gradflow.probes.weight_size import TRANSPOSED, weight_size
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.gains import Link
from lightning_gradflow.remedies.unusual import are_alike
from lightning_gradflow.remedies.weights import is_settable, originals_of, parameters_of

MAX_OFF = 1.25
"""Factor by which a gain may be off: thirty layers that are off by less lose three decades at most."""
FAR = 4.0
"""The same for a layer that no usual initialisation gives."""
MAX_SPREAD = 4.0
"""Of a layer's output, before a bounded activation: it is at its bounds for most of it."""
_MAX_OFF_BRANCH = 4.0  # the same beside a residual connection, past which the signal goes anyway
_MAX_STRETCH = 10.0
"""Factor by which the layers of a stretch may change the signal together: a single sigmoid layer takes seven, the
untrained end of a residual branch more; and with it the outputs of a first layer, and the weights of a last one."""
_UNUSUAL = 2.0  # the size of weights: He's are of size 1.4
_TELLING = 16  # rows and columns: a trained head of 10 units looks as if it had been drawn


class Choice:
    """Chooses layers by what each does to the signal; `make_critical` says by which rules.

    Args:
        module: the model, or a copy of it.
        links: what was measured of its layers.
    """

    def __init__(self, module: nn.Module, links: Mapping[str, Link]) -> None:
        self._modules = dict(module.named_modules())
        self.may, self._is_trained = _treatable(module, links)

    def sick(self, links: Mapping[str, Link], broken: Sequence[str], max_off: float, max_spread: float) -> list[str]:
        """The layers to be drawn anew, in order of execution.

        Args:
            links: what was measured, in order of execution.
            broken: layers that were drawn already.
            max_off: factor by which a gain may be off.
            max_spread: of a layer's output.
        """
        modules, aims, stretches = self._modules, self.aims(links), _stretches(links)
        limits, adding = _Limits(max_off, max_spread), self._adding_up(links, aims)
        sick = [
            name
            for name in links
            if name in self.may
            and (
                name in broken
                or name in adding
                or _is_sick(modules[name], links[name], aims[name], stretches.get(name, 0.0), limits)
            )
        ]
        if self._is_trained:
            return sick
        sick = sick or self._alike_together(links)
        if not sick:
            return self._loud_together(links, max_off)
        others = self.may - {*sick}
        too = {name for name in others if max_off < FAR and _is_quiet(modules[name], links[name], max_off)}
        too |= {
            name
            for name in others
            if _is_loud(modules[name], links[name])
            or _is_hidden(modules[name], links[name])
            or _is_alike(modules[name])
        }
        return [name for name in links if name in sick or name in too]

    def _adding_up(self, links: Mapping[str, Link], aims: Mapping[str, float]) -> list[str]:
        """Ends of branches none of which is off by far by itself, and with each of which the sum grows."""
        ends = [
            name
            for name, link in links.items()
            if link.is_known
            and not (link.is_chain or link.is_first or link.is_normalised)
            and min(link.growth, link.own_gain) > aims[name] * _UNUSUAL
            and looks_drawn(self._modules[name])
        ]
        spreads = [links[name].spread for name in ends]
        grows = any(late > _MAX_STRETCH * early > 0 for early, late in combinations(spreads, 2))
        return ends if grows else []

    def _alike_together(self, links: Mapping[str, Link]) -> list[str]:
        """Layers whose units are all but alike, where most are so, and two at least."""
        alike = [name for name in links if name in self.may and _is_alike(self._modules[name])]
        return alike if len(alike) > 1 and 2 * len(alike) > len(self.may) else []

    def _loud_together(self, links: Mapping[str, Link], max_off: float) -> list[str]:
        """Layers none of which is off by far by itself, and which are so together, or make outputs that are."""
        loud = [name for name in links if name in self.may and _is_loud(self._modules[name], links[name])]
        ends = {name for name, link in links.items() if not link.follower and _MAX_STRETCH < link.spread < math.inf}
        if max_off < FAR and ends:
            # usual weights may grow the signal all the same, as where each layer sums over neighbours
            growing = {
                name
                for name, link in links.items()
                if link.is_known and link.is_chain and not link.is_normalised and link.growth > _UNUSUAL
            }
            drawn = {name for name in growing | ends if name in self.may and looks_drawn(self._modules[name])}
            return [name for name in links if name in loud or (growing and name in drawn)]
        over = sum(math.log10(size_of(self._modules[name]) / _UNUSUAL) for name in loud)
        return loud if over > math.log10(_MAX_STRETCH) else []

    def aims(self, links: Mapping[str, Link]) -> dict[str, float]:
        """The gain that each layer is to have: less before a last layer that is too large and has to stay as it is."""
        branches = sum(link.is_known and not link.is_chain for link in links.values())
        return {
            name: 1 / self._excess(link.follower, links) if link.is_chain else 1 / math.sqrt(branches)
            for name, link in links.items()
        }

    def _excess(self, follower: str, links: Mapping[str, Link]) -> float:
        """How much too large the weights are of a last layer that may not be drawn, as one that is tied; else 1."""
        if follower not in links or links[follower].is_known or follower in self.may:
            return 1.0
        size = size_of(self._modules[follower])
        return size if FAR < size < math.inf else 1.0


def decades(link: Link) -> float:
    """What a layer gains or loses, as a power of ten."""
    return math.log10(link.growth) if link.growth > 0 else -math.inf


def _noise(link: Link) -> float:
    """The same of a random gradient."""
    return math.log10(link.gain) if link.gain > 0 else -math.inf


def _treatable(module: nn.Module, links: Mapping[str, Link]) -> tuple[set[str], bool]:
    """The layers that may be drawn anew, and whether a part of the network looks trained."""
    owners = Counter(p for m in module.modules() for p in m.parameters(recurse=False))
    layers = {name: m for name, m in module.named_modules() if name in links and is_settable(m)}
    telling = {name for name, m in layers.items() if min(m.weight.flatten(1).shape) >= _TELLING}
    # where a part has been trained, what is too small to tell may have been as well
    is_trained = any(not looks_fresh(layers[name].weight) for name in telling)
    may = {
        name
        for name, layer in layers.items()
        if all(p.requires_grad for p in originals_of(layer))
        and all(owners[p] == 1 for p in parameters_of(layer))
        # a last layer has to be off by far
        and (name in telling or not is_trained or not links[name].is_known)
    }
    return may, is_trained


def _stretches(links: Mapping[str, Link]) -> dict[str, float]:
    """Layer -> decades that the signal gains or loses, at most, in the layers that it follows or that follow it."""
    runs: list[list[str]] = []
    before: dict[str, list[str]] = {}
    for name, link in links.items():
        if link.is_known and link.is_chain and not link.is_first:
            run = before.pop(name, [])
            if not run:
                runs.append(run)
            run.append(name)
            before[link.follower] = run
    found: dict[str, float] = {}
    for run in runs:
        chained = [links[name] for name in run]
        gains, growths = ([0.0 if it.is_normalised else it.calls * f(it) for it in chained] for f in (_noise, decades))
        sums = [list(accumulate(own, initial=0.0)) for own in (gains, growths)]
        found |= dict.fromkeys(run, max(max(one) - min(one) for one in sums))
    return found


@dataclass(frozen=True)
class _Limits:
    max_off: float
    max_spread: float


def _is_sick(layer: nn.Module, link: Link, aim: float, stretch: float, limits: _Limits) -> bool:
    if link.is_normalised or not looks_drawn(layer):
        return False
    size = size_of(layer)
    if not link.is_known:  # zero is a usual choice for an output layer
        is_large = size > MAX_SPREAD and link.spread > limits.max_spread
        return size > 0 and (is_large or _is_off(size, 1.0, _MAX_STRETCH))
    if link.is_first:  # its gain is that of its weights, which depends on what data are like, times a slope
        return size == 0 or _is_off(link.spread, 1.0, _MAX_STRETCH) or link.gain / size < 1 / _MAX_STRETCH
    if not link.is_chain:  # what follows where branches meet, such as a norm, is the same for all of them
        return min(link.growth, link.own_gain) > aim * _MAX_OFF_BRANCH
    if link.spread > limits.max_spread:
        return True
    # a signal that is all but lost is no sign that it comes through
    is_off = link.growth > aim * limits.max_off or link.gain < aim / limits.max_off
    return is_off and (link.growth > aim * FAR or stretch > math.log10(_MAX_STRETCH))


def _is_quiet(layer: nn.Module, link: Link, max_off: float) -> bool:
    """Whether a first layer gives those behind it, which are drawn anew, another size than they are made for.

    Where something multiplies its output by far, as the frequency of a sine does, that is not the size that counts.
    """
    is_plain = link.is_first and not link.is_normalised and link.gain <= _MAX_STRETCH * size_of(layer)
    return is_plain and _is_off(link.spread, 1.0, max_off) and looks_drawn(layer)


def _is_loud(layer: nn.Module, link: Link) -> bool:
    """Whether no usual initialisation gives its weights, in a network in which others are drawn anew: as badly drawn.

    What follows may hide it, as the norm behind the sum of many branches that are all too large does.
    """
    return not link.is_normalised and size_of(layer) > _UNUSUAL and looks_drawn(layer)


def _is_hidden(layer: nn.Module, link: Link) -> bool:
    """Whether something hides weights of a size that no usual initialisation gives, such as a norm behind them.

    The signal does not tell, but a step does: beside weights that are too small each one turns the layer over.
    """
    return link.is_known and link.is_chain and _is_off(size_of(layer), 1.0, _MAX_STRETCH) and looks_drawn(layer)


def _is_alike(layer: nn.Module) -> bool:
    """Whether its units are all but alike, in a network in which others are drawn anew: as badly drawn."""
    # units of different groups see different inputs
    return getattr(layer, "groups", 1) == 1 and are_alike(_by_unit(layer)) and looks_drawn(layer)


def looks_drawn(layer: nn.Module) -> bool:
    """Whether the weights of a layer look as they were drawn; see `looks_fresh`."""
    return looks_fresh(_by_unit(layer))


def _by_unit(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight


def size_of(layer: nn.Module) -> float:
    """Of the weights of a layer; see `weight_size`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return float(weight_size(layer, weight))


def _is_off(value: float, aim: float, factor: float) -> bool:
    return not aim / factor <= value <= aim * factor
