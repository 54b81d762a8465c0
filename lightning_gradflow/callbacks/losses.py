"""Which of the things a user returns and logs is the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_WORDS = ("loss", "nll", "cross_entropy", "objective", "cost", "elbo", "energy", "mse", "perplexity")
_NO_LOSS = frozenset(
    {"acc", "accuracy", "top1", "top5", "f1", "auc", "auroc", "precision", "recall", "iou", "dice", "bleu", "rouge"}
    | {"r2", "lr", "step", "epoch", "time", "norm", "grad", "psnr", "ssim", "map", "score", "reward", "return"}
)
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
    first: `val_loss` comes before `val_loss_of_the_auxiliary_head`. Where none has, and there is but one that does not
    speak of something else (an accuracy, a learning rate), that one is taken.

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
    others = [name for name in candidates if not _NO_LOSS & set(_words(name))]
    return others[0] if len(others) == 1 else None


def _is_validation(name: str) -> bool:
    return any(word in _VALIDATION for word in _words(name))


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
