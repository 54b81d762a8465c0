"""Outputs that a loss compares with targets, by a function of torch's or by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Compared = Callable[[Tensor, Tensor], None]

_ERRORS = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss})
_MINUS = frozenset({torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__})
_FROM = frozenset({torch.rsub, Tensor.__rsub__})
_EVEN = frozenset({torch.square, Tensor.square, torch.abs, Tensor.abs, Tensor.__abs__})
_POWER = frozenset({torch.pow, Tensor.pow, Tensor.__pow__})
_TIMES = frozenset({torch.mul, Tensor.mul, Tensor.__mul__})
_REDUCED = frozenset({torch.mean, Tensor.mean, torch.sum, Tensor.sum})
_LOG_SOFTMAXES = frozenset({torch.log_softmax, Tensor.log_softmax, F.log_softmax})
COMPARING = frozenset[Any](_ERRORS | _MINUS | _FROM | _EVEN | _POWER | _TIMES | _REDUCED)
"""Every function that a comparison may be made of."""

SCORING = frozenset[Any](_LOG_SOFTMAXES | {F.cross_entropy})
"""Those that get the scores of classes."""

_MOST = 8  # that are followed at a time: a loss is next to what it is made of


class Comparisons:
    """Follows absolute and squared errors from the difference to the mean or the sum over it.

    What is weighted or masked in between is not reported: its targets need not be what they seem. Nor are comparisons
    of tensors of different shapes, and those in which both have a graph, or none.

    Args:
        on_compared: called with outputs and targets.

    Example:
        >>> seen = Comparisons(lambda outputs, targets: print(outputs.shape, targets.shape))
        >>> y, t = torch.zeros(4, 1, requires_grad=True), torch.ones(4, 1)
        >>> seen.see(F.mse_loss, F.mse_loss(y, t), (y, t), {})
        torch.Size([4, 1]) torch.Size([4, 1])
    """

    def __init__(self, on_compared: Compared) -> None:
        self._on_compared = on_compared
        self.clear()

    def clear(self) -> None:
        """Lets go of what it follows."""
        self._differences: deque[tuple[Tensor, tuple[Tensor, Tensor]]] = deque(maxlen=_MOST)
        self._errors: deque[tuple[Tensor, tuple[Tensor, Tensor]]] = deque(maxlen=_MOST)

    def see(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the call of one of `COMPARING`."""
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        if func in _ERRORS:
            pair = _pair(*args[:2], *(kwargs[key] for key in ("input", "target") if key in kwargs))
            if pair is not None and kwargs.get("reduction", "mean") == "none":
                self._errors.append((result, pair))
            elif pair is not None:
                self._on_compared(*pair)
        elif func in _MINUS or func in _FROM:
            pair = _pair(*args[:2])
            if pair is not None:
                self._differences.append((result, pair))
        elif func in _REDUCED:
            for error, pair in [*self._errors]:
                if not (args and error is args[0]):
                    continue
                if result.dim() == 0:
                    self._on_compared(*pair)
                else:  # a sum over features, of which each may have a weight of its own yet
                    self._errors.append((result, pair))
        elif args and _is_even(func, args):
            self._errors.extend((result, pair) for difference, pair in self._differences if difference is args[0])


def _pair(*both: Any) -> tuple[Tensor, Tensor] | None:
    """Outputs and targets: the graph tells which are which."""
    if len(both) != 2 or not all(isinstance(one, Tensor) for one in both) or both[0].shape != both[1].shape:
        return None
    outputs = [one for one in both if one.requires_grad]
    if len(outputs) != 1:
        return None
    return outputs[0], both[1] if outputs[0] is both[0] else both[0]


def _is_even(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a difference is squared, or its sign is taken away."""
    if func in _EVEN:
        return True
    return (func in _POWER and args[1:2] == (2,)) or (func in _TIMES and len(args) > 1 and args[0] is args[1])


def scores_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The scores that a cross-entropy, or the log-softmax that it begins with, gets, with the classes on the last axis.

    Example:
        >>> scores_of(F.cross_entropy, (torch.zeros(4, 3, 7), torch.zeros(4, 7)), {}).shape
        torch.Size([4, 7, 3])
    """
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.dim():
        return None
    if func is F.cross_entropy:
        return scores.movedim(min(1, scores.dim() - 1), -1)
    if func in _LOG_SOFTMAXES:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return scores.movedim(dim, -1) if isinstance(dim, int) else None
    return None


def around_mean(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores less their mean over the last axis, and where there are some: masked ones count for nothing.

    Example:
        >>> deviations, there = around_mean(torch.tensor([1.0, 3.0, -torch.inf]))
        >>> deviations.tolist(), there.tolist()
        ([-1.0, 1.0, 0.0], [True, True, False])
    """
    there = scores.isfinite()
    mean = torch.where(there, scores, 0.0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(there, scores - mean, 0.0), there
