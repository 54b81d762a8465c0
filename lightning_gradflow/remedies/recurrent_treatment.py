"""The treatment of a recurrence that loses its gradient, or blows it up, on the way through time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradflow.detectors.time_profile import time_profile
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.probes.layers import ROOT
from lightning_gradflow.probes.shards import whole
from lightning_gradflow.remedies.bare_uses import Use
from lightning_gradflow.remedies.gate_memory import Kept, gate_blocks, keep_state
from lightning_gradflow.remedies.loops import Loop, loops_among, parts_of
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.recurrent import reinitialise_loop, reinitialise_recurrence
from lightning_gradflow.remedies.shared_step import shrink
from lightning_gradflow.remedies.stacked import level
from lightning_gradflow.remedies.textbook import assign, initialise, is_writable
from lightning_gradflow.remedies.through_time import Looped
from lightning_gradflow.remedies.time_span import Treatment, measured, watched
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.unusual import is_too_large

_ROUNDS = 8  # of drawing and measuring: a few for the gain, and inputs down to a hundredth
_MIN_DECADES = -0.3  # half of the gradient comes through
_MIN_DRIVEN_DECADES = -1.0  # and a tenth is enough to learn from, where more costs the input its weight
_MAX_GAIN = 1.15  # beyond it units drive each other to their bounds, whatever comes in


def treat(training: Training, finding: Finding, bare: Mapping[str, Use] | None = None) -> Treatment | None:
    """Draws the recurrences of a finding anew and measures, on a batch, what comes of it through time.

    T is what the run has shown: the median over its samples of the time steps at the layer. Which of the layers in a
    loop gets its own state back is read off the graph of one forward pass; where the training step can't be rehearsed,
    a square one is taken for it, if it is the only one. The optimizer forgets what it knew of them.

    Orthogonal weights keep a gradient whole where units are linear; tanh and sigmoid units are not. What is measured to
    be lost to them is given back: the recurrent weights are drawn with a gain that is larger by
    10 ** (-time_decades / (T - 1)), and measured anew, until half of the gradient comes through. Where that takes a
    gain above 1.15, it is the input that keeps the units at their bounds at every step: its weights are halved, until a
    tenth comes through. The layers of a stack are set to one size (see `stacked.level`).

    Layers that are called again and again without one that maps its own state, as residual steps of one network are,
    get smaller weights where the gradient explodes in them: half, and half again, until it grows less than threefold.

    Args:
        training: the run.
        finding: names the layers.
        bare: bare matrices that are among the modules of the run as layers; those that are in a loop are treated too.

    Returns:
        What was done; None where none of the layers is a recurrence that can be treated.
    """
    history = training.history
    modules = _own(training.model)
    names = [point.module for point in history.points if point.is_layer and point.module in finding.layers]
    uses = _in_loops(bare or {}, finding.layers)
    names = [name for name in dict.fromkeys([*names, *uses]) if name in modules]
    behind = {name: (use.op, _is_gate(history, use)) for name, use in uses.items()}
    with watched(training, names) as watch:
        before = measured(training, watch, names)
        called = {name: m for name in names if isinstance(m := modules[name], Looped)}
        loops = loops_among(called, history, watch, behind)
        again = [name for name in called if watch is not None and watch.profile(name) is not None]
        called = {name: layer for name, layer in called.items() if watch is None or watch.calls(name) > 1}
        within = [name for name in called if watch is not None and watch.returns(name)]
    gates = _loud_gates(called, loops)
    steps = {name: _steps(history, name, modules[name]) for name in names}
    gain = input_gain = 1.0
    after: dict[str, float] = {}
    kept: Kept | None = None
    for turn in range(_ROUNDS):
        layers, changed = _drawn(modules, names, loops, gates, steps, training.seed, gain, input_gain)
        if not changed and finding.kind is FindingKind.EXPLODING_GRADIENT:
            return shrink(training, {name: modules[name] for name in again}, before)
        with watched(training, names) as watch:
            found = measured(training, watch, names)
            sequences = {name: watch.sequence(name) for name in layers} if watch is not None else {}
        is_levelled = _levelled(training, modules, sequences)
        if turn == 0:
            kept = _state_kept(training, modules, called, within, loops, found)
        if not (changed or kept):
            return None
        if is_levelled or kept:
            with watched(training, names) as watch:
                found = measured(training, watch, names)
        if found == after:  # there is nothing that a gain has a say in
            break
        after = found
        span, length = found.get("time_decades", 0.0), found.get("time_steps", 2.0)
        if span >= _MIN_DECADES:
            break
        wanted = gain * 10 ** (-span / (length - 1))
        if wanted <= _MAX_GAIN:
            gain = wanted
        elif span < _MIN_DRIVEN_DECADES:
            gain, input_gain = 1.0, input_gain / 2
        else:
            break
    gated = kept.changed if kept is not None else ()
    forget(training.optimizers, (*changed, *gated))
    owners = {name: use.owner or ROOT for name, use in uses.items()}
    layers += tuple(name or ROOT for name, m in modules.items() if {*m.parameters(recurse=False)} & {*gated})
    named = tuple(dict.fromkeys(owners.get(name, name) for name in layers))
    note = _note(modules, kept) if kept is not None else ""
    return Treatment(named, (*changed, *gated), before, after, note)


def _state_kept(
    training: Training,
    modules: Mapping[str, nn.Module],
    called: Mapping[str, Looped],
    within: Sequence[str],
    loops: Mapping[str, Loop],
    found: Mapping[str, float],
) -> Kept | None:
    """Sets the bias of the gate that keeps the state, where that is one of the loop."""

    def span() -> float:
        with watched(training, list(called)) as watch:
            return measured(training, watch, list(called)).get("time_decades", -math.inf)

    blocks = gate_blocks(modules, within, loops) if found.get("time_decades", 0.0) < _MIN_DECADES else []
    if not blocks:
        return None
    return keep_state(blocks, span, found["time_steps"], torch.Generator().manual_seed(training.seed))


def _note(modules: Mapping[str, nn.Module], kept: Kept) -> str:
    """Which bias was set to what, as code."""
    keys = (
        f"{name}.{key}" if name else key
        for name, module in modules.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter is kept.bias
    )
    where = next(keys, "the bias of a gate")
    part = f"[{kept.part.start}:{kept.part.stop}]" if kept.part.stop is not None else ""
    sign = "-" if kept.sign < 0 else ""
    return f"{where}{part} = {sign}log(uniform(e, time steps)), the gate that keeps the state"


def _in_loops(bare: Mapping[str, Use], layers: Sequence[str]) -> dict[str, Use]:
    """Bare matrices that get back what came of their own output, and those beside them in the same module."""
    looping = {use.owner for use in bare.values() if use.loops}
    return {
        name: use for name, use in bare.items() if use.loops or (use.owner in looping and (use.owner or ROOT) in layers)
    }


def _is_gate(history: History, use: Use) -> bool:
    """Whether the activation behind it, in the same module, is one whose output others are multiplied with."""
    gates = history["gate_fraction"]
    own = [i for i, point in enumerate(history.points) if point.op == use.op and point.module == (use.owner or ROOT)]
    known = gates[:, own][np.isfinite(gates[:, own])] if gates.size else np.array([])
    return bool(use.op and known.size and np.median(known) > 0.5)


def _drawn(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    loops: Mapping[str, Loop],
    gates: Collection[str],
    steps: Mapping[str, int | None],
    seed: int,
    gain: float,
    input_gain: float,
) -> tuple[tuple[str, ...], tuple[nn.Parameter, ...]]:
    """Draws all of them, from the same numbers each time; the layers and parameters that were drawn."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[str] = []
    changed: list[nn.Parameter] = []
    gains = {"gain": gain, "input_gain": input_gain}
    for name in names:
        module, loop = modules[name], loops.get(name)
        ways_in: tuple[str, ...] = ()
        fresh: list[nn.Parameter] = []
        if loop is not None and isinstance(module, Looped):
            ways_in = loop.ways_in
            others = [layer for one in ways_in if isinstance(layer := modules[one], Looped)]
            fresh = reinitialise_loop(module, others, loop.op, generator, loop.columns, **gains)
        elif isinstance(module, Looped) and name in gates:
            fresh = _gate_drawn(module, generator)
        else:
            fresh = reinitialise_recurrence(module, generator, steps[name], **gains)
        layers += [name, *ways_in] if fresh else []
        changed += fresh
    return tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(changed))


def _loud_gates(called: Mapping[str, Looped], loops: Mapping[str, Loop]) -> set[str]:
    """Gates beside a content whose weights are far too large: they hold them open or shut at random."""
    theirs = parts_of(loops)
    others = {name: layer.weight for name, layer in called.items() if loops and name not in theirs}
    return {name for name, weight in others.items() if is_writable(weight) and is_too_large(whole(weight))}


def _gate_drawn(layer: Looped, generator: torch.Generator) -> list[nn.Parameter]:
    """Draws the weights of a gate anew; the bias says how far it stands open, and stays."""
    bias = whole(layer.bias).detach().clone() if layer.bias is not None else None
    fresh = initialise(layer, "glorot", generator, gain=1.0)
    if bias is not None and is_writable(layer.bias):
        assign(layer.bias, bias)
    return fresh


def _levelled(
    training: Training, modules: Mapping[str, nn.Module], sequences: Mapping[str, Tensor | PackedSequence | None]
) -> bool:
    """Sets the layers of stacked recurrences to one size; whether there are any."""
    stacks = [(modules[name], x) for name, x in sequences.items() if x is not None]
    levelled = [level(stack, x, training.averaged) for stack, x in stacks if isinstance(stack, nn.RNNBase)]
    return any(levelled)


def _steps(history: History, layer: str, module: nn.Module) -> int | None:
    """The time steps of half of the samples or more; a bidirectional recurrence is measured to the nearer end."""
    points = [point for point in history.points if point.is_layer and point.module == layer]
    profiles = [time_profile(history, point, i) for point in points for i in range(len(history))]
    found = [profile.steps for profile in profiles if profile is not None]
    ends = 2 if isinstance(module, nn.RNNBase) and module.bidirectional else 1
    return ends * int(np.median(found)) if found else None


def _own(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without those that share a weight with another: what is right for one is wrong for both."""
    modules = dict(model.named_modules())
    owners = Counter(parameter for module in modules.values() for parameter in module.parameters(recurse=False))
    return {
        name: module
        for name, module in modules.items()
        if all(owners[parameter] == 1 for parameter in module.parameters(recurse=False))
    }
