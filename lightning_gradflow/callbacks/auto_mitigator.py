"""From findings to suggestions, and, when asked, to actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.callbacks.grad_norm_logger import GradNormLogger
from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.callbacks.saturation_monitor import SaturationMonitor
from lightning_gradflow.detectors.base import Detector, check_range
from lightning_gradflow.remedies.mitigation import REMEDIES, Mitigation

Mode = Literal["off", "suggest", "apply"]


class AutoMitigator(Monitor):
    """Turns findings into suggestions, with the user's own layers in the code, and applies remedies when asked.

    Alone in a Trainer it watches for everything that the other three find.

    Args:
        mode: `"off"`, `"suggest"` (nothing in the run changes) or `"apply"`: exploding gradients are clipped, and
            layers whose gradient vanishes are drawn anew as long as the run has learnt nothing.
        allow: remedies that `"apply"` may use: any of `"clip"` and `"reinit"`.
        max_actions: actions in a run, in [0, inf). The default of 3 lets a remedy be followed by another; whoever needs
            more has a model to change.
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> AutoMitigator(mode="always")
        Traceback (most recent call last):
        ...
        ValueError: mode must be one of ('off', 'suggest', 'apply'), got 'always'
    """

    measures_gradients = True  # the limit for clipping comes from them
    measures_activations = True

    def __init__(
        self,
        mode: Mode = "suggest",
        allow: Sequence[str] = REMEDIES,
        max_actions: int = 3,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if isinstance(allow, str) or not set(allow) <= set(REMEDIES):
            raise ValueError(f"allow must hold only remedies of {REMEDIES}, got {allow!r}")
        check_range("max_actions", max_actions, 0, float("inf"), open_low=False, whole=True)
        self.mode = mode
        self.allow = tuple(allow)
        self.max_actions = max_actions

    @property
    def suggests(self) -> bool:
        """Whether findings are to carry suggestions."""
        return self.mode != "off"

    def detectors(self, alone: bool) -> list[Detector]:
        """None beside other monitors; alone, what all of them bring."""
        if not alone:
            return []
        others = (GradNormLogger(), SaturationMonitor(), PlateauDetector())
        return [detector for other in others for detector in other.detectors(alone=False)]

    def mitigation(self) -> Mitigation | None:
        """What acts on the run."""
        return Mitigation(self.allow, self.max_actions) if self.mode == "apply" else None
