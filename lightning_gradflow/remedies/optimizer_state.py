"""What an optimizer remembers of a parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def forget(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Removes the state of `parameters`, as if they were new.

    The whole state goes, the step counter too: zero moments beside an old counter make Adam overshoot several times
    its learning rate, because its bias correction has long faded.

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
