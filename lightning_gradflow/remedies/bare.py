"""Matrices that modules of the user's own multiply with, as if each of them were a linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.probes.layers import is_of_torch
from lightning_gradflow.remedies.bare_map import BareLinear, Layers
from lightning_gradflow.remedies.bare_uses import Use, UseFinder, eager, matrices
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.recurrent import reinitialise_loop
from lightning_gradflow.remedies.textbook import assign, is_writable
from lightning_gradflow.remedies.training import RehearsalError, Training
from lightning_gradflow.remedies.weights import parameters_of

_FAR = 4.0  # factor between the weights of a loop and 1 / sqrt(fan_in), or 1, which no usual initialisation gives
_GROWTH = 3.0  # decades, in a loop without bounds


class Bare:
    """The matrices of a model that no kind of layer knows of, found in a forward pass.

    Args:
        model: the module that is rehearsed; nothing is left behind on it.
        forward: makes a forward pass on a batch, with autograd on.

    Example:
        >>> class Own(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.ones(3, 2))
        ...     def forward(self, x):
        ...         return torch.tanh(x @ self.w)
        >>> own = Own()
        >>> bare = Bare(own, lambda: own(torch.ones(4, 3)))
        >>> [(use.name, use.op) for use in bare.uses], dict(bare.layers(own).named_modules())["w"].weight.shape
        ([('w', 'tanh')], torch.Size([2, 3]))
    """

    def __init__(self, model: nn.Module, forward: Callable[[], None]) -> None:
        self.uses: tuple[Use, ...] = ()
        owned = matrices(model)
        if owned:
            with eager(), UseFinder(model, owned) as finding:
                forward()
            self.uses = finding.uses()

    @property
    def multiplied(self) -> frozenset[tuple[str, str]]:
        """Owner and name of the parameters of which nothing but products is made."""
        return frozenset((use.owner, use.key) for use in self.uses if use.is_own)

    def layers(self, model: nn.Module, *, with_loops: bool = True) -> Layers:
        """The modules of a model, or of a copy of it, and with them a layer for each of the matrices.

        Args:
            model: to which they belong.
            with_loops: whether those that get back what came of their own output may be changed.
        """
        return Layers(model, self.uses, with_loops)

    def draw_loops(self, model: nn.Module, seed: int) -> dict[str, Sequence[nn.Parameter]]:
        """Draws matrices anew that get back what came of their own output, where that can't go well.

        They have no gain that could be measured from one layer to the next. Their weights are off `1 / sqrt(fan_in)` by
        more than a factor of 4, or have a spectral radius above 4, as small ones of one sign have, which no usual
        initialisation gives; or what is not bounded by an activation would grow
        by more than three decades in as many steps as there are.

        Args:
            model: whose parameters are changed.
            seed: the same on all ranks.

        Returns:
            By the names of their modules, the parameters of these.
        """
        generator = torch.Generator().manual_seed(seed)
        layers = self.layers(model)
        drawn: list[str] = []
        for name, use in layers.uses.items():
            layer = layers.maps[name]
            if not use.loops or not isinstance(layer, BareLinear) or not looks_fresh(layer.weight):
                continue
            size = float(layer.weight.detach().double().square().mean().sqrt()) * math.sqrt(layer.in_features)
            is_stack = layer.out_features != layer.in_features  # the gates of a cell are bounded, each by its own
            grows = not is_stack and use.op not in BOUNDED and size > 10 ** (_GROWTH / use.calls)
            is_far = size < 1 / _FAR or max(size, _radius(layer.weight)) > _FAR
            if (grows or is_far) and reinitialise_loop(layer, [], use.op, generator):
                drawn.append(name)
        layers.write()
        return self.owners(model, drawn)

    def owners(self, model: nn.Module, names: Iterable[str]) -> dict[str, Sequence[nn.Parameter]]:
        """Name -> parameters of the layers, for a matrix of that which it is in."""
        known = {use.name: use.owner for use in self.uses}
        modules = dict.fromkeys(known.get(name, name) for name in names)
        return {name: parameters_of(model.get_submodule(name)) for name in modules}


def _radius(weight: Tensor) -> float:
    """The spectral radius; 0 where it is not square."""
    values = weight.detach().cpu().double()
    is_square = values.shape[0] == values.shape[1] and bool(torch.isfinite(values).all())
    return float(torch.linalg.eigvals(values).abs().max()) if is_square else 0.0


@contextmanager
def with_bare(training: Training) -> Iterator[tuple[Training, Mapping[str, Use]]]:
    """The same run with the layers that stand for bare matrices among its modules, and how these are used.

    What is written into them is written into the parameters when the context ends, and the optimizers forget what they
    know of these. The run itself comes back where there are none, or the training step can't be rehearsed.

    Args:
        training: the run.
    """
    bare = None
    if training.rehearse is not None and matrices(training.model):
        try:
            with training.rehearse() as (module, run):
                bare = Bare(module, run)
        except RehearsalError:
            bare = None
    if bare is None or not bare.uses:
        yield training, {}
        return
    found, given = bare, training.rehearse
    assert given is not None
    live = found.layers(training.model)

    @contextmanager
    def rehearse() -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        changed.extend(live.write())
        with given() as (module, run):
            layers = found.layers(module)
            yield layers, layers.routed(run)

    changed: list[str] = []
    yield replace(training, model=live, rehearse=rehearse), live.uses
    changed += live.write()
    uses = [live.uses[name] for name in dict.fromkeys(changed)]
    keys = {(use.owner, key) for use in uses for key in (use.key, use.bias) if key}
    parameters = [training.model.get_submodule(owner).get_parameter(key) for owner, key in keys]
    for parameter in parameters:
        parameter.grad = None
    forget(training.optimizers, parameters)


def initialise_bare(module: nn.Module, generator: torch.Generator, gain: float = 1.0) -> list[nn.Parameter]:
    """Draws the bare matrices of a module by Glorot's initialisation, which is the same from both sides.

    Args:
        module: one of the user's own; any other is left as it is, and so are matrices of zeros and more dimensions.
        generator: on the CPU.
        gain: what they are multiplied by.

    Returns:
        The parameters that were drawn.

    References:
        Glorot and Bengio 2010.

    Example:
        >>> initialise_bare(nn.Linear(2, 2), torch.Generator())
        []
    """
    drawn = []
    for parameter in module.parameters(recurse=False) if not is_of_torch(module) else ():
        if parameter.dim() == 2 and is_writable(parameter) and bool(parameter.any()):
            assign(parameter, nn.init.xavier_normal_(torch.empty(parameter.shape), gain=gain, generator=generator))
            drawn.append(parameter)
    return drawn
