"""Gates of recurrences that are written by hand, set so that what they keep lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.shards import whole
from lightning_gradflow.remedies.loops import Loop, parts_of
from lightning_gradflow.remedies.textbook import assign, is_writable
from lightning_gradflow.remedies.through_time import Looped

_MIN_WON = 1.0  # decades
_MAX_LEFT = 0.5  # of what was lost
_AROUND = 0.5  # of 1
_MAX_DECADES = 0.5  # a factor of three, for which a gradient may grow

Block = tuple[nn.Parameter, slice]
"""A bias, and the part of it that belongs to one gate."""


@dataclass(frozen=True)
class Kept:
    """The gate that keeps the state.

    Args:
        bias: that was set.
        part: of it.
        sign: 1 where the gate multiplies the old state, -1 where one less it does.
        changed: all biases that were written into; those of the other gates are 0.
    """

    bias: nn.Parameter
    part: slice
    sign: int
    changed: tuple[nn.Parameter, ...]


def gate_blocks(
    modules: Mapping[str, nn.Module], called: Iterable[str], loops: Mapping[str, Loop]
) -> list[list[Block]]:
    """The biases of what may be a gate, gate by gate; several are added to each other.

    Of gates that are computed together it is a part of each bias, also of one that the module around them adds as a
    parameter of its own. Where there is none of these, the input may come in for all time steps at once, before the
    loop: then it is that of the only layer beside it which gives as much. A gate by itself is a layer of the loop that
    is not its content.

    Args:
        modules: of the model, by name.
        called: layers that are called once a time step, and get their own output back: what reads a state is no gate.
        loops: those of them that get their own output back, and make the content, or all of it.
    """
    theirs = parts_of(loops)
    own = [getattr(modules[name], "bias", None) for name in called if name not in theirs]
    found: list[list[Block]] = [[(bias, slice(None))] for bias in own if is_writable(bias)]
    for loop in loops.values():
        layer = modules[loop.again]
        size = len(layer.weight) if loop.gates > 1 and isinstance(layer, Looped) else 0
        around = modules.get(loop.again.rpartition(".")[0])
        beside = around.parameters(recurse=False) if around is not None else ()
        bare = [parameter for parameter in beside if is_writable(parameter) and not _is_gain(parameter)]
        added = (getattr(modules[name], "bias", None) for name in (loop.again, *loop.ways_in))
        fitting = [bias for bias in (*added, *bare) if is_writable(bias) and bias.shape == (size,)]
        together = [list({id(bias): bias for bias in fitting}.values())] if fitting else []
        beside_it = around.children() if around is not None else ()
        ahead = (getattr(part, "bias", None) for part in beside_it if isinstance(part, Looped))
        alone = [bias for bias in ahead if is_writable(bias) and bias.shape == (size,)]
        together = together or ([alone] if len(alone) == 1 else [])
        width = size // loop.gates
        parts = [slice(start, start + width) for start in range(0, size, max(1, width))]
        found += [[(bias, part) for bias in biases] for biases in together for part in parts]
    return found


def keep_state(
    blocks: Sequence[Sequence[Block]], span: Callable[[], float], steps: float, generator: torch.Generator
) -> Kept | None:
    r"""Sets the bias of one gate so that what it keeps lasts, as `reinitialise_recurrence` does where it knows which.

    Which gate keeps what there is, is a convention, and so is the sign: the 1 - z of one formula is the z of another.
    So each is tried, with ln u and with -ln u, u uniform in [e, max(e, T - 1)], one for each unit, and with all other
    biases of gates at 0. The one with which most of a gradient comes through time is kept, if it brings ten times as
    much or more and half of the decades that were lost. Else all is put back.

    Args:
        blocks: the biases, gate by gate; see `gate_blocks`.
        span: measures the decades that a gradient gains from the last time step to the first.
        steps: T, in [1, inf).
        generator: on the CPU.

    Returns:
        What was set; None where all is as it was.

    References:
        Tallec and Ollivier 2018, Can recurrent neural networks warp time?

    Example:
        >>> forget = nn.Parameter(torch.zeros(8))  # keeps the state where it is 1 - z
        >>> span = lambda: 10 * torch.sigmoid(-forget.mean()).log10().item()
        >>> kept = keep_state([[(forget, slice(None))]], span, 50, torch.Generator().manual_seed(0))
        >>> kept.sign, bool((forget <= -1).all())
        (-1, True)
    """
    biases = list({id(bias): bias for block in blocks for bias, _ in block}.values())
    old = [whole(bias).detach().clone() for bias in biases]
    before = span()
    for bias in biases:
        assign(bias, torch.zeros(bias.shape))
    best = -math.inf
    chosen: tuple[nn.Parameter, slice, Tensor, int] | None = None
    for block in blocks:
        bias, part = block[0]
        size = len(range(len(bias))[part])
        kept = torch.empty(size).uniform_(math.e, max(math.e, steps - 1.0), generator=generator).log()
        for sign in (1, -1):
            _write(bias, part, sign * kept)
            now = span()
            if best < now <= _MAX_DECADES:
                best, chosen = now, (bias, part, kept, sign)
        _write(bias, part, torch.zeros_like(kept))
    if chosen is not None and best >= before + _MIN_WON and abs(best) <= _MAX_LEFT * abs(before):
        bias, part, kept, sign = chosen
        _write(bias, part, sign * kept)
        return Kept(bias, part, sign, tuple(biases))
    for bias, values in zip(biases, old, strict=True):
        assign(bias, values)
    return None


def _is_gain(parameter: nn.Parameter) -> bool:
    """Whether it lies around 1, as what multiplies does that is drawn so as to change nothing."""
    return bool(((whole(parameter).detach() - 1).abs() < _AROUND).all())


def _write(bias: nn.Parameter, part: slice, values: Tensor) -> None:
    fresh = whole(bias).detach().clone()
    fresh[part] = values.to(fresh)
    assign(bias, fresh)
