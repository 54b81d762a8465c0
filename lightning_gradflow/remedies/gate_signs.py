"""Gates that their bias holds open or shut on the side on which the signal is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.activations import SIGMOIDS
from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.remedies.around import gates_of
from lightning_gradflow.remedies.bare import with_bare
from lightning_gradflow.remedies.gains import WEIGHTED
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.sick_layers import looks_drawn
from lightning_gradflow.remedies.textbook import assign
from lightning_gradflow.remedies.training import RehearsalError, Training

_HELD = 1.0  # of a bias, from which on it was set on purpose: layers of torch draw up to 1 / sqrt(inputs)
_MIN_WON = 1.0  # decades
_MAX_LEFT = 0.5  # of what was lost


@dataclass(frozen=True)
class Turned:
    """Gates whose bias got the other sign.

    Args:
        changed: layer -> its bias, in the module that was given.
        before: decades that a gradient gains from the last call of a gate to the first.
        after: the same with the new sign.
    """

    changed: Mapping[str, nn.Parameter]
    before: float
    after: float


def turn_gates(module: nn.Module, forward: Callable[[], None], gates: Collection[str], seed: int = 0) -> Turned | None:
    """Gives the biases of gates the other sign, where the signal comes through then, and did not before.

    Which gate keeps what there is, and which lets in what is new, is a convention, and so is the sign of its bias: the
    1 - z of one formula is the z of another. A forget gate that is shut keeps nothing, and a highway whose transform
    gates are open has no way past its layers. What each gate is for needs not be known: a random gradient is sent back
    through the network, from what comes into the last gate to the first one, with the biases as they are; with those
    below -1 negated; and with those above 1. The slope of a sigmoid is the same on both sides. What brings ten times as
    much or more is kept, if that is half of the decades that were lost.

    Args:
        module: the model, or a copy of it; biases of it are changed.
        forward: makes a forward pass on a batch, with autograd on, always the same.
        gates: layers whose output opens or shuts a gate, of several gates maybe, in any order. Those whose weights look
            trained are left as they are, and so are frozen biases.
        seed: of the random gradient.

    Returns:
        What was turned, and what it did; None where nothing was.

    References:
        Srivastava et al. 2015, Highway networks; Jozefowicz et al. 2015, An empirical exploration of recurrent network
        architectures (the forget bias).

    Example:
        >>> class Highway(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.gate = (nn.ModuleList([nn.Linear(8, 8) for _ in range(20)]) for _ in range(2))
        ...
        ...     def forward(self, x):
        ...         for body, gate in zip(self.body, self.gate):
        ...             z = torch.sigmoid(gate(x))
        ...             x = z * torch.tanh(body(x)) + (1 - z) * x
        ...         return x
        >>> net, x = Highway(), torch.ones(4, 8)
        >>> for gate in net.gate:
        ...     _ = nn.init.constant_(gate.bias, 3.0)
        >>> turned = turn_gates(net, lambda: net(x), [f"gate.{i}" for i in range(20)])
        >>> turned.before < -3 < -1 < turned.after, net.gate[0].bias[0].item()
        (True, -3.0)
    """
    modules = dict(module.named_modules())
    layers = {name: m for name, m in modules.items() if name in gates and isinstance(m, WEIGHTED)}
    held = {name: m.bias for name, m in layers.items() if isinstance(m.bias, nn.Parameter) and _is_held(m, m.bias)}
    before = best = _span(layers, forward, seed) if held else math.nan
    changed: set[str] = set()
    for sign in (-1, 1) if best < 0 else ():
        old = {name: bias.detach().clone() for name, bias in held.items()}
        turned = {name: sign * bias >= _HELD for name, bias in old.items()}
        for name, rows in turned.items():
            _write(held[name], torch.where(rows, -old[name], old[name]))
        now = _span(layers, forward, seed)
        if now >= best + _MIN_WON and abs(now) <= _MAX_LEFT * abs(before):
            best = now
            changed |= {name for name, rows in turned.items() if bool(rows.any())}
        else:
            for name, bias in held.items():
                _write(bias, old[name])
    return Turned({name: held[name] for name in held if name in changed}, before, best) if changed else None


def turn_signs(training: Training) -> Turned | None:
    """The same in a run, whose optimizers forget what they knew of these biases.

    Candidates are layers right before a bounded activation that multiplies a signal, and those before these that may be
    added to them; of the user's own parameters those that get their own output back, or come before a sigmoid.

    Args:
        training: the run.

    Returns:
        What was turned, by the names of modules; None where nothing was, or the training step can't be rehearsed.
    """
    with with_bare(training) as (whole, uses):
        own = {name for name, use in uses.items() if use.loops or use.op in SIGMOIDS}
        gates = gates_of(training.history, with_others=True) | own
        if whole.rehearse is None or not gates:
            return None
        try:
            with whole.rehearse() as (module, run):
                done = turn_gates(module, run, gates, training.seed)
                fresh = {name: p.detach().clone() for name, p in done.changed.items()} if done is not None else {}
        except RehearsalError:
            return None
        biases = {name: whole.model.get_submodule(name).get_parameter("bias") for name in fresh}
        for name, bias in biases.items():
            assign(bias, fresh[name])
    if done is None:
        return None
    forget(training.optimizers, biases.values())
    owners = {name: use.owner or ROOT for name, use in uses.items()}
    changed = {owners.get(name, name): bias for name, bias in biases.items()}
    return Turned(changed, done.before, done.after)


@torch.no_grad()
def _write(bias: nn.Parameter, values: Tensor) -> None:
    bias.copy_(values)


def _is_held(layer: nn.Module, bias: Tensor) -> bool:
    return bias.requires_grad and bool((bias.detach().abs() >= _HELD).any()) and looks_drawn(layer)


def _span(layers: Mapping[str, nn.Module], forward: Callable[[], None], seed: int) -> float:
    """Decades that a random gradient gains from the last call of a gate to the first; NaN where there is none."""
    sources: list[Tensor] = []
    outputs: list[Tensor] = []

    def seen(args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)
            sources.extend(x for x in args[:1] if isinstance(x, Tensor) and x.requires_grad)

    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(lambda _, args, output: seen(args, output)).remove)
        forward()
    if not sources:
        return math.nan
    end = sources[-1]
    sent = torch.randn(end.shape, generator=torch.Generator().manual_seed(seed)).to(end)
    found: Sequence[Tensor | None] = torch.autograd.grad(end, outputs, sent, allow_unused=True)
    # nothing comes to those of the last step, nor to one of the first by which a state of zeros is multiplied
    norms = [norm for g in found if g is not None and (norm := float(g.double().norm())) > 0]
    return math.log10(norms[0] / norms[-1]) if norms and math.isfinite(norms[0] / norms[-1]) else math.nan
