"""What Lightning asks at every Trainer: a GradFlow where the environment says so, and else nothing."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gradflow.gradflow import AUTOMATIC_STATE, GradFlow

VARIABLE = "LIGHTNING_GRADFLOW"


def callbacks_factory() -> list[Callback]:
    """A GradFlow if `LIGHTNING_GRADFLOW` is exactly `1`, for a Trainer of either of Lightning's packages.

    Example:
        >>> import os
        >>> os.environ["LIGHTNING_GRADFLOW"] = "0"
        >>> callbacks_factory()
        []
        >>> del os.environ["LIGHTNING_GRADFLOW"]
    """
    return [AutomaticGradFlow()] if os.environ.get(VARIABLE) == "1" else []


class AutomaticGradFlow(GradFlow):
    """A GradFlow that no code asked for: beside monitors in the code it does nothing.

    Checkpoints with it can be resumed without it, and with a GradFlow in the code, and the other way round.
    """

    stands_back = True

    def __init__(self) -> None:
        super().__init__()
        self._takes_over = False

    @property
    def state_key(self) -> str:
        """That of a GradFlow while a fit restores, so that it goes on from one; else its own.

        Lightning takes no two stateful callbacks with one key.
        """
        return GradFlow.__qualname__ if self._takes_over else f"{type(self).__qualname__}-{id(self)}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks whether the code has monitors."""
        super().setup(trainer, pl_module, stage)
        self._takes_over = self._leads and stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The fit has restored what there was."""
        self._takes_over = False
        super().on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `on_save_checkpoint`."""
        return {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Puts the state where nobody misses the callback when the run is resumed without it."""
        state = super().state_dict()
        if state:
            checkpoint[AUTOMATIC_STATE] = state
