"""Saturated activations and dead units."""

from __future__ import annotations

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.detectors.base import Detector, check_range
from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.detectors.loud_scores import LoudScores
from lightning_gradflow.detectors.saturation import SaturatedActivation


class SaturationMonitor(Monitor):
    """Watches activations, modules and functional calls alike, for saturation and dead units.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.
        max_saturated: share of outputs near a bound above which an activation counts as saturated, in (0, 1]; see
            `SaturatedActivation`.
        max_dead: share of dead units in an activation above which it is an alarm, in (0, 1]; see `DeadUnits`.
        window: samples in a row in which a unit must be silent to count as dead, in [1, inf). The default of 3 is
            full at step 2: a unit that fires for one input in a hundred is missed by three batches of 64 in one case
            out of seven, and hardly ever nine in ten of a layer's units are such.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> SaturationMonitor(max_dead=1.5)
        Traceback (most recent call last):
        ...
        ValueError: max_dead must be in (0, 1], got 1.5
    """

    measures_activations = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_saturated: float = 0.9,
        max_dead: float = 0.9,
        window: int = 3,
    ) -> None:
        super().__init__(every_n_steps)
        check_range("max_dead", max_dead, 0, 1, open_high=False)
        check_range("window", window, 1, float("inf"), open_low=False, whole=True)
        self.dead_window = window
        self._detectors: list[Detector] = [
            DeadUnits(max_dead, noted_dead=min(0.5, max_dead)),
            SaturatedActivation(max_saturated),
            LoudScores(),
        ]

    def detectors(self, alone: bool) -> list[Detector]:
        """Dead units, saturated activations, and softmaxes that choose one position each from the start."""
        return self._detectors
