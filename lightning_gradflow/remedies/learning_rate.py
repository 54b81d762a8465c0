"""A smaller learning rate that no scheduler undoes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_FAR_APART = 10.0  # times the smallest of several learning rates


class RateFactor:
    """Lets the optimizers use `factor` times the learning rate that the scheduler has set, and no more than a cap.

    Definition: `lr of the update = min(factor * param_group["lr"], cap)`, group by group. The result stands in the
    group only while the optimizer works: a hook puts it there as the step begins and another one puts the very same old
    object back as it ends. Around it schedulers, loggers and checkpoints meet the learning rate they know. So it holds
    with schedulers that compute the next rate from the present one, which an edit of `param_group["lr"]` breaks or
    undoes.

    A step with a closure runs the training step inside. For that time the own rate is put back, and the product is
    taken after it: what the training step or a hook reads is the scheduler's rate, what it sets is kept and
    multiplied, and an exception in it leaves nothing behind. Only a rate that another hook of the optimizer sets, after
    this one and in a step without a closure, is used as it is.

    What is multiplied is what a scheduler would scale: with AdamW the decoupled weight decay too. `Adafactor` of torch
    uses `min(lr, 1 / sqrt(step))`, so there the factor tells only as long as the rate is the smaller one.

    Nothing is copied to the host; a rate that is a tensor is replaced by a new tensor on its device, since several
    groups may share one.

    Args:
        optimizers: as torch knows them, not wrapped. Those that `can_treat` refuses are left alone, and so is a group
            without a learning rate that is a number.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = RateFactor([optimizer])
        >>> rate.factor = 0.25
        >>> weight.grad = torch.ones(1)
        >>> _ = optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._rates = [_Rates(optimizer) for optimizer in optimizers if _calls_hooks(optimizer)]
        self._factor, self._cap = 1.0, math.inf
        self._hooks: list[RemovableHandle] = []

    @staticmethod
    def can_treat(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether the factor would hold for all that is trained.

        No where a step calls no hooks (wrappers that are only like a torch optimizer), where a group has no rate that
        is a number (Adafactor with `lr=None`), and with Rprop, which looks at the rate in its first step alone.

        Example:
            >>> RateFactor.can_treat([torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)])
            True
        """
        return bool(optimizers) and all(
            _calls_hooks(optimizer)
            and not isinstance(optimizer, torch.optim.Rprop)
            and all(_is_rate(group.get("lr")) for group in optimizer.param_groups)
            for optimizer in optimizers
        )

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by, above 0; at 1.0 there is no hook and nothing is done."""
        return self._factor

    @factor.setter
    def factor(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"factor must be a finite number above 0, got {value}")
        self._factor = float(value)
        self._apply()

    @property
    def cap(self) -> float:
        """What the learning rate of no group exceeds, above 0; infinite where there is none.

        For a schedule that went too far: what it asks for below the cap is left as it is.
        """
        return self._cap

    @cap.setter
    def cap(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"cap must be above 0, got {value}")
        self._cap = float(value)
        self._apply()

    def _apply(self) -> None:
        if self._factor == 1.0 and self._cap == math.inf:
            self.release()
        elif not self._hooks:
            for rates in self._rates:
                self._hooks.append(rates.optimizer.register_step_pre_hook(partial(self._before, rates)))
                self._hooks.append(rates.optimizer.register_step_post_hook(partial(self._after, rates)))

    @contextmanager
    def in_force(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context in which the groups of an optimizer show the rate that its step is going to use."""
        shown = [r for r in self._rates if r.optimizer is optimizer and not r.is_multiplied] if self._hooks else []
        for rates in shown:
            rates.multiply(self._factor, self._cap)
        try:
            yield
        finally:
            for rates in shown:
                rates.put_back()

    def batch_end(self) -> None:
        """Puts back what a step that raised has left multiplied."""
        for rates in self._rates:
            rates.depth = 0
            rates.put_back()

    def release(self) -> None:
        """Takes the hooks off; the optimizers are as they were. The factor stays known, for a checkpoint."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.batch_end()

    def state_dict(self) -> dict[str, float]:
        """The factor and the cap."""
        return {"factor": self._factor, "cap": self._cap}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues with what `state_dict` gave."""
        self.factor, self.cap = state["factor"], state.get("cap", math.inf)

    def _before(
        self, rates: _Rates, _optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rates.depth += 1
        # also where a closure follows: LBFGS reads the rate before it calls it
        rates.multiply(self._factor, self._cap)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_own_rates(rates, kwargs["closure"])}
        # the first argument is the optimizer itself
        return tuple(
            self._with_own_rates(rates, a) if i == 1 and callable(a) else a for i, a in enumerate(args)
        ), kwargs

    def _with_own_rates(self, rates: _Rates, closure: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            rates.put_back()
            loss = closure(*args, **kwargs)
            if self._hooks:  # else released meanwhile: nothing would put the rates back
                rates.multiply(self._factor, self._cap)
            return loss

        return call

    def _after(self, rates: _Rates, *_: Any) -> None:
        # a subclass that calls the step of its base has its hooks called by both, one inside of the other
        rates.depth = max(rates.depth - 1, 0)
        if rates.depth == 0:
            rates.put_back()


def top_rate(groups: Sequence[Mapping[str, Any]]) -> float:
    """The largest learning rate of parameter groups that are far apart, by a factor of 10 or more; NaN of others.

    Of such groups it is the largest that is too large, where one is: a cap on it leaves the others as they are.

    Example:
        >>> top_rate([{"lr": 1e-4}, {"lr": 0.1}]), top_rate([{"lr": 0.1}, {"lr": 0.2}]), top_rate([{"lr": 0.1}])
        (0.1, nan, nan)
    """
    if not all(_is_rate(group.get("lr")) for group in groups):
        return math.nan
    rates = [float(group["lr"]) for group in groups]
    rates = [rate for rate in rates if rate > 0]
    return max(rates) if rates and max(rates) >= _FAR_APART * min(rates) else math.nan


class _Rates:
    """The learning rates of an optimizer, and what stands in their place."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.depth = 0  # steps that have begun and not ended
        self._replaced: list[tuple[dict[str, Any], Any, Any]] = []

    @property
    def is_multiplied(self) -> bool:
        """Whether the product stands in the groups."""
        return bool(self._replaced)

    def multiply(self, factor: float, cap: float = math.inf) -> None:
        """Puts the product in each group, once however often it is called."""
        self.put_back()
        for group in self.optimizer.param_groups:
            own: Any = group.get("lr")
            if _is_rate(own):
                group["lr"] = _capped(own * factor, cap)
                self._replaced.append((group, own, group["lr"]))

    def put_back(self) -> None:
        """Puts the old objects back; a rate that somebody set in between is left, it is newer."""
        for group, own, product in self._replaced:
            if group.get("lr") is product:
                group["lr"] = own
        self._replaced.clear()


def _capped(rate: Any, cap: float) -> Any:
    if cap == math.inf:
        return rate
    return rate.clamp(max=cap) if isinstance(rate, Tensor) else min(rate, cap)


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, (Real, Tensor))


def _calls_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its constructor and its step are torch's; private names, seen in torch 2.6 to 2.13."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)
