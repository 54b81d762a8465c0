"""Which of the things a user returns and logs is the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_WORDS = ("loss", "nll", "cross_entropy", "objective", "cost", "elbo", "energy", "mse", "perplexity")
_VALIDATION = ("val", "valid", "validation", "eval", "dev")


def returned_loss(outputs: Any) -> Tensor | None:
    """The loss that a step returned, as a tensor or under the key `loss`, or None.

    Example:
        >>> import torch
        >>> returned_loss({"loss": torch.tensor(2.0)}), returned_loss(None)
        (tensor(2.), None)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None


def find_loss(names: Iterable[str], *, validation: bool) -> str | None:
    """The name that a training or a validation loss was logged under, or None.

    Among the names that speak of validation (or do not), the first that has a word for a loss in it, the shortest
    first: `val_loss` comes before `val_loss_of_the_auxiliary_head`. Where there is but one such name, it is taken
    whatever it says.

    Args:
        names: the names that are logged.
        validation: whether the validation loss is wanted.

    Example:
        >>> find_loss(["acc", "train/loss", "val/loss"], validation=True)
        'val/loss'
        >>> find_loss(["my objective", "accuracy"], validation=False)
        'my objective'
    """
    candidates = sorted(
        {name for name in names if _is_validation(name) == validation}, key=lambda name: (len(name), name)
    )
    candidates = [
        name for name in candidates if not name.endswith("_step") or name.removesuffix("_step") not in candidates
    ]
    for word in _WORDS:
        for name in candidates:
            if word in name.lower():
                return name
    return candidates[0] if len(candidates) == 1 else None


def _is_validation(name: str) -> bool:
    words = name.lower().replace("/", " ").replace("_", " ").replace("-", " ").replace(".", " ").split()
    return any(word in _VALIDATION for word in words)
