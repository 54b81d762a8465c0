"""From findings to suggestions, and, when asked, to actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.callbacks.grad_norm_logger import GradNormLogger
from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.callbacks.saturation_monitor import SaturationMonitor
from lightning_gradflow.detectors.base import Detector, check_range
from lightning_gradflow.remedies.plan import REMEDIES
from lightning_gradflow.remedies.trial import Mitigation

Mode = Literal["off", "suggest", "apply"]


class AutoMitigator(Monitor):
    """Turns findings into suggestions, with the user's own layers in the code, and applies remedies when asked.

    Alone in a Trainer it watches for everything that the other three find.

    With `"apply"` a finding of warning or above gets the first remedy that fits its cause. Before it acts, weights,
    optimizer states and the remedies in force are kept. After a tenth of the planned steps (16 to 200) it is kept if
    the alarm is gone and the loss is not higher, or the loss has clearly fallen; if not, everything is put back, and
    after a pause the next remedy is tried. `flow.actions` says what was done, and what came of it.

    - `"clip"`: gradient norms that stand out from the run's own are scaled down; what is not finite is left out.
    - `"reinit"`: layers that lose or blow up the signal are drawn anew and made critical on a batch of the run, only
      while nothing has been learnt. Recurrences get orthogonal weights and gate biases for the length of the sequence.
    - `"recycle"`: dead units get new incoming weights, and nothing else changes.
    - `"rollback"`: the run goes back to its last good weights, and on at a smaller learning rate, or none above the one
      that was good, whatever the scheduler says. If it went well and broke, it clips from then on too, where it may.
    - `"scale_inputs"`: layers that take unscaled inputs train as if these were standardised.

    Args:
        mode: `"off"`, `"suggest"` (nothing in the run changes) or `"apply"`.
        allow: remedies that `"apply"` may use; any of the five.
        max_actions: actions in a run, in [0, inf). The default of 3 lets a remedy be followed by another; whoever needs
            more has a model to change.
        max_progress: share of the planned steps after which no weights are overwritten (`"reinit"`, `"recycle"`,
            `"scale_inputs"`), in (0, 1]. With the default of 0.75 new weights have a quarter of the run to learn.
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Mishkin and Matas 2016; Schoenholz et al. 2017 (critical initialisation); Seetharaman et al. 2020 (clipping);
        Tallec and Ollivier 2018 (gates); Sokar et al. 2023 (recycling); LeCun et al. 1998 (inputs).

    Example:
        >>> AutoMitigator(mode="always")
        Traceback (most recent call last):
        ...
        ValueError: mode must be one of ('off', 'suggest', 'apply'), got 'always'
    """

    measures_gradients = True  # the limit for clipping comes from them
    measures_activations = True
    explains_plateaus = True

    def __init__(
        self,
        mode: Mode = "suggest",
        allow: Sequence[str] = REMEDIES,
        max_actions: int = 3,
        max_progress: float = 0.75,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if isinstance(allow, str):
            raise ValueError(f"allow must be a sequence of remedies of {REMEDIES}, such as [{allow!r}], got {allow!r}")
        if not set(allow) <= set(REMEDIES):
            raise ValueError(f"allow must hold only remedies of {REMEDIES}, got {allow!r}")
        check_range("max_actions", max_actions, 0, float("inf"), open_low=False, whole=True)
        self.mode = mode
        self.allow = tuple(allow)
        check_range("max_progress", max_progress, 0, 1, open_high=False)
        self.max_actions = max_actions
        self.max_progress = max_progress

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
        return Mitigation(self.allow, self.max_actions, self.max_progress) if self.mode == "apply" else None
