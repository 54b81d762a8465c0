"""Gradient norms layer by layer, and the signal against depth."""

from __future__ import annotations

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.detectors.nonfinite import NonfiniteGradient
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.detectors.vanishing import VanishingGradient


class GradNormLogger(Monitor):
    """Logs the gradient of each layer and finds gradients that vanish, explode, are not finite or never come.

    Besides, it finds steps that are out of proportion to the weights.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.
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
        max_decay: float = 3.0,
        max_growth: float = 3.0,
        max_update_ratio: float = 1.0,
    ) -> None:
        super().__init__(every_n_steps)
        self._detectors: list[Detector] = [
            RecurrentGradient(),  # of two findings of a kind that are as severe, the first counts: a loop is no depth
            VanishingGradient(max_decay, critical_decay=max(8.0, max_decay)),
            ExplodingGradient(max_growth),
            NonfiniteGradient(),
            NoGradient(),
            UpdateRatio(max_ratio=max_update_ratio),
        ]

    def detectors(self, alone: bool) -> list[Detector]:
        """Vanishing, exploding, non-finite and missing gradients, and the size of the steps."""
        return self._detectors
