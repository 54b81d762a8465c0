"""Does nothing of the loss come back to the whole of a network, although there is a gradient?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import how_often_known, is_always, known_rows, layer_mask, newest_values
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import is_judged
from lightning_gradflow.history import History

_SAMPLES = 3
_FLAT = 0.9  # share of dead units, or saturated outputs, from which an activation makes the zeros
_WIDE = -100.0  # log2 of the smallest number of a format: gradients do not fall below that of float32, 2**-149
_FLAT_SIDES = "dead_fraction", "silent_fraction", "saturated_fraction"


def zero_samples(history: History) -> int:
    """In how many samples all gradients were exactly zero, if in each; 0 if not so, or in fewer than three.

    `round`, `sign` and comparisons between network and loss make such zeros. A loss of zero has nothing to give;
    weights of zero, flat activations and formats that end above the gradient are told by others.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc"])
        >>> for step in range(3):
        ...     history.append(Row(step, {"grad_norm": np.zeros(1)}, {"delta_floor": -149.0}, losses=np.array([2.3])))
        >>> zero_samples(history)
        3
    """
    count = int(how_often_known(history, "grad_norm").max(initial=0))
    if count < _SAMPLES or not is_always(history, "grad_norm", 0).all():
        return 0
    losses = history.losses[-_SAMPLES:]
    if not (np.isfinite(losses) & (losses != 0)).all() or not history.scalar("delta_floor")[-1] < _WIDE:
        return 0
    if (history["zero_weights"][-1:] > 0).any():
        return 0
    is_flat = any((history[metric][-1:] >= _FLAT).any() for metric in _FLAT_SIDES)
    return 0 if is_flat else count


def penalty_samples(history: History) -> int:
    """In how many samples the weights had a gradient and no output had any, if in each, and nothing was learnt; or 0.

    The outputs are detached before the loss, and what is left is a penalty on the weights.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc"])
        >>> history.add_points([Point("fc", "fc")])
        >>> values = {"grad_norm": np.ones(1), "in_graph": np.ones(1)}
        >>> for step in (0, 30, 60):
        ...     history.append(Row(step, values, {"backward_passes": 1.0}, losses=np.full(30, 2.3)))
        >>> penalty_samples(history)
        3
    """
    known = known_rows(history, "grad_norm")
    if known.sum() < _SAMPLES or known_rows(history, "delta_norm").any():
        return 0
    # a backward pass that nobody saw, as that of a loss.backward() in training_step, tells nothing of the outputs
    if not (history.scalar("backward_passes")[known] > 0).all():
        return 0
    in_graph = newest_values(history, "in_graph")[layer_mask(history)]
    in_graph = in_graph[~np.isnan(in_graph)]
    if not in_graph.size or not (in_graph == 1).all():
        return 0
    return int(known.sum()) if is_judged(history, young=math.inf) and not has_learnt(history) else 0
