"""What an optimizer remembers of a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.shards import is_sharded

_DIRECTIONS = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev"})
"""State of torch's optimizers that says where to go: it is signed, and 0 at the start."""

_SIZES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "variance"}) | {
    "row_var",
    "col_var",
    "step_size",
}
"""State that says how large gradients or steps are: it is never negative, and divides or scales the update."""


def forget(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Removes the state of `parameters`, as if they were new.

    The whole state goes, the step counter too: zero moments beside an old counter make Adam overshoot several times
    its learning rate, because its bias correction has long faded. LBFGS has one state for all of its parameters, a
    curvature that does not hold any more when one of them has changed: there all of it goes.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(1)
        >>> _ = optimizer.step()
        >>> forget([optimizer], [weight])
        >>> len(optimizer.state)
        0
    """
    chosen = list(parameters)
    for optimizer in optimizers:
        for parameter in chosen:
            optimizer.state.pop(parameter, None)
        if isinstance(optimizer, torch.optim.LBFGS) and _trains(optimizer, chosen):
            optimizer.state.clear()


@torch.no_grad()
def forget_units(
    optimizers: Iterable[torch.optim.Optimizer],
    parameter: nn.Parameter,
    rows: Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | Tensor | None = None,
) -> None:
    """Makes some units of a layer new to the optimizers, and leaves the other units what they had.

    A parameter has one step counter for all of its units, so the bias correction can't start again for a few of them.
    Were both moments of Adam set to 0 beside an old counter, the update after k steps of a steady gradient would be

        lr * (1 - beta1^k) / sqrt(1 - beta2^k)

    which is 3.2 lr at once and 6.6 lr at k = 12 (beta1 = 0.9, beta2 = 0.999). So

    - a direction (first moment, momentum) becomes 0: nothing of the old weights' way is followed;
    - a size (second moment v, running maximum, Rprop's step) becomes the *mean of the other units'*, taken input by
      input for rows and output by output for columns. The update after k steps is then at most

          lr * (1 - beta1^k) * c / sqrt(beta2^k + (1 - beta2^k) c^2)

      for a steady gradient c times as large as the root of that mean: at most lr for c = 1, less for the tiny gradients
      of units that have just come back, and never above the 6.6 lr of zero moments, which it nears as c grows. It is
      a mean and not a median because it is the expectation of g^2 over the units, and the larger and so the more
      careful of the two. RMSprop and Adagrad, which correct no bias, would overshoot far more from 0. Units that have
      been dead for long have both moments at 0 by themselves: to leave their state alone is no way out.
    - Adafactor keeps sizes by row and by column. A row becomes the mean of the other rows, and the columns are scaled
      so that the estimate for every other unit stays what it was.
    - Muon makes every update orthogonal, so that a new row moves no further than the others; its momentum becomes 0.

    The whole state of the parameter is removed, as by `forget`, where the units can't be told apart or compared: all
    rows or all columns are named, the parameter is spread over ranks, or the state is not by unit (LBFGS, 8 bit,
    matrices of preconditioners). State of unknown name counts as a size where it is nowhere negative.

    Args:
        optimizers: those that know the parameter, or not.
        parameter: its output units are dim 0, its input units dim 1.
        rows: indices or a mask of output units.
        columns: indices or a mask of input units; each of a bias is one for all outputs, so it has none.

    Raises:
        ValueError: if columns are named of a parameter that has none.

    References:
        Kingma and Ba 2015 (bias correction); Shazeer and Stern 2018 (factored moments).

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
        >>> _ = optimizer.step()
        >>> forget_units([optimizer], weight, rows=[2])
        >>> 1e3 * optimizer.state[weight]["exp_avg_sq"]
        tensor([[ 1.0000,  4.0000],
                [ 9.0000, 16.0000],
                [ 5.0000, 10.0000]])
    """
    if columns is not None and parameter.dim() < 2:
        raise ValueError(f"columns must be None for a parameter of {parameter.dim()} dimensions, got {columns}")
    masks = [(dim, _mask(parameter.shape[dim], units)) for dim, units in ((1, columns), (0, rows)) if units is not None]
    masks = [(dim, mask) for dim, mask in masks if mask.any()]
    for optimizer in optimizers if masks else ():
        state = optimizer.state.get(parameter, {})
        comparable = not is_sharded(parameter) and not any(mask.all() for _, mask in masks)
        if not comparable or isinstance(optimizer, torch.optim.LBFGS) or not _is_by_unit(state, parameter):
            forget([optimizer], [parameter])
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() == parameter.dim():
                for dim, mask in masks:  # columns first: the mean of the rows is to see them mended
                    _renew(value, dim, mask.to(value.device), _is_size(name, value), state.get(_PARTNERS.get(name, "")))


_PARTNERS = {"row_var": "col_var", "col_var": "row_var"}


def _renew(value: Tensor, dim: int, mask: Tensor, is_size: bool, partner: Any) -> None:
    """Makes the masked units of a state new; the state has 1 in `dim` where it does not tell these units apart."""
    if value.shape[dim] != len(mask):
        return
    units = value.movedim(dim, 0)
    if not is_size:
        units[mask] = 0
        return
    before = value.mean(dim, keepdim=True)
    units[mask] = units[~mask].mean(dim=0)
    if isinstance(partner, Tensor) and partner.shape[dim] == 1:
        # Adafactor divides by the mean of one of the two factors, and both have the same: a unit without gradient has
        # made it smaller than that of the healthy ones
        partner.mul_(torch.where(before > 0, value.mean(dim, keepdim=True) / before, 1.0))


def _is_size(name: str, value: Tensor) -> bool:
    return name in _SIZES or (name not in _DIRECTIONS and bool((value >= 0).all()))


def _is_by_unit(state: Any, parameter: nn.Parameter) -> bool:
    """Whether all that is kept is a number, or has a value for each unit of the parameter, or one that units share."""
    return all(
        (isinstance(value, Tensor) and value.numel() == 1)
        or (isinstance(value, Tensor) and value.is_floating_point() and _is_along(value, parameter))
        or value is None
        or isinstance(value, (bool, int, float, str))
        for value in state.values()
    )


def _is_along(value: Tensor, parameter: nn.Parameter) -> bool:
    return value.dim() == parameter.dim() and all(
        mine in (1, its) for mine, its in zip(value.shape, parameter.shape, strict=True)
    )


def _mask(number: int, units: Sequence[int] | Tensor) -> Tensor:
    mask = torch.zeros(number, dtype=torch.bool)
    chosen = units.cpu() if isinstance(units, Tensor) else torch.tensor(list(units), dtype=torch.long)
    mask[chosen] = True
    return mask


def _trains(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in own for p in parameters)
