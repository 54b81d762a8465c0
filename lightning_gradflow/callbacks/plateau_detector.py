"""A loss that does not fall, or that is computed from the wrong thing."""

from __future__ import annotations

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.detectors.alike_units import AlikeUnits
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.detectors.chaotic_layers import ChaoticLayers
from lightning_gradflow.detectors.chaotic_state import ChaoticState
from lightning_gradflow.detectors.large_tables import LargeTables
from lightning_gradflow.detectors.large_weights import LargeWeights
from lightning_gradflow.detectors.loss_mismatch import LossMismatch
from lightning_gradflow.detectors.mixed_samples import MixedSamples
from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.detectors.unreachable_targets import UnreachableTargets
from lightning_gradflow.detectors.unscaled import UnscaledInputs
from lightning_gradflow.detectors.unscaled_targets import UnscaledTargets


class PlateauDetector(Monitor):
    """Watches training and validation loss for a standstill before anything was learnt, by trend, not by patience.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.
        window: steps that must be without progress, in [32, inf); see `LossPlateau`.
        min_progress: relative progress over a window that counts as falling, in (0, 1); see `LossPlateau`.
        train_loss: name under which the training loss is logged. By default the loss that `training_step` returns
            is taken at every step; where it returns none (manual optimization), a logged name that speaks of a loss.
        val_loss: name under which the validation loss is logged. By default a logged name that speaks of validation and
            of a loss; where there is none, the loss that `validation_step` returns.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> PlateauDetector(window=8)
        Traceback (most recent call last):
        ...
        ValueError: window must be a whole number in [32, inf), got 8
    """

    measures_activations = True
    explains_plateaus = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        window: int = 200,
        min_progress: float = 0.01,
        train_loss: str | None = None,
        val_loss: str | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        self.train_loss = train_loss
        self.val_loss = val_loss
        plateau = LossPlateau(window, min_progress)
        self._detectors: list[Detector] = [
            LossMismatch(),
            MixedSamples(),
            UnscaledTargets(),
            UnreachableTargets(),
            UnscaledInputs(),
            ChaoticState(),
            ChaoticLayers(),
            LargeTables(),
            LargeWeights(),
            AlikeUnits(),
            plateau,
        ]

    def detectors(self, alone: bool) -> list[Detector]:
        """Wrong losses and axes, what nothing is learnt from, and the plateau; of two of a kind the first counts."""
        return self._detectors
