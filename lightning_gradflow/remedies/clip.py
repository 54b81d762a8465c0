"""Gradient clipping with a limit from the run's own history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.clip_state import COUNTED, ClipState, follows_size, past_norms
from lightning_gradflow.remedies.joint_norm import here, joint_norms, multiply
from lightning_gradflow.remedies.training import Training

_WITH_PAST = 10.0  # times the ceiling: healthy runs take such steps, and here the own norms hold the limit down
_MAX_SHARE = 0.5  # of the steps: beyond, clipping is a learning rate in disguise (tuning playbook)


class Clipper:
    """Clips each optimizer's gradients to what is usual in the run, or to what its weights can bear.

    With g the joint L2 norm of the gradients of one optimizer, before every step of it

        limit = min(max_factor * median of the last `window` clipped norms, ceiling)
        gradients *= min(1, limit / g)

    *Clipped* norms are kept. An explosion then lifts the limit by no more than `max_factor` in half a window, where
    unclipped ones would hand it the limit once it has lasted for half a window. The median, and not a high percentile:
    of clipped norms a percentile never rises and drifts down by chance, while a multiple of the median follows the run
    both ways. Norms of 0 are not kept, or a pause would set the limit to 0. What is counted as clipped is the share of
    the last 100 steps.

    The ceiling is for optimizers whose step grows with the gradient, as that of SGD does. It is the norm whose step
    changes the weights by the share `max_ratio`:

        ceiling = max_ratio * ||W|| * (1 - momentum) / (lr * (1 - dampening))

    (1 - momentum is for the steps that a momentum makes of one gradient.) So a run that exploded from the start, and
    has no healthy past, gets a limit too. With a healthy past it is ten times that, or `max_factor` times what was
    usual if that is more. Adam and its kin divide the gradient by its own size: what matters to them is only how a
    gradient compares with others of the run, and there is no ceiling.

    At the start 25 norms stand for the past, taken from the history; a row counts if it is finite and, where there is a
    ceiling, its step changed less than a tenth of the weights. With fewer than five such rows the median has no say
    for the first 25 steps.

    Gradients that are not finite, or above 1.8e19 in float32, become 0 and leave no trace in the limit. To know on the
    host that a step is to be skipped would stop the device, so it is made: momentum coasts on in its old direction,
    fading, Adam moves by less than its last step and weight decay acts. Under a gradient scaler they stay: it must see
    them.

    Nothing is copied to the host while the run goes on. The scale of the loss drops out wherever it drops out of the
    training itself. Sparse gradients count and are clipped like others. Of sharded ones each rank reads its part, and
    the squares are summed in one collective a step.

    It takes no account of what the optimizer remembers of an explosion: go back to a snapshot, or forget that state.

    Args:
        training: model, optimizers and history at the moment of switching on.
        max_factor: times the median norm, in [1, inf). With the default of 2, between 0 and 46 % of the last
            100 steps were clipped in 37 small healthy networks, mostly where norms rose. All but one ended at most 4 %
            worse, and that one did better in the mean of four seeds.
        window: steps whose median is taken, in [2, inf). With the default of 32 a burst of 15 steps does not move it,
            and the limit can grow tenfold in 53 steps: so fast grows a healthy norm at the start of a run.
        max_ratio: share of the norm of the weights, in (0, inf). The default of 0.01 is ten times what is usual, so
            that it is seldom a brake; of 0.001, 0.003, 0.01 and 0.03 it was the best or level with it in three small
            networks whose learning rate was 40 to 600 times too large. From fresh weights they ended near where a
            good one does.
        until: the last step of the history that counts as past, for a run that has gone back to it.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Pascanu et al. 2013, On the difficulty of training recurrent neural networks (clipping by norm); Seetharaman et
        al. 2020, AutoClip (the run's own percentile); Kumar et al. 2025, ZClip (warm-up, clipped norms in the
        statistics); Godbole et al. 2023, Deep Learning Tuning Playbook (more than half clipped: lower the rate); You et
        al. 2017, LARS (steps in proportion to the weights).

    Example:
        >>> from lightning_gradflow.history import History
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> clipper = Clipper(Training(net, [sgd], History()))
        >>> net.weight.grad = torch.tensor([[5e9]])
        >>> clipper.before_step(sgd)
        >>> net.weight.grad  # 0.1 times this is 0.01 times the weight
        tensor([[0.2000]])
    """

    def __init__(
        self,
        training: Training,
        *,
        max_factor: float = 2.0,
        window: int = 32,
        max_ratio: float = 0.01,
        until: float = math.inf,
    ) -> None:
        if not 1 <= max_factor < float("inf"):
            raise ValueError(f"max_factor must be in [1, inf), got {max_factor}")
        if window < 2:
            raise ValueError(f"window must be in [2, inf), got {window}")
        if not 0 < max_ratio < float("inf"):
            raise ValueError(f"max_ratio must be in (0, inf), got {max_ratio}")
        self._max_factor, self._max_ratio = max_factor, max_ratio
        self._optimizers = list(training.optimizers)
        layers = LayerMap(training.model)
        pasts = [past_norms(training.history, layers, optimizer, until) for optimizer in self._optimizers]
        self._states = [ClipState(past, window, max_factor) for past in pasts]
        self._is_on = True

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, scale: Tensor | float | None = None) -> None:
        """Clips the gradients that an optimizer is about to use, in place.

        Args:
            optimizer: one of the training's; others are left alone.
            scale: under a gradient scaler the factor that the gradients still carry, 1 where it has been taken out.
        """
        state = next((s for o, s in zip(self._optimizers, self._states, strict=True) if o is optimizer), None)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        is_shared = any(is_sharded(parameter) for parameter in parameters)
        with_gradient = [p for p in parameters if p.grad is not None]
        # a rank without gradients must not let the others wait
        if not self._is_on or state is None or not (with_gradient or is_shared):
            return
        for parameter in with_gradient:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # the rows of one token twice are one row
        gradients = [here(p.grad) for p in with_gradient if p.grad is not None]
        device = gradients[0].device if gradients else here(parameters[0]).device
        state.to(device)
        follows = follows_size(optimizer)
        norm, weights = joint_norms(with_gradient, gradients, device, is_shared, weigh=follows)
        norm = norm / (1.0 if scale is None else scale)
        limit = state.median() * self._max_factor
        if follows:
            ratio = self._max_ratio * (_WITH_PAST if state.usual_limit else 1.0)
            ceiling = (weights * ratio / _rate(optimizer, weights)).clamp(min=state.usual_limit)
            # weights that are all 0 have no scale
            limit = torch.where(weights > 0, torch.minimum(limit, ceiling), limit)
        # a scaler finds out for itself that a gradient is not finite, and skips the step
        drops = norm.isfinite().logical_not_() if scale is None else None
        multiply(gradients, state.take(norm, limit, skips=scale is not None), drops)

    def release(self) -> None:
        """Clips no more; there is nothing to put back. What was counted stays."""
        self._is_on = False

    def restart(self) -> None:
        """Forgets what norms are usual, for weights that were just drawn anew; for 25 steps only the ceiling holds."""
        for state in self._states:
            state.forget()

    def limits(self) -> tuple[float, ...]:
        """The limit at the last step of each optimizer; inf where there was none yet. Reads from the device."""
        return tuple(float(state.limit) for state in self._states)

    def clipped_share(self) -> float:
        """Share of the last 100 steps that were clipped or dropped, in [0, 1]; NaN before the first of them.

        Of several optimizers the one with the largest share counts. Reads from the device.
        """
        shares = [float((known < 1).mean()) for state in self._states if (known := state.known_factors()).size]
        return max(shares, default=float("nan"))

    def left_out(self) -> tuple[int, int]:
        """How many steps had a gradient that was not finite, and how many there were. Reads from the device.

        Of several optimizers the one with the most counts.
        """
        return max(((int(state.left_out), state.steps) for state in self._states), default=(0, 0))

    def left_out_share(self) -> float:
        """Share of the last 100 steps that were left out, in [0, 1]; 0 before the first. Reads from the device."""
        shares = [float((known == 0).mean()) for state in self._states if (known := state.known_factors()).size]
        return max(shares, default=0.0)

    def advice(self) -> str:
        """What to do when more than half of the last 100 steps were clipped, else nothing. Reads from the device.

        The first 50 steps are not judged. For an optimizer whose step grows with the gradient it
        names the median factor: the learning rate that makes the same steps.
        """
        told = []
        for i, (optimizer, state) in enumerate(zip(self._optimizers, self._states, strict=True)):
            factors = state.known_factors()
            share = (factors < 1).mean() if factors.size >= COUNTED / 2 else 0.0
            if share > _MAX_SHARE:
                which = f" of optimizer {i}" if len(self._states) > 1 else ""
                usual = float(np.median(factors))
                to = f" to about {usual:.2g} times what it is" if follows_size(optimizer) and usual > 0 else ""
                told.append(
                    f"{share:.0%} of the last {factors.size} steps{which} were clipped, which is a smaller learning "
                    f"rate in disguise: lower the learning rate{to}, and clip outliers only."
                )
        return " ".join(told)

    def state_dict(self) -> dict[str, Any]:
        """The norms and factors of each optimizer, in their order, as tensors, and the ceiling's share."""
        return {"optimizers": [state.to_dict() for state in self._states], "max_ratio": self._max_ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Clips on from what `state_dict` gave, a released one too: the limits are the same to the bit."""
        self._is_on, self._max_ratio = True, state["max_ratio"]
        for mine, its in zip(self._states, state["optimizers"], strict=True):
            mine.load(its)


def _rate(optimizer: torch.optim.Optimizer, like: Tensor) -> Tensor | float:
    """The largest share of a gradient that the weights move by, over all the steps that momentum makes of it."""
    rates: list[Any] = []
    for group in optimizer.param_groups:
        momentum = group.get("momentum", 0.0)
        gain = (1 - group.get("dampening", 0.0)) / max(1 - momentum, 1e-3) if momentum else 1.0
        rates.append(group["lr"] * gain)
    if not any(isinstance(rate, Tensor) for rate in rates):
        return float(max(rates))
    # a rate that is a tensor stays on its device
    tensors = [r.to(like, non_blocking=True).reshape(()) if isinstance(r, Tensor) else like * 0 + r for r in rates]
    return torch.stack(tensors).amax()
