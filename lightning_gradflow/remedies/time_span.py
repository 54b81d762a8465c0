"""What a gradient gains or loses on its way through time, as the layers stand, on a batch of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gradflow.remedies.through_time import TimeWatch
from lightning_gradflow.remedies.training import Training

_MEASURES = ("time_decades", "time_steps")


@dataclass(frozen=True)
class Treatment:
    """What was drawn anew, and what it did to the gradient through time.

    Args:
        layers: the layers, in order of execution.
        changed: their parameters.
        before: `time_decades`, the decades that a gradient gains (above 0) or loses (below 0) on its way from the last
            time step to the first, and `time_steps`, of the worst of the layers; empty where it can't be measured.
        after: the same with the new weights.
        note: what else was done.
    """

    layers: tuple[str, ...]
    changed: tuple[nn.Parameter, ...]
    before: dict[str, float]
    after: dict[str, float]
    note: str = ""


@contextmanager
def watched(training: Training, names: Sequence[str]) -> Iterator[TimeWatch | None]:
    """One forward pass with the present weights; the graph of it is good for as long as the context is open.

    Args:
        training: the run.
        names: of the layers that are watched.
    """
    if training.rehearse is None:
        yield None
    else:
        with training.rehearse() as (model, run):
            yield TimeWatch(model, names, run, training.seed)


def measured(training: Training, watch: TimeWatch | None, names: Sequence[str]) -> dict[str, float]:
    """The profile of the layer that loses or gains most, as a mean over the ranks; empty where none has one.

    Args:
        training: the run.
        watch: of the pass in which it is measured.
        names: of the layers.
    """
    if watch is None:
        return {}
    profiles = [profile for profile in map(watch.profile, names) if profile is not None]
    worst = max(profiles, key=lambda profile: abs(profile.span), default=None)
    own = [math.nan, math.nan] if worst is None else [worst.span, float(worst.steps)]
    device = next(training.model.parameters()).device
    shared = training.averaged(torch.tensor(own, device=device)).tolist()
    return {name: x for name, x in zip(_MEASURES, shared, strict=True) if math.isfinite(x)}
