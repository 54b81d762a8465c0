"""The inputs of a network that takes several, in several layers, and which of them is looked at."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.inputs import InputScale
from lightning_gradflow.probes.transfer import Transfer

_LARGE = 10.0  # rms: initialisations are made for 1
_FIRST = ""  # the name of the input of the first layer


class SeveralInputs:
    """Measures what goes into the layers behind the first one, where that is an input too: a table beside an image.

    One input is looked at in a run: the first, unless in the first sample another one is large, and it is not; beside
    a large one the others have no say. Behind a frozen layer nothing is measured, for what that makes looks like an
    input.
    """

    def __init__(self) -> None:
        self.chosen: str | None = None
        """The layer whose input is looked at, an empty name for the first one; None before the first sample."""
        self.drop()

    def drop(self) -> None:
        """Forgets the present sample."""
        self._scales: dict[str, InputScale] = {}
        self.start_batch()

    def start_batch(self) -> None:
        """A batch of the sampled step starts."""
        self._before = {name: copy.copy(scale) for name, scale in self._scales.items()}
        self._taken: set[str] = set()
        self._is_behind_frozen = False

    def forget_batch(self) -> None:
        """The batch has no part in the step."""
        self._scales = self._before

    def take(self, name: str | None, module: nn.Module, arguments: tuple[Any, ...], *, is_other: bool) -> None:
        """Adds what goes into a layer, at its first call in a batch, if it is an input.

        Args:
            name: of the layer; None where it is none of the model's.
            module: the layer.
            arguments: the positional arguments of the call.
            is_other: whether it may be an input, and not that of the first layer.
        """
        if self._is_behind_frozen or name is None or name in self._taken:
            return
        self._is_behind_frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if self._is_behind_frozen or not is_other or not torch.is_grad_enabled():
            return
        scale = self._scales.get(name, InputScale())
        if scale.take(module, arguments, is_first=False):
            self._scales[name] = scale
            self._taken.add(name)

    def pack(self, transfer: Transfer) -> None:
        """Hands what was seen to the transfer."""
        for name, scale in self._scales.items():
            scale.pack(transfer, name)

    def unpack(self, host: Mapping[Hashable, Floats], first: str | None) -> tuple[Floats, Floats, str | None]:
        """(F,) root mean square and (F,) deviation of the input that is looked at, out of what was fetched; its layer.

        Args:
            host: what was fetched.
            first: the first layer that takes an input.
        """
        found = {name: InputScale.unpack(host, name) for name in InputScale.names(host)}
        found = {name: it for name, it in found.items() if it[0].size}
        if found and self.chosen is None:
            self.chosen = largest({name: rms for name, (rms, _) in found.items()})
        rms, deviation = found.get(self.chosen or _FIRST, (np.empty(0), np.empty(0)))
        return rms, deviation, self.chosen or first


def largest(sizes: Mapping[str, Floats]) -> str:
    """Which of several inputs is the one to look at.

    Args:
        sizes: layer -> (F,) root mean square of each feature of its input, the first layer first.

    Example:
        >>> largest({"image": np.array([0.3]), "table": np.array([1.0, 2e4])})
        'table'
        >>> largest({"image": np.array([0.3]), "table": np.array([1.0, 2.0])})
        'image'
    """
    overall = {name: float(np.sqrt(np.nanmean(np.square(size)))) for name, size in sizes.items()}
    first = next(iter(overall))
    most = max(overall, key=lambda name: overall[name])
    return most if overall[most] > _LARGE and not overall[first] > _LARGE else first
