"""Gradient norms layer by layer, and the signal against depth."""

from __future__ import annotations

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.nonfinite import NonfiniteGradient
from lightning_gradflow.detectors.vanishing import VanishingGradient


class GradNormLogger(Monitor):
    """Logs the gradient of each layer and finds gradients that vanish, explode or are not finite.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.
        max_decay: decades that the signal may lose from the last to the first layer before it counts as vanishing, in
            (0, 100); see `VanishingGradient` for the default.
        max_growth: decades that it may gain before it counts as exploding, in (0, 100); see `ExplodingGradient`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> GradNormLogger(every_n_steps=0)
        Traceback (most recent call last):
        ...
        ValueError: every_n_steps must be a whole number in [1, inf), got 0
    """

    measures_gradients = True

    def __init__(self, every_n_steps: int | None = None, max_decay: float = 4.0, max_growth: float = 4.0) -> None:
        super().__init__(every_n_steps)
        self._detectors: list[Detector] = [
            VanishingGradient(max_decay, critical_decay=max(8.0, max_decay)),
            ExplodingGradient(max_growth),
            NonfiniteGradient(),
        ]

    def detectors(self, alone: bool) -> list[Detector]:
        """Vanishing, exploding and non-finite gradients."""
        return self._detectors
