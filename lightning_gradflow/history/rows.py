"""What is measured at one sampled step, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_CALLS = 64
"""Calls of a point that a row keeps: of a longer loop as many, evenly spread, the first and the last among them."""


@dataclass(frozen=True)
class Point:
    """A place of the network where the signal is measured.

    Args:
        name: unique among the points.
        module: the module to name to people, as in `named_modules()`: the layer, the activation module, or for a
            functional activation the layer that it follows.
        op: the activation, such as `sigmoid`; empty for the output of a layer.
    """

    name: str
    module: str
    op: str = ""

    def __hash__(self) -> int:
        return hash(self.name)  # that of three strings takes four times as long, thousands of times a sample

    @property
    def is_layer(self) -> bool:
        """Whether it is the output of a module that owns parameters."""
        return not self.op


@dataclass(frozen=True)
class Row:
    """One sampled optimizer step, frozen. NaN = not measured here; inf = measured and not finite.

    Args:
        step: the optimizer step, from 0.
        values: metric name -> (L,), (P,) or (F,) float64, by the identity of the layer, point or feature (see `Axis`).
        scalars: such as `loss`, `lr`, `grad_norm_total`, `epoch`.
        histograms: histogram name -> (HISTOGRAM_BINS + 2,) counts.
        losses: training loss of each step since the row before, oldest first; (n,) with n >= 0.
        calls: name of a point that ran more than once in a forward pass -> (K,) delta norm of each call, in order of
            execution, K at most 64.
        gradients_only: whether nothing but the size of the parameter gradients was read.
    """

    step: int
    values: Mapping[str, Floats] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Ints] = field(default_factory=dict)
    losses: Floats = field(default_factory=lambda: np.empty(0))
    calls: Mapping[str, Floats] = field(default_factory=dict)
    gradients_only: bool = False
