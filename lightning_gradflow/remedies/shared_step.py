"""Layers that are called again and again without one that maps its own state, as residual steps that share weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_gradflow.probes.shards import whole
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.textbook import assign, is_writable
from lightning_gradflow.remedies.through_time import Looped
from lightning_gradflow.remedies.time_span import Treatment, measured, watched
from lightning_gradflow.remedies.training import Training

_ROUNDS = 8  # of halving and measuring: down to 1 / 256
_MAX_DECADES = 0.5  # a factor of three


def shrink(training: Training, modules: Mapping[str, nn.Module], before: dict[str, float]) -> Treatment | None:
    """Halves the weights of layers in a loop, none of which maps its state, until no gradient explodes in it.

    So do residual steps that share their weights: each of T steps has to add about 1 / T.

    Args:
        training: the run.
        modules: the layers by name.
        before: as in `Treatment`, of these layers as they are.

    Returns:
        None where no smaller weights would do; they are as they were then.
    """
    every = {name: m.weight for name, m in modules.items() if isinstance(m, Looped)}
    weights = {name: weight for name, weight in every.items() if is_writable(weight) and looks_fresh(whole(weight))}
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    after = before
    for _ in range(_ROUNDS if weights else 0):
        if not after.get("time_decades", 0.0) > _MAX_DECADES:
            break
        for weight in weights.values():
            assign(weight, 0.5 * weight.detach())
        with watched(training, list(weights)) as watch:
            after = measured(training, watch, list(weights))
    if after == before or not after.get("time_decades", math.inf) <= _MAX_DECADES:
        for name, weight in weights.items():
            assign(weight, old[name])
        return None
    changed = tuple(weights.values())
    forget(training.optimizers, changed)
    return Treatment(tuple(weights), changed, before, after)
