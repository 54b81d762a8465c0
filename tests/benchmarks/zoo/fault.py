"""How a sick training and its fault-free twin are put down as one case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from .case import Case, Data, seeded
from .data import digits
from .task import Task

Make = Callable[[], nn.Module]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
SMALL = partial(digits, batch_size=32)
IMAGES = partial(digits, batch_size=32, image=True)


def fault(
    name: str,
    family: str,
    sick: Make,
    twin: Make,
    *,
    kinds: str,
    causes: str,
    task: Callable[[Any], L.LightningModule] = Task,
    twin_task: Callable[[Any], L.LightningModule] | None = None,
    data: Data = SMALL,
    max_steps: int = 120,
    **kwargs: Any,
) -> Case:
    """A sick case from two constructors of networks; ``kinds`` and ``causes`` are words with spaces between them."""
    return Case(
        name,
        build=seeded(lambda: task(sick())),
        twin=seeded(lambda: (twin_task or task)(twin())),
        data=data,
        max_steps=max_steps,
        kinds=frozenset(kinds.split()),
        causes=frozenset(causes.split()),
        family=family,
        **kwargs,
    )
