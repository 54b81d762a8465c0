"""The four callbacks as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer

from lightning_gradflow.callbacks.auto_mitigator import AutoMitigator, Mode
from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.callbacks.grad_norm_logger import GradNormLogger
from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.callbacks.saturation_monitor import SaturationMonitor

AUTOMATIC_STATE = "lightning_gradflow"
"""Where in a checkpoint the state of a GradFlow lies that came from the environment.

Not among the states of callbacks: Lightning would ask to add one that the user never wrote.
"""


class GradFlow(Monitor):
    """Watches a training and says when it does not learn, in which layer, why, and what to write instead.

    `callbacks=[GradFlow()]` is all there is to do. It is `GradNormLogger`, `SaturationMonitor`, `PlateauDetector` and
    `AutoMitigator` in one, with a summary on the console and a page in the run's log directory at the end.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`. The first
            steps are sampled more densely: 0, 1, 2, 4, 8, ... up to the interval.
        mitigate: `"off"`, `"suggest"` or `"apply"`, as the `mode` of `AutoMitigator`. Without `"apply"` nothing in the
            run changes.
        gradients: a configured `GradNormLogger` instead of the default one.
        saturation: a configured `SaturationMonitor` instead of the default one.
        plateau: a configured `PlateauDetector` instead of the default one.
        mitigator: a configured `AutoMitigator`, which then decides instead of `mitigate`.
        report: whether `gradflow_report.html` is written at the end of a fit, or when it dies.
        console: whether a summary is printed at the end of a fit.

    Raises:
        ValueError: if an argument is out of its range, or `mitigate` and `mitigator` contradict each other.

    Example:
        >>> flow = GradFlow(every_n_steps=10, saturation=SaturationMonitor(max_dead=0.5), report=False)
        >>> flow.findings
        ()
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        mitigate: Mode = "suggest",
        gradients: GradNormLogger | None = None,
        saturation: SaturationMonitor | None = None,
        plateau: PlateauDetector | None = None,
        mitigator: AutoMitigator | None = None,
        report: bool = True,
        console: bool = True,
    ) -> None:
        super().__init__(every_n_steps)
        if mitigate not in get_args(Mode):
            raise ValueError(f"mitigate must be one of {get_args(Mode)}, got {mitigate!r}")
        children = (
            ("gradients", gradients, GradNormLogger),
            ("saturation", saturation, SaturationMonitor),
            ("plateau", plateau, PlateauDetector),
            ("mitigator", mitigator, AutoMitigator),
        )
        for name, child, kind in children:
            if child is not None and not isinstance(child, kind):
                raise ValueError(f"{name} must be a {kind.__name__} or None, got {child!r}")
        for name, switch in (("report", report), ("console", console)):
            if not isinstance(switch, bool):
                raise ValueError(f"{name} must be True or False, got {switch!r}")
        if mitigator is not None and mitigate not in ("suggest", mitigator.mode):
            raise ValueError(f"mitigate must agree with the mode of mitigator ({mitigator.mode!r}), got {mitigate!r}")
        self._children: tuple[Monitor, ...] = (
            gradients or GradNormLogger(),
            saturation or SaturationMonitor(),
            plateau or PlateauDetector(),
            mitigator or AutoMitigator(mitigate),
        )
        self.report = report
        self.console = console

    def parts(self) -> Sequence[Monitor]:
        """The four children."""
        return self._children

    @property
    def report_path(self) -> Path | None:
        """Where the page of the last fit lies; None before its end, on other ranks, and where none was written."""
        return self._session.report_path if self._session is not None else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Goes on from a run that was watched through the environment; a state of its own comes later and counts."""
        self._restored = checkpoint.get(AUTOMATIC_STATE)
