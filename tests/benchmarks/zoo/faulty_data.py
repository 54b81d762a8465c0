"""Real data as it should not be fed: unscaled, without signal, with a NaN in it; and long sequences."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_wine  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader

from .data import digits, loader

_TABLES = {"breast_cancer": load_breast_cancer, "wine": load_wine}


def table(
    seed: int,
    *,
    name: str,
    scaled: bool = True,
    column: int | None = None,
    factor: float = 1.0,
    shuffled: bool = False,
) -> DataLoader[Any]:
    """One of scikit-learn's tables with its classes.

    Standardised or as measured; with one ``column`` in another unit; with labels of its own or dealt out anew.
    """
    x, y = _features(name)
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    if scaled:
        x = (x - x.mean(0)) / x.std(0)
    if column is not None:
        x = x.clone()
        x[:, column] *= factor
    return loader(x.float(), y, seed=seed, batch_size=32)


def _features(name: str) -> tuple[Tensor, Tensor]:
    x, y = _TABLES[name](return_X_y=True)
    return torch.tensor(x, dtype=torch.float64), torch.tensor(y)


def pixels(seed: int, *, factor: float = 1.0, offset: float = 0.0) -> DataLoader[Any]:
    """Digits with pixels in [offset - factor, offset + factor]."""
    x, y = _digits()
    return loader(x * factor + offset, y, seed=seed, batch_size=32)


def shuffled_labels(seed: int) -> DataLoader[Any]:
    """Digits whose labels were dealt out anew."""
    x, y = _digits()
    return loader(x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))], seed=seed, batch_size=32)


def one_nan(seed: int, *, batch: int = 30) -> DataLoader[Any]:
    """Digits in a fixed order, with one missing pixel in one sample of batch number ``batch``."""
    x, y = _digits()
    x = x.clone()
    x[batch * 32 + 7, 20] = torch.nan
    return loader(x, y, seed=seed, batch_size=32, shuffle=False)


def in_order(seed: int) -> DataLoader[Any]:
    """Digits in a fixed order."""
    return loader(*_digits(), seed=seed, batch_size=32, shuffle=False)


def rows_then_blank(seed: int, *, blank: int) -> DataLoader[Any]:
    """Digits as eight rows, followed by ``blank`` empty ones: (B, 8 + blank, 8)."""
    x, y = _digits()
    x = torch.cat([x.view(-1, 8, 8), torch.zeros(len(x), blank, 8)], 1)
    return loader(x, y, seed=seed, batch_size=32)


def features_then_blank(seed: int, *, blank: int) -> DataLoader[Any]:
    """Tumours as a sequence of 30 standardised features, followed by ``blank`` zeros: (B, 30 + blank, 1)."""
    x, y = _features("breast_cancer")
    x = ((x - x.mean(0)) / x.std(0)).float()
    return loader(torch.cat([x, torch.zeros(len(x), blank)], 1)[:, :, None], y, seed=seed, batch_size=32)


def _digits() -> tuple[Tensor, Tensor]:
    x, y = digits(0).dataset[:]  # type: ignore[index]
    return x, y
