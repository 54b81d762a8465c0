"""Gradient norms layer by layer, and the signal against depth."""

from __future__ import annotations

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.detectors.base import Detector, check_range
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.detectors.nonfinite import NonfiniteGradient
from lightning_gradflow.detectors.not_optimized import NotOptimized
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.rounding import RoundedSteps
from lightning_gradflow.detectors.small_weights import SmallWeights
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.detectors.vanishing import VanishingGradient


class GradNormLogger(Monitor):
    """Logs the gradient of each layer and finds gradients that vanish, explode, are not finite or never come.

    Besides, it finds steps that are out of proportion to the weights.

    The norms, the largest and the non-finite entries of the gradients can be read at every step: that takes two or
    three readings of them. What takes the forward and the backward pass of a step, as the signal against depth does,
    or a copy of the weights, is measured less often, and findings come with it; the rows in between have
    `gradients_only`.

    Args:
        every_n_steps: steps between two readings of the gradients, in [1, inf); None for the Trainer's
            `log_every_n_steps`.
        signal_every_n_steps: steps between two samples of everything, in [1, inf); None for what another monitor of the
            Trainer asks for, else for the least multiple of `every_n_steps` that is 50 or more: a sample costs a sixth
            to a third of a step.
        max_decay: decades that the signal may lose from the last to the first layer before it counts as vanishing, in
            (0, 100); see `VanishingGradient` for the default.
        max_growth: decades that it may gain before it counts as exploding, in (0, 100); see `ExplodingGradient`.
        max_update_ratio: share of their norm by which a step may change the weights, in (0, inf); see `UpdateRatio`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> GradNormLogger(every_n_steps=0)
        Traceback (most recent call last):
        ...
        ValueError: every_n_steps must be a whole number in [1, inf), got 0
    """

    measures_gradients = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        signal_every_n_steps: int | None = None,
        max_decay: float = 3.0,
        max_growth: float = 3.0,
        max_update_ratio: float = 1.0,
    ) -> None:
        super().__init__(every_n_steps)
        if signal_every_n_steps is not None:
            check_range("signal_every_n_steps", signal_every_n_steps, 1, float("inf"), open_low=False, whole=True)
        self._signal_every_n_steps = signal_every_n_steps
        self._detectors: list[Detector] = [
            RecurrentGradient(),  # of two findings of a kind that are as severe, the first counts: a loop is no depth
            VanishingGradient(max_decay, critical_decay=max(8.0, max_decay)),
            ExplodingGradient(max_growth),
            NonfiniteGradient(),
            NoGradient(),
            NotOptimized(),
            RoundedSteps(),
            SmallWeights(),
            UpdateRatio(max_ratio=max_update_ratio),
        ]

    @property
    def signal_every_n_steps(self) -> int | None:
        """Steps between two samples of everything, if it was said."""
        return self._signal_every_n_steps

    def detectors(self, alone: bool) -> list[Detector]:
        """Vanishing, exploding, non-finite and missing gradients, and the size of the steps."""
        return self._detectors
