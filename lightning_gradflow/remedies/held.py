"""The remedies that stay in force: they do something at each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.coordinates import Coordinates
from lightning_gradflow.remedies.guard import StatisticsGuard
from lightning_gradflow.remedies.input_scaling import InputScaling
from lightning_gradflow.remedies.learning_rate import RateFactor
from lightning_gradflow.remedies.output_scaling import TargetScale
from lightning_gradflow.remedies.training import Training


class Held:
    """Clipping, a smaller learning rate, and the coordinates that layers train in.

    Args:
        training: the run that they act on.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self.coordinates = Coordinates()
        self.rate = RateFactor(training.optimizers)
        self.clipper: Clipper | None = None
        self._guard: StatisticsGuard | None = None  # what clipping leaves out leaves no trace there either
        self.rollbacks = 0
        """How often the run went back."""
        self.slowest = 1.0
        """The smallest factor of the learning rate that was tried, whether or not it is in force."""

    @property
    def scaling(self) -> InputScaling:
        """The scale of the inputs."""
        return self.coordinates.inputs

    def start_clipping(self, training: Training, max_ratio: float = 0.01, until: float = math.inf) -> None:
        """Clips from now on, and leaves out what is not finite; see `Clipper` and `StatisticsGuard`."""
        self.clipper = Clipper(training, max_ratio=max_ratio, until=until)
        self._guard = StatisticsGuard(training.model)

    def centre(self, centres: Mapping[str, Centre]) -> None:
        """Lets layers train as if their inputs lay around 0; nothing that they compute changes."""
        self.scaling.hold(self._training, centres)

    def scale_outputs(self, scale: TargetScale) -> None:
        """Lets the run train as if its targets were standardised."""
        self.coordinates.outputs.start(self._training.model, scale)

    def before_step(self, optimizer: torch.optim.Optimizer, scale: Tensor | None) -> None:
        """The gradients of an optimizer are complete.

        Args:
            optimizer: the one that is about to step.
            scale: the factor of a gradient scaler that the gradients still carry, 1 where it has been taken out; None
                without a scaler.
        """
        self.coordinates.before_step(optimizer)
        if self.clipper is not None:
            with self.rate.in_force(optimizer):  # how far a gradient leads depends on it
                self.clipper.before_step(optimizer, scale)

    def batch_end(self) -> None:
        """Puts back what a step has left half done."""
        self.rate.batch_end()
        self.coordinates.batch_end()
        if self._guard is not None:
            self._guard.batch_end()

    def release(self) -> None:
        """Takes all hooks off."""
        self.rate.release()
        self.coordinates.release()
        if self.clipper is not None:
            self.clipper.release()
        self._guard = None

    def state_dict(self) -> dict[str, Any]:
        """What is in force."""
        return {
            "scaling": self.coordinates.state_dict(),
            "rate": self.rate.state_dict(),
            "clipper": self.clipper.state_dict() if self.clipper is not None else None,
            "rollbacks": self.rollbacks,
            "slowest": self.slowest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts in force what `state_dict` gave, and nothing else."""
        self.release()
        self.coordinates = Coordinates()
        self.coordinates.load_state_dict(state["scaling"])
        self.coordinates.attach(self._training.model)
        self.rate.load_state_dict(state["rate"])
        self.rollbacks, self.slowest = state["rollbacks"], state["slowest"]
        self.clipper = None
        if state["clipper"] is not None:
            self.clipper = Clipper(self._training)  # the history is read for nothing: the state comes next
            self.clipper.load_state_dict(state["clipper"])
            self._guard = StatisticsGuard(self._training.model)


def is_in_force(state: Mapping[str, Any]) -> bool:
    """Whether a state of `Held` holds anything that a run would miss.

    Example:
        >>> is_in_force({"scaling": {"layers": {}}, "rate": {"factor": 0.5, "cap": float("inf")}, "clipper": None})
        True
    """
    rate, scaling = state["rate"], state["scaling"]
    is_slow = rate["factor"] < 1 or math.isfinite(rate["cap"])
    return bool(scaling["layers"]) or bool(scaling.get("outputs")) or is_slow or bool(state["clipper"])
