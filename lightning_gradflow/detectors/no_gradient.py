"""Are there parameters that the optimizer holds and that never get a gradient?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.cut_off import penalty_samples, zero_samples
from lightning_gradflow.detectors.known import (
    NEXT_TO_NOTHING,
    how_often_known,
    is_always,
    known_rows,
    layer_mask,
    newest_values,
    share_of_gradient,
)
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.underflow import recent_underflow
from lightning_gradflow.detectors.zero_weights import zero_weights
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, History

_MIN_SAMPLES = 2
_MIN_ZEROS = 3  # samples: what starts at zero, as a branch with a zero scale, lets gradients through from the second on
_FLAT = 0.9  # share of dead units, or saturated outputs, from which an activation makes the zeros
_PATIENCE = 50  # steps: a gradient may be exactly zero as long as a layer behind it is


@dataclass(frozen=True)
class NoGradient:
    """Finds layers that an optimizer holds and that got no gradient in any sample so far.

    Initialisation, a warning: the weights are zero, and so is all that could change them (see
    `zero_weights.zero_weights`).

    Detached, a warning: the layer ran as part of the autograd graph, nothing came back to it, and the first layer that
    the gradient does reach takes its input from the layers before it without their graph: `.detach()`, `.data`,
    `argmax`, a round trip through numpy. So is a trunk that gets exact zeros in each of three samples, while the layers
    behind it are trained: rounding and signs have no slope. Dead units, saturation, a recurrence at its bounds, weights
    of zero and gradients below the smallest number of their format make such zeros too, and are left to others.
    Features are extracted under `no_grad` on purpose; such a trunk is detached only if 50 steps have passed and nothing
    was learnt. So is all that the optimizer holds, where it ran in the graph and another layer is the first that is
    reached.

    The whole network is detached where each gradient is exactly zero in each of three samples, and where the weights
    get a gradient and no output gets any: that of a penalty on the weights (see `cut_off`).

    Unused, an info: everything else. Heads that the loss does not use, layers that never ran, teachers, branches beside
    the one that learns. So are layers whose gradient was exactly zero in every sample of 50 steps, while most others
    had one. It is a warning where most of the layers are left out, and nothing was learnt in 50 steps.

    It takes two samples. A layer that had a gradient once is never found: optimizers may take turns.

    References:
        Paszke et al. 2017, Automatic differentiation in PyTorch.

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["trunk", "head"])
        >>> history.add_points([Point("trunk", "trunk"), Point("head", "head")])
        >>> cut = {
        ...     "grad_missing_fraction": np.array([1.0, 0.0]),
        ...     "in_graph": np.array([1.0, 1.0]),
        ...     "input_detached": np.array([0.0, 1.0]),
        ...     "delta_norm": np.array([np.nan, 0.3]),
        ... }
        >>> for step in range(2):
        ...     history.append(Row(step, cut))
        >>> [(f.severity.value, f.cause, f.layers) for f in NoGradient().judge(history)]
        [('warning', 'detached', ('trunk',))]
    """

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one: the detached layers, else the unused ones."""
        if not history["grad_missing_fraction"].size:
            return []
        zero = zero_weights(history)
        if zero.layers:
            return [_finding(history, Severity.WARNING, "initialisation", np.array(zero.layers))]
        signs = {"zero_samples": zero_samples(history), "penalty_samples": penalty_samples(history)}
        if any(signs.values()):
            measured = np.array(history.layers)[how_often_known(history, "grad_norm") > 0]
            return [_finding(history, Severity.WARNING, "detached", measured, **{k: v for k, v in signs.items() if v})]
        held = how_often_known(history, "grad_missing_fraction")
        never = (held >= _MIN_SAMPLES) & is_always(history, "grad_missing_fraction", 1)
        zeros = _held_zeros(history)
        flat = zeros & _are_in(history, _before_what_is_reached(history)) if zeros.any() else zeros
        cut = never & _are_in(history, _before_the_cut(history)) if never.any() else never
        names = np.array(history.layers)
        detached, unused = names[cut | flat], names[never | _always_zero(history)]
        if detached.size:
            return [_finding(history, Severity.WARNING, "detached", detached)]
        # a network of which the larger part takes no part in the loss, and which does not learn, was not meant so
        most = 2 * never.sum() > (held > 0).sum() and _in_vain(history)
        severity = Severity.WARNING if most else Severity.INFO
        return [_finding(history, severity, "unused", unused)] if unused.size else []


def _before_the_cut(history: History) -> list[str]:
    """The layers that were in the graph, and behind which the first layer that is reached starts a new one."""
    if not history["delta_norm"].size:
        return []
    is_layer = layer_mask(history)
    ever = (how_often_known(history, "delta_norm") > 0) & is_layer
    cut, in_graph = newest_values(history, "input_detached"), newest_values(history, "in_graph")
    if not ever.any():
        return []
    first = int(np.argmax(ever))
    held = how_often_known(history, "grad_missing_fraction") > 0
    is_idle = bool(is_always(history, "grad_missing_fraction", 1)[held].all())  # nothing that it holds gets any
    in_vain = _in_vain(history)
    counts = ((in_graph == 1) & (cut[first] == 1 or (is_idle and in_vain))) | ((in_graph == 0) & in_vain)
    return [point.module for i, point in enumerate(history.points[:first]) if is_layer[i] and counts[i]]


def _in_vain(history: History) -> bool:
    """Whether there was time to learn, and nothing was learnt."""
    return history.rows[-1].step >= _PATIENCE and not has_learnt(history)


def _before_what_is_reached(history: History) -> list[str]:
    """The layers of a trunk that got exact zeros in each sample, while the layers behind it were trained."""
    deltas, known = history["delta_norm"], known_rows(history, "delta_norm")
    if known.sum() < _MIN_ZEROS or not np.isfinite(history.scalar("delta_floor")[-1]):
        return []
    first = int(np.argmax(_ever_alive(history)))
    if not (deltas[known, first] > 0).all() or _moved(history)[:-1].sum() < _MIN_ZEROS - 1:
        return []
    has_zeros = bool((history["zero_weights"][-1:] > 0).any())
    if has_zeros or recent_underflow(history) is not None:
        return []
    flat = np.fmax(history["dead_fraction"][-1], history["saturated_fraction"][-1])[: first + 1]
    if (np.nan_to_num(flat) >= _FLAT).any() or _keeps_to_itself(history, history.points[first].module):
        return []
    return [point.module for point in history.points[:first] if point.is_layer]


def _keeps_to_itself(history: History, layer: str) -> bool:
    """Whether hardly any gradient comes to the weights of a layer, either: what is at its output stays in it.

    So it is with a recurrence whose state is at its bounds; what is cut off before a layer leaves its weights alone.
    """
    return layer in history.layers and share_of_gradient(history, history.layers.index(layer)) < NEXT_TO_NOTHING


def _held_zeros(history: History) -> Bools:
    """(L,) layers with a gradient in each sample that was never anything but zero."""
    return np.asarray((how_often_known(history, "grad_norm") >= _MIN_ZEROS) & is_always(history, "grad_norm", 0))


def _ever_alive(history: History) -> Bools:
    """(P,) the points at which the delta was above zero in some row."""
    deltas = history["delta_norm"]
    return history.facts.so_far(
        "ever alive", len(deltas), lambda start: np.asarray((deltas[start:] > 0).any(axis=0)), np.logical_or
    )


def _moved(history: History) -> Bools:
    """(R,) the rows in which an update was above zero."""
    updates = history["update_norm"]
    return history.facts.of_rows("moved", len(updates), lambda start: np.asarray((updates[start:] > 0).any(axis=1)))


def _are_in(history: History, names: list[str]) -> Bools:
    """(L,) the layers that are among the names."""
    chosen = set(names)
    return np.array([name in chosen for name in history.layers], dtype=bool)


def _always_zero(history: History) -> Bools:
    known = how_often_known(history, "grad_norm") > 0
    zero = known & is_always(history, "grad_norm", 0)
    # where most have none something else is wrong, and other detectors tell
    is_old = history.rows[-1].step - history.rows[0].step >= _PATIENCE
    is_odd = bool(2 * zero.sum() < known.sum())
    return np.asarray(zero & (is_old and is_odd))


def _finding(history: History, severity: Severity, cause: str, layers: npt.NDArray[np.str_], **seen: float) -> Finding:
    return Finding(
        kind=FindingKind.NO_GRADIENT,
        severity=severity,
        step=history.rows[-1].step,
        layers=tuple(layers.tolist()),
        cause=cause,
        evidence={"layers": float(layers.size)} | {name: float(value) for name, value in seen.items()},
    )
