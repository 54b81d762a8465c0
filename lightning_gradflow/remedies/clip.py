"""Gradient clipping with a limit from the run's own history."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from lightning_gradflow.history import History

_MIN_ROWS = 5  # before so many samples the run has no history of its own to speak of
_USUAL_LIMIT = 1.0  # what most published recipes clip to


def limit_from(history: History) -> float:
    """The norm to clip to: the median of the run's own total gradient norms, or 1.0 while there are fewer than five.

    The median is not moved by the explosion itself, and non-finite norms are left out.

    References:
        Seetharaman et al. 2020, AutoClip: adaptive gradient clipping for source separation networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> for step, norm in enumerate([1.0, 3.0, 2.0, 2.5, 1e9]):
        ...     history.append(Row(step, scalars={"grad_norm_total": norm}))
        >>> limit_from(history)
        2.5
    """
    norms = history.scalar("grad_norm_total")
    norms = norms[np.isfinite(norms) & (norms > 0)]
    return float(np.median(norms)) if len(norms) >= _MIN_ROWS else _USUAL_LIMIT


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scales the gradients in place so that their joint L2 norm is at most `max_norm`.

    Gradients that are not finite are left as they are: scaling them would spread NaN over all layers. Nothing is
    copied to the host.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([30.0, 40.0])
        >>> clip([weight], max_norm=5.0)
        >>> weight.grad
        tensor([3.0000, 4.0000])
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if not gradients:
        return
    total = nn.utils.get_total_norm(gradients)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    factor = torch.where(torch.isfinite(total), factor, torch.ones_like(factor))
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
