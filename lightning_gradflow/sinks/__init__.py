"""Where rows and findings are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_gradflow.sinks.base import Sink, View
from lightning_gradflow.sinks.console import ConsoleSink, summary
from lightning_gradflow.sinks.report import ReportSink
from lightning_gradflow.sinks.scalars import ScalarSink
from lightning_gradflow.sinks.tensorboard import TensorBoardSink
from lightning_gradflow.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink",
    "ReportSink",
    "ScalarSink",
    "Sink",
    "TensorBoardSink",
    "View",
    "WandbSink",
    "make_sinks",
    "summary",
]

_BY_CLASS_NAME: dict[str, Callable[[Any], Sink]] = {"WandbLogger": WandbSink, "TensorBoardLogger": TensorBoardSink}


def make_sinks(loggers: Iterable[Any]) -> list[Sink]:
    """A sink for each logger of a Trainer.

    They are told apart by the class names among their ancestors: so nothing that is optional gets imported, and the
    loggers of `lightning` and of `pytorch_lightning` do alike.

    Args:
        loggers: as in `trainer.loggers`.

    Returns:
        As many sinks, in the same order.

    Example:
        >>> class CSVLogger: ...
        >>> [type(sink).__name__ for sink in make_sinks([CSVLogger()])]
        ['ScalarSink']
    """
    return [_maker(logger)(logger) for logger in loggers]


def _maker(logger: Any) -> Callable[[Any], Sink]:
    for ancestor in type(logger).__mro__:
        if ancestor.__name__ in _BY_CLASS_NAME:
            return _BY_CLASS_NAME[ancestor.__name__]
    return ScalarSink
