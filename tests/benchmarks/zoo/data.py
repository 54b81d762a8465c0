"""Real data that needs no download: scikit-learn's bundled sets and the text that ships with Python."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CHARACTERS = 128
WORDS = 2048
SOURCES = ("argparse", "decimal", "random", "statistics", "pathlib", "logging", "unittest.case", "datetime")


def loader(*tensors: Tensor, seed: int, batch_size: int = 64, shuffle: bool = True) -> DataLoader[Any]:
    """A loader in this process whose order is fixed by ``seed`` and not by the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=shuffle, num_workers=0, generator=generator)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)


def digits(
    seed: int, *, image: bool = False, transposed: bool = False, raw: bool = False, batch_size: int = 64
) -> DataLoader[Any]:
    """1500 handwritten digits, as (64,) or as image (1, 8, 8), with their class.

    Pixels are in [-1, 1], or in [0, 16] as they were recorded if ``raw``.
    """
    x, y = _digits()[0][:1500], _digits()[1][:1500]
    if raw:
        x = (x + 1) * 8
    if transposed:
        x = x.view(-1, 8, 8).mT.reshape(-1, 64)
    return loader(x.view(-1, 1, 8, 8) if image else x, y, seed=seed, batch_size=batch_size)


def digits_val(seed: int, *, image: bool = False) -> DataLoader[Any]:
    """The 297 digits that training does not see, drawn by other writers."""
    x, y = _digits()[0][1500:], _digits()[1][1500:]
    return loader(x.view(-1, 1, 8, 8) if image else x, y, seed=seed, shuffle=False)


def noisy_digits(seed: int, *, share: float = 0.4) -> DataLoader[Any]:
    """Digits of which ``share`` carry a label drawn at random: the loss has a floor far above zero."""
    x, y = _digits()[0][:1500], _digits()[1][:1500].clone()
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=generator) < share
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return loader(x, y, seed=seed)


def digit_pairs(seed: int) -> DataLoader[Any]:
    """Digits as input and as target."""
    return loader(digit_images(), digit_images(), seed=seed)


def digit_images() -> Tensor:
    """All training digits as (1500, 64), in [-1, 1], in their fixed order."""
    return _digits()[0][:1500]


def noisy_images(seed: int) -> DataLoader[Any]:
    """Digits under heavy noise, with the clean image as target."""
    clean = digit_images().view(-1, 1, 8, 8)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return loader(clean + 0.7 * noise, clean, seed=seed)


def breast_cancer(seed: int, *, scaled: bool = True, batch_size: int = 64) -> DataLoader[Any]:
    """569 tumours, 30 features, two classes; unscaled the features reach from thousandths to thousands."""
    x, y = load_breast_cancer(return_X_y=True)
    inputs = _standardised(x) if scaled else torch.tensor(x).float()
    return loader(inputs, torch.tensor(y), seed=seed, batch_size=batch_size)


def wine(seed: int, *, batch_size: int = 178) -> DataLoader[Any]:
    """178 wines, 13 standardised features, three classes; all of them in one batch unless said."""
    x, y = load_wine(return_X_y=True)
    return loader(_standardised(x), torch.tensor(y), seed=seed, batch_size=batch_size)


def diabetes(seed: int, *, scaled: bool = True, batch_size: int = 64) -> DataLoader[Any]:
    """442 patients, 10 standardised features, progression (N, 1): standardised, or as it is, from 25 to 346."""
    x, y = load_diabetes(return_X_y=True)
    target = _standardised(y[:, None]) if scaled else torch.tensor(y[:, None]).float()
    return loader(_standardised(x), target, seed=seed, batch_size=batch_size)


def _standardised(values: Any) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    return ((tensor - tensor.mean(0)) / tensor.std(0)).float()


def _docstrings(source: str) -> Iterator[str]:
    module = importlib.import_module(source)
    yield inspect.getdoc(module) or ""
    for name, member in sorted(vars(module).items()):
        if (inspect.isclass(member) or inspect.isfunction(member)) and not name.startswith("__"):
            yield inspect.getdoc(member) or ""
            if inspect.isclass(member):
                for attribute in sorted(vars(member)):
                    yield inspect.getdoc(getattr(member, attribute, None)) or ""


@cache
def _text() -> Tensor:
    """The Zen of Python and docstrings of the standard library as character codes below 128."""
    # The module prints its text when it is imported.
    with contextlib.redirect_stdout(io.StringIO()):
        zen = importlib.import_module("this")
    parts = ["".join(zen.d.get(letter, letter) for letter in zen.s)]
    for source in SOURCES:
        parts += dict.fromkeys(_docstrings(source))
    return torch.tensor([ord(letter) for letter in "\n\n".join(parts)[:60_000] if ord(letter) < CHARACTERS])


def characters(seed: int, *, length: int = 32, batch_size: int = 16) -> DataLoader[Any]:
    """English text in windows of ``length`` characters, with the next characters as target."""
    return loader(*_windows(_text(), length), seed=seed, batch_size=batch_size)


def source_code(seed: int, *, length: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    """The source of a standard module in windows of ``length`` characters, with the next characters as target."""
    code = inspect.getsource(importlib.import_module("argparse"))[:60_000]
    text = torch.tensor([ord(letter) for letter in code if ord(letter) < CHARACTERS])
    return loader(*_windows(text, length), seed=seed, batch_size=batch_size)


def _windows(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    windows = (len(text) - 1) // length
    return text[: windows * length].view(windows, length), text[1 : windows * length + 1].view(windows, length)


@cache
def _words() -> tuple[Tensor, Tensor]:
    rows, labels = [], []
    for label, source in enumerate(SOURCES):
        for text in dict.fromkeys(_docstrings(source)):
            # crc32, because the built-in hash differs from process to process. Row 0 is the padding.
            words = [1 + zlib.crc32(w.encode()) % (WORDS - 1) for w in re.findall(r"[a-z]+", text.lower())[:24]]
            if len(words) >= 4:
                rows.append(words + [0] * (24 - len(words)))
                labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


def bags_of_words(seed: int, *, batch_size: int = 64) -> DataLoader[Any]:
    """Docstrings as up to 24 hashed words, zero-padded, with the module that they come from as class."""
    return loader(*_words(), seed=seed, batch_size=batch_size)
