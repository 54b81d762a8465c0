"""What each layer does to the signal, measured on a batch of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lightning_gradflow.probes.shards import is_transformed
from lightning_gradflow.probes.weight_size import TRANSPOSED
from lightning_gradflow.remedies.bare_map import BareMap

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
"""The layers whose gain can be measured and set."""

_SOURCES = (nn.Embedding, nn.EmbeddingBag)  # where a residual connection may begin, besides at a layer
_PROBES = 4  # random gradients: by chance alone, one in a hundred layers would seem to be normalised with a single one
_CLEARLY = 2.0  # times the gain of noise: less may be chance, where few directions are left to a signal
_INVARIANT = 0.01  # share of an output's scale that comes through: 0 behind a norm, but for its eps

Adjust = Callable[[str, nn.Module, Tensor, Tensor], bool]
"""Called with the name of a layer, itself, its input and its output; says whether it has changed the weights."""


@dataclass
class Link:
    """A layer, and what lies between it and the next one, which is the first that takes its output.

    Args:
        gain: factor by which the norm of a random gradient changes on its way back from the input of the next layer to
            the input of this one; NaN where no layer takes its output, or the numbers are not finite.
        own_gain: the share of the gain that the weights of this layer have, without what follows them.
        signal_gain: factor by which what differs between samples grows, from the input of this layer to that of the
            next; NaN where nothing does.
        is_chain: whether what the next layer takes comes from this layer alone, not from another layer or an embedding
            besides, as behind residuals, gates and branches. Data and bare parameters that are added are not seen.
        is_normalised: whether what the next layer takes does not depend on the scale of this layer's output.
        is_first: whether its input is data, to which no gradient is sent.
        spread: root mean square of its output around the mean of each unit.
        calls: how often it was called with autograd on.
        follower: the next layer, which may be itself; "" where there is none.
    """

    gain: float = math.nan
    own_gain: float = math.nan
    signal_gain: float = math.nan
    is_chain: bool = True
    is_normalised: bool = False
    is_first: bool = False
    spread: float = math.nan
    calls: int = 0
    follower: str = ""

    @property
    def is_known(self) -> bool:
        """Whether the gain was measured."""
        return not math.isnan(self.gain)

    @property
    def is_last(self) -> bool:
        """Whether no layer takes its output, which is made of what others give."""
        return not self.follower and not self.is_first

    @property
    def growth(self) -> float:
        """The gain, or that of the signal, where it is clearly larger, as through a sum over what is alike."""
        return self.signal_gain if self.signal_gain > _CLEARLY * self.gain else self.gain


def unit_dim(layer: nn.Module) -> int:
    """The dimension of a layer's output, and of its input, that counts the units, from the end.

    Example:
        >>> unit_dim(nn.Linear(2, 3)), unit_dim(nn.Conv2d(2, 3, 1))
        (-1, -3)
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return -1 if isinstance(layer, nn.Linear) else 1 - weight.dim()


def by_unit(layer: nn.Module, output: Tensor) -> Tensor:
    """(N, units) the output of a layer, or its input, in float64, one row per sample and position.

    Example:
        >>> by_unit(nn.Conv1d(1, 2, 1), torch.zeros(4, 2, 5)).shape
        torch.Size([20, 2])
    """
    dims = layer.unit_dims if isinstance(layer, BareMap) else (unit_dim(layer),)
    last = output.detach().double().movedim(dims, tuple(range(-len(dims), 0)))
    return last.reshape(-1, math.prod(last.shape[-len(dims) :]))


class Gains:
    """Measures gains, layer by layer, in one forward pass; layers may be adjusted on the way.

    Random gradients v are sent back from the input of a layer to the output of the one before it, as u, and through
    that one to its input, as w. Then

        gain = sqrt(mean |w|^2 / mean |v|^2)

    over four gradients, which is nearly the root of the mean square of the singular values of all that lies between:
    the Frobenius norm of its Jacobian, over the root of the number of entries of v. What it is (activations, dropout,
    pooling, functions of the user's) needs not be known. A layer is measured at its first call. Calls with autograd off
    are passed over: no gradient goes there.

    By Euler's theorem what does not depend on the scale of an output z of n numbers has no derivative along it, so that
    `u . z = 0` for every v. It counts as 0 where |sum u_i z_i| is below a hundredth of sqrt(sum (u_i z_i)^2), what it
    would be if the signs had nothing to do with each other. (|u| |z| / sqrt(n) would be the same for most networks, but
    behind an activation at its bounds u is 0 wherever z is large, and every u . z small beside it.)

    Args:
        module: the model, or a copy of it. Nothing is left behind on it, after an error neither.
        forward: makes a forward pass on a batch, with autograd on, always the same.
        seed: of the random gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 1))
        >>> _ = nn.init.eye_(net[0].weight)
        >>> link = Gains(net, lambda: net(torch.zeros(8, 4))).measure()["0"]
        >>> round(link.gain, 3), link.is_chain, link.is_first, link.follower  # a sigmoid's slope at 0
        (0.25, True, True, '2')
    """

    def __init__(self, module: nn.Module, forward: Callable[[], None], seed: int = 0) -> None:
        kinds = (*WEIGHTED, BareMap)
        self._names: dict[nn.Module, str] = {m: name for name, m in module.named_modules() if isinstance(m, kinds)}
        self._sources: dict[nn.Module, str] = {m: name for name, m in module.named_modules() if isinstance(m, _SOURCES)}
        self._forward = forward
        self._seed = seed

    def measure(self, adjust: Adjust | None = None) -> dict[str, Link]:
        """Layer -> what was measured, in order of execution; layers that were not called have no entry.

        Args:
            adjust: called with the name of each layer, itself, its input and its output, at its first call; where it
                has changed the weights it returns True, and the output is computed anew.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
            >>> def halve(name, layer, source, output):
            ...     layer.weight.data /= 2
            ...     return True
            >>> gains = Gains(net, lambda: net(torch.ones(8, 4)))
            >>> before, after = gains.measure()["0"].gain, gains.measure(halve)["0"].gain
            >>> round(before / after, 4)
            2.0
        """
        one_pass = _Pass(self._names, adjust, torch.Generator().manual_seed(self._seed))
        handles = []
        for layer in self._names:
            handles.append(layer.register_forward_pre_hook(one_pass.before, with_kwargs=True))
            handles.append(layer.register_forward_hook(one_pass.after, with_kwargs=True))
        for source, name in self._sources.items():
            handles.append(source.register_forward_hook(partial(one_pass.begin, name)))
        try:
            self._forward()
        finally:
            for handle in handles:
                handle.remove()
        return one_pass.links


@dataclass
class _Waiting:
    """A layer whose output has not been taken by another yet."""

    source: Tensor
    edge: GradientEdge  # a tensor that is changed in place afterwards stands for what it has become
    output: Tensor


class _Pass:
    def __init__(self, names: Mapping[nn.Module, str], adjust: Adjust | None, generator: torch.Generator) -> None:
        self._names = names
        self._adjust = adjust
        self._generator = generator
        self._waiting: dict[str, _Waiting] = {}
        self._nodes: dict[Any, str] = {}
        self._is_back = False  # activation checkpointing calls layers again on the way back
        self.links: dict[str, Link] = {}

    def begin(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and not self._is_back:
            self._nodes[get_gradient_edge(output).node] = name

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _input(args, kwargs)
        if x is None or self._is_back:
            return None
        if x.requires_grad:
            self._look_back(x, self._names[layer])
            return None
        if self._names[layer] in self.links:
            return None
        x = x.detach().requires_grad_()
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        name, x = self._names[layer], _input(args, kwargs)
        if x is None or self._is_back or not isinstance(output, Tensor):
            return None
        link = self.links.get(name)
        if link is None:
            link = self.links[name] = Link(is_first=x.is_leaf)
            if self._adjust is not None and self._adjust(name, layer, x, output):
                torch.clear_autocast_cache()  # it holds the weights as they were
                with saved_tensors_hooks(_as_it_is, _as_it_is):  # activation checkpointing counts what is saved
                    output = layer.forward(*args, **kwargs)
            values = by_unit(layer, output)
            link.spread = float((values - values.mean(0)).square().mean().sqrt())
            if output.requires_grad:
                self._waiting[name] = _Waiting(x, get_gradient_edge(output), output.detach().clone())
        if output.requires_grad:
            self._nodes[get_gradient_edge(output).node] = name
        link.calls += 1
        return output

    def _look_back(self, x: Tensor, follower: str) -> None:
        """The gains of the layers whose output has come to `x`."""
        nodes = self._parents(get_gradient_edge(x).node)
        parents = {self._nodes[node] for node in nodes}
        self._is_back = True
        for name in [name for name, waiting in self._waiting.items() if waiting.edge.node in nodes]:
            link = self.links[name]
            self._measure(link, x, self._waiting.pop(name))
            link.is_chain = len(parents) == 1
            link.follower = follower
        self._is_back = False

    def _measure(self, link: Link, x: Tensor, waiting: _Waiting) -> None:
        """The gains, and whether the scale of the output makes no difference."""
        z = waiting.output.double()
        differs, takes = _differing(z), _differing(waiting.source.detach().double()).square().mean().sqrt()
        sent = passed = received = made = 0.0
        shares = []
        for _ in range(_PROBES):
            v = torch.randn(x.shape, generator=self._generator).to(x.device, x.dtype)
            (u,) = torch.autograd.grad(x, waiting.edge, v, retain_graph=True)
            (w,) = torch.autograd.grad(waiting.edge, waiting.source, u, retain_graph=True)
            sent += float(v.double().square().sum())
            received += float(w.double().square().sum())
            u = u.double()
            passed += float(u.square().sum())
            made += float((u * differs).flatten(1).sum(1).square().sum())
            shares.append(float((u * z).sum().abs() / (u * z).norm()))
        link.own_gain = math.sqrt(received / passed) if passed > 0 else math.nan
        link.gain = math.sqrt(received / sent)
        link.signal_gain = math.sqrt(made / sent) / float(takes) if takes > 0 else math.nan
        link.is_normalised = all(share < _INVARIANT for share in shares)

    def _parents(self, node: Any) -> set[Any]:
        """The outputs of layers and embeddings that `node` was computed from, without another layer between."""
        found, seen, stack = set(), set(), [node]
        while stack:
            at = stack.pop()
            if at is None or at in seen:
                continue
            seen.add(at)
            if at in self._nodes:
                found.add(at)
            else:
                stack += [following for following, _ in at.next_functions]
        return found


def _differing(values: Tensor) -> Tensor:
    """What is not the same for all samples, as what padding makes of a mean is."""
    return values - values.mean(0)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer is called with, where a gradient can be sent through it to that."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or is_transformed(x) or not torch.is_grad_enabled():
        return None
    return x if x.is_floating_point() and x.dim() > 1 and x.numel() else None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
