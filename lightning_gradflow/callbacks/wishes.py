"""What a group of monitors asks for, put together: how often, of what, and shown where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.detectors.base import Detector
from lightning_gradflow.sinks import ConsoleSink, ReportSink, make_sinks
from lightning_gradflow.sinks.base import Sink

if TYPE_CHECKING:
    from lightning_gradflow.callbacks.base import Monitor

_SIGNAL_INTERVAL = 50  # steps at least, as Lightning logs by default
_DEAD_WINDOW = 3  # samples, as SaturationMonitor has it, where none is among the monitors


class Wishes:
    """What the monitors of one Trainer want.

    Args:
        monitors: in the order of the Trainer's callbacks.
    """

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = list(monitors)
        self.parts = [part for monitor in monitors for part in monitor.parts()]

    def detectors(self) -> list[Detector]:
        """Each once."""
        alone = len(self.parts) == 1
        found: list[Detector] = []
        for part in self.parts:
            found += [detector for detector in part.detectors(alone) if detector not in found]
        return found

    @property
    def dead_window(self) -> int:
        """Samples in a row in which a unit must be silent to count as dead."""
        return next((part.dead_window for part in self.parts if part.dead_window is not None), _DEAD_WINDOW)

    def intervals(self, of_logger: int) -> tuple[int, int]:
        """Steps between two samples, and between two readings of the gradients alone.

        Args:
            of_logger: every how many steps the Trainer logs.
        """
        monitors = [*self.parts, *self._monitors]
        # a monitor that says how often it wants everything, and nothing else, reads the rest as often as is usual
        said = [
            monitor for monitor in monitors if (monitor.every_n_steps, monitor.signal_every_n_steps) != (None, None)
        ]
        asked = [of_logger if monitor.every_n_steps is None else monitor.every_n_steps for monitor in said]
        of_signal = [n for monitor in monitors if (n := monitor.signal_every_n_steps) is not None]
        if not asked and not of_signal:
            return of_logger, of_logger
        finest = min(asked + of_signal)
        # where nobody says: a sample costs up to a third of a step, which is then below one in a hundred
        return min(of_signal, default=finest * -(-_SIGNAL_INTERVAL // finest)), finest

    def loss_name(self, which: str) -> str | None:
        """The name that a loss is logged under, if a monitor tells it.

        Args:
            which: `train_loss` or `val_loss`.
        """
        return next((getattr(part, which) for part in self.parts if getattr(part, which, None)), None)

    def sinks(self, trainer: Trainer) -> list[Sink]:
        """Where it is shown; nowhere in a trial run of the Trainer's own."""
        if trainer_facts.is_dry_run(trainer):
            return []
        sinks = list(make_sinks(trainer.loggers))
        report = None
        if any(monitor.report for monitor in self._monitors):
            report = ReportSink(lambda: trainer_facts.run_directory(trainer))
            sinks.append(report)
        if any(monitor.console for monitor in self._monitors):
            sinks.append(ConsoleSink(report))
        return sinks
