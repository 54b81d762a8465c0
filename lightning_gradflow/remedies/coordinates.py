"""The coordinates that a run trains in, where its inputs or targets are unscaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_gradflow.remedies.input_scaling import InputScaling
from lightning_gradflow.remedies.output_scaling import OutputScaling


class Coordinates:
    """Those of standardised inputs and of standardised targets; a layer may be in both."""

    def __init__(self) -> None:
        self.inputs = InputScaling()
        self.outputs = OutputScaling()

    @property
    def is_in_force(self) -> bool:
        """Whether any layer trains in others than its own."""
        return bool(self.inputs.layers) or self.outputs.layer is not None

    def attach(self, model: nn.Module) -> None:
        """Finds the layers in a model."""
        self.inputs.attach(model)
        self.outputs.attach(model)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step; its gradients are complete and not clipped yet."""
        self.inputs.before_step(optimizer)
        self.outputs.before_step(optimizer)

    def batch_end(self) -> None:
        """Takes back what a skipped step left behind."""
        self.outputs.batch_end()
        self.inputs.batch_end()

    def release(self) -> None:
        """Takes all hooks off."""
        self.outputs.release()
        self.inputs.release()

    def state_dict(self) -> dict[str, Any]:
        """The scales."""
        return {**self.inputs.state_dict(), "outputs": self.outputs.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, once `attach` has been called."""
        self.inputs.load_state_dict(state)
        self.outputs.load_state_dict(state.get("outputs", {}))
