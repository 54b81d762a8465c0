"""The validation loss, whatever it is called, until the next row takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_gradflow.callbacks.losses import find_loss, returned_loss
from lightning_gradflow.probes.transfer import wide_dtype


class ValidationLoss:
    """Takes the validation loss under the name it was logged by, else the mean of what `validation_step` returned.

    It stays on the device until a row is made; then it is fetched, and summed over ranks, with the rest.

    Example:
        >>> loss = ValidationLoss()
        >>> loss.end({"val_loss": torch.tensor(0.5), "acc": torch.tensor(0.9)})
        >>> loss.take(torch.device("cpu"))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        # a NaN among the batches is not left out; ranks are summed with the sample
        self._returned = MeanMetric(nan_strategy="disable", sync_on_compute=False)
        self._newest: Tensor | None = None

    def add(self, outputs: Any) -> None:
        """A batch was validated."""
        loss = returned_loss(outputs)
        if loss is not None:
            self._returned.to(loss.device).update(loss)

    def forget(self) -> None:
        """What was validated does not count."""
        self._returned.reset()

    def end(self, logged: Mapping[str, Tensor], name: str | None = None) -> None:
        """A validation is over.

        Args:
            logged: name -> value, all that was logged so far.
            name: which of them it is; None to look for it.
        """
        name = name or find_loss(logged, validation=True)
        if name is not None and name in logged:
            self._newest = logged[name].detach()
        elif self._returned.update_called:
            self._newest = self._returned.compute()
        self._returned.reset()

    def take(self, device: torch.device) -> Tensor | None:
        """(2,) the newest loss and 1, to be summed over ranks; None where none came since it was taken last."""
        loss, self._newest = self._newest, None
        if loss is None:
            return None
        value = loss.reshape(()).to(device, wide_dtype(device))
        return torch.stack([value, torch.ones_like(value)])

    def state_dict(self) -> float | None:
        """The loss that waits for its row."""
        return float(self._newest) if self._newest is not None else None

    def load_state_dict(self, state: float | None) -> None:
        """Continues from what `state_dict` gave."""
        self._newest = torch.tensor(state, dtype=torch.float64) if state is not None else None
