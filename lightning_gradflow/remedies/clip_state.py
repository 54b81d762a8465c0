"""What clipping remembers of a run: which norms are usual, and how much was clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats, History
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.transfer import wide_dtype

_MIN_ROWS = 5  # before so many samples the run has no history of its own to speak of
_WARM_UP = 25  # norms that stand for the past: as many as ZClip gathers before its first clip
_IN_PROPORTION = 0.1  # of the weights: a step that changes more of them is no sign of health
COUNTED = 100
"""Steps that the share of clipped ones is taken over."""


class ClipState:
    """What is remembered of one optimizer's steps, on its device, without a copy to the host; NaN before any step.

    Args:
        past: (P,) norms that stand for the past; with P = 0 there is no limit for the first 25 steps.
        window: norms that are kept.
        max_factor: times the median of the past is what was usual at most.

    Example:
        >>> state = ClipState(np.array([1.0, 2.0, 4.0]), window=32, max_factor=2.0)
        >>> state.median().item(), state.usual_limit
        (2.0, 4.0)
        >>> state.take(torch.tensor(8.0), limit=torch.tensor(4.0), skips=False).item()
        0.5
    """

    def __init__(self, past: Floats, window: int, max_factor: float) -> None:
        self.norms = torch.full((window,), torch.nan, dtype=torch.float64)
        self.factors = torch.full((COUNTED,), torch.nan, dtype=torch.float64)
        self.limit = torch.full((), torch.inf, dtype=torch.float64)
        self.left_out = torch.zeros((), dtype=torch.int64)
        self.steps = 0
        self.usual_limit = max_factor * float(np.median(past)) if past.size else 0.0
        if past.size:
            # not more: soon the run's own steps are to say what is usual
            number = min(_WARM_UP, window)
            self.norms[-number:] = torch.from_numpy(np.quantile(past, np.linspace(0, 1, number)))

    def to(self, device: torch.device) -> None:
        """Goes to where the gradients are."""
        wide = wide_dtype(device)
        self.norms = self.norms.to(device, wide, non_blocking=True)
        self.factors = self.factors.to(device, wide, non_blocking=True)
        self.limit = self.limit.to(device, wide, non_blocking=True)
        self.left_out = self.left_out.to(device, non_blocking=True)

    def median(self) -> Tensor:
        """The median norm; inf while too few are known. NaN is sorted behind all numbers."""
        number = self.norms.isnan().logical_not_().sum()
        median = self.norms.sort().values.gather(0, ((number - 1).clamp(min=0) // 2).reshape(1)).squeeze(0)
        return torch.where(number >= min(_WARM_UP, len(self.norms)), median, torch.inf)

    def take(self, norm: Tensor, limit: Tensor, *, skips: bool) -> Tensor:
        """Remembers a step, and gives the factor for its gradients; one that is not finite counts unless it `skips`."""
        is_finite = norm.isfinite()
        factor = torch.where(is_finite, torch.where(norm > limit, limit / norm, 1.0), 1.0 if skips else 0.0)
        self.limit = limit
        self.steps += 1
        self.left_out = self.left_out + is_finite.logical_not()  # under a scaler it is the scaler that does it
        self.norms = _pushed(self.norms, torch.minimum(norm, limit), is_finite & (norm > 0))
        self.factors = _pushed(self.factors, factor, is_finite | (not skips))
        return factor

    def forget(self) -> None:
        """No norm is usual any more; what was counted stays."""
        self.norms = torch.full_like(self.norms, torch.nan)
        self.usual_limit = 0.0

    def known_factors(self) -> Floats:
        """(S,) factors of the last steps, oldest first. Reads from the device."""
        factors: Floats = self.factors.double().cpu().numpy()
        return factors[~np.isnan(factors)]

    def to_dict(self) -> dict[str, Any]:
        """Tensors and a number."""
        return {
            "norms": self.norms,
            "factors": self.factors,
            "limit": self.limit,
            "usual_limit": self.usual_limit,
            "left_out": self.left_out,
            "steps": self.steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from what `to_dict` gave; arrays will do for tensors."""
        self.norms, self.factors, self.limit = (torch.as_tensor(state[k]) for k in ("norms", "factors", "limit"))
        self.usual_limit = float(state["usual_limit"])
        self.left_out, self.steps = torch.as_tensor(state.get("left_out", 0)), int(state.get("steps", 0))


def past_norms(history: History, layers: LayerMap, optimizer: torch.optim.Optimizer, until: float = math.inf) -> Floats:
    """(P,) the newest gradient norms of an optimizer that are fit to be clipped to, 25 at most.

    Finite ones; where the step follows the size of the gradient, only those whose step changed less than a tenth of the
    weights. Fewer than five are none.

    Args:
        history: where to read.
        layers: of the model, to know the optimizer's own.
        optimizer: whose norms are wanted.
        until: the last step that counts.
    """
    own = {layers.owner(p) for group in optimizer.param_groups for p in group["params"]}
    columns = [i for i, name in enumerate(history.layers) if name in own]
    norms, updates, weights = (_joint(history[f"{of}_norm"][:, columns]) for of in ("grad", "update", "weight"))
    fit = np.isfinite(norms) & (norms > 0) & (history.steps <= until)
    if follows_size(optimizer):
        fit &= updates <= _IN_PROPORTION * weights
    return norms[fit][-_WARM_UP:] if fit.sum() >= _MIN_ROWS else np.empty(0)


def _joint(table: Floats) -> Floats:
    """(R, L) -> (R,) the norm of all that was measured in a row; NaN where nothing was."""
    joint: Floats = np.where(np.isnan(table).all(axis=1), np.nan, np.sqrt(np.nansum(np.square(table), axis=1)))
    return joint


def follows_size(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient of twice the size makes a step of twice the size.

    Those that even it out are known by their settings: an `eps` beside a second moment, two `betas`, the `etas` of
    Rprop. L-BFGS estimates a curvature of its own.
    """
    return not {"eps", "betas", "etas", "history_size"} & set(optimizer.defaults) and "lr" in optimizer.defaults


def _pushed(ring: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, torch.cat([ring[1:], value.reshape(1)]), ring)
