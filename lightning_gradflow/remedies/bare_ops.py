"""Which axes of a tensor are summed over, and which count outputs, where a function multiplies by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MATMUL = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)
_SWAPPED = (Tensor.__rmatmul__,)
_ADDED = (torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)
_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_PLACES: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    **dict.fromkeys(_MATMUL, (0, 1)),
    **dict.fromkeys(_SWAPPED, (1, 0)),
    **dict.fromkeys(_ADDED, (1, 2)),
    **dict.fromkeys(_CONVOLUTIONS, (0, 1)),
}
"""Where the factors stand, the left one first."""

ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
LOOKUPS = frozenset({F.embedding, F.embedding_bag, torch.embedding, Tensor.__getitem__, torch.index_select})
"""What takes rows out of a table."""


_Again = tuple[Any, tuple[Any, ...], int, Mapping[str, Any]]


@dataclass(frozen=True)
class Axes:
    """What the axes of a weight are.

    Args:
        groups: stand for maps side by side, each with an input of its own.
        outputs: count the outputs.
        inputs: are summed over, with the taps of a convolution.
        units: axes of the result, from the end, that count groups and outputs, in this order.
        blocks: groups that share an axis of outputs, as in a convolution.
    """

    groups: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    units: tuple[int, ...]
    blocks: int = 1


@dataclass(frozen=True)
class Call:
    """A product of a weight with something else.

    Args:
        weight: as it is used.
        axes: what its axes are.
        source: what it is multiplied with.
        bias: what is added in the same call, if anything.
        again: arguments by which to make the same call with another source: (function, arguments, place, options).
    """

    weight: Tensor
    axes: Axes
    source: Tensor
    bias: Any
    again: _Again

    def on(self, source: Tensor, bias: Tensor | None = None) -> Any:
        """The result for another source, with another bias in the place of its own, if one is given."""
        function, args, place, options = self.again
        at = dict(enumerate(args)) | {place: source}
        if bias is not None:
            at[0 if function in _ADDED else 2] = bias
        return function(*(at[i] for i in sorted(at)), **options)


def products(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Call]:
    """A product, seen from each of its two factors; nothing for any other function.

    Example:
        >>> seen = products(torch.matmul, (torch.ones(8, 3), torch.ones(3, 2)), {})
        >>> seen[1].axes
        Axes(groups=(), outputs=(1,), inputs=(0,), units=(-1,), blocks=1)
    """
    if function is torch.einsum:
        return _einsum(args)
    if function not in _PLACES:
        return []
    names = {"input": 0, "weight": 1, "bias": 2} if function is F.linear or function in _CONVOLUTIONS else {}
    if any(name in names for name in kwargs):
        given = dict(enumerate(args)) | {names[name]: value for name, value in kwargs.items() if name in names}
        args = tuple(given.get(i) for i in range(max(given) + 1))
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
    left, right = _PLACES[function]
    if len(args) <= max(left, right) or not isinstance(args[left], Tensor) or not isinstance(args[right], Tensor):
        return []
    found = []
    for place, other in ((left, right), (right, left)):
        axes = _axes(function, args[place].dim(), place == left, args, kwargs)
        if axes is not None:
            at = 0 if function in _ADDED else 2
            bias = args[at] if function not in _MATMUL + _SWAPPED and len(args) > at else None
            found.append(Call(args[place], axes, args[other], bias, (function, args, other, kwargs)))
    return found


def _axes(function: Any, dims: int, is_left: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Axes | None:
    if dims < 2:
        return None
    if function is F.linear:
        return None if is_left else Axes((), (0,), (1,), (-1,))
    if function in _CONVOLUTIONS:
        blocks = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        return None if is_left else Axes((), (0,), tuple(range(1, dims)), (1 - dims,), blocks)
    groups = tuple(range(dims - 2))
    output, summed, unit = (dims - 2, dims - 1, -2) if is_left else (dims - 1, dims - 2, -1)
    return Axes(groups, (output,), (summed,), (*(group - dims for group in groups), unit))


def _einsum(args: tuple[Any, ...]) -> list[Call]:
    flat = [args[0], *(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])]
    if (
        not isinstance(flat[0], str)
        or "->" not in flat[0]
        or not all(isinstance(factor, Tensor) for factor in flat[1:])
    ):
        return []
    left, _, result = flat[0].replace(" ", "").partition("->")
    terms = left.split(",")
    found = []
    for own, other in permutations(range(len(terms)), 2):
        beside = [i for i in range(len(terms)) if i not in (own, other)]
        # what is learnt beside it would be lost to the search for what an output is made of
        if any(flat[i + 1].requires_grad or {*terms[own]} & {*terms[i]} for i in beside):
            continue
        axes = _of_letters(terms[own], terms[other], result)
        if axes is not None:
            again: _Again = (torch.einsum, tuple(flat), other + 1, {})
            found.append(Call(flat[own + 1], axes, flat[other + 1], None, again))
    return found


def _of_letters(own: str, other: str, result: str) -> Axes | None:
    """What the letters of one factor of an einsum stand for; None where that is not a linear map of the other one."""
    if "." in own or len(set(own)) < len(own) or any(letter not in other + result for letter in own):
        return None
    groups = [i for i, letter in enumerate(own) if letter in other and letter in result]
    outputs = [i for i, letter in enumerate(own) if letter not in other]
    inputs = [i for i, letter in enumerate(own) if letter not in result]
    behind = result.rpartition(".")[2]
    if not inputs or any(own[i] not in behind for i in groups + outputs):
        return None
    units = tuple(behind.index(own[i]) - len(behind) for i in groups + outputs)
    return Axes(tuple(groups), tuple(outputs), tuple(inputs), units)
