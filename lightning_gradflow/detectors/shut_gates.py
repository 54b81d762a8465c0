"""Which activations are gates, and are all of them shut for good?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_gradflow.detectors.known import first_values, layer_mask
from lightning_gradflow.detectors.small_steps import MIN_REACH, reaches_of
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History

_GATE = 0.5  # of the places where it was seen (several ranks): they all run the same code
_SHUT = 0.01  # of a signal, and of a gradient, at most comes through


def gate_mask(history: History) -> Bools:
    """(P,) the activations that gate something."""
    gates = history["gate_fraction"]
    return history.facts.so_far(
        "gates", len(gates), lambda start: np.asarray((gates[start:] > _GATE).any(axis=0)), np.logical_or
    )


def shut_gates(history: History, samples: int, gains: Floats) -> list[Finding]:
    """The finding of the newest row, where every gate was shut from the start and no step can open one; else none.

    What a gate is at by design it comes to in training, and leaves again. Here it can't: its output is below 0.01, at
    most 1 % of the gradient comes back through it, in the first samples and the newest ones, and all planned steps
    together move the layer before it by less than 1 %, while they move others (see `UpdateRatio`). What stands behind
    such gates is no part of the network, even if what is carried past them learns something.

    Args:
        history: where to read.
        samples: how many of the first and of the newest ones, in [1, inf).
        gains: (R, P) factor on the delta norm on the way back through each point.
    """
    gates = gate_mask(history) & ~np.isnan(first_values(history, "saturated_fraction"))
    places = np.flatnonzero(gates)
    if not places.size or len(history) < samples:
        return []
    sizes, shares = history["output_rms"][:, places], history["saturated_fraction"][:, places]
    known = np.flatnonzero(~np.isnan(shares).all(axis=1))
    if len(known) < samples or known[-1] != len(history) - 1:
        return []
    chosen = np.concatenate([known[:samples], known[-samples:]])
    is_shut = (sizes[chosen] <= _SHUT) & (gains[chosen][:, places] <= _SHUT)
    layers = _layers_before(history, places)
    if not is_shut.all() or not layers:
        return []
    reaches, at_gates = reaches_of(history), np.isin(history.layers, layers)
    reach = float(reaches[at_gates].max(initial=0.0))
    others = reaches[~at_gates]
    if not (at_gates.any() and reach < MIN_REACH and (others >= MIN_REACH).any()):
        return []
    evidence = {
        "saturated_fraction": float(np.nanmin(shares[-1])),
        "activation_gain": float(np.nanmax(gains[-1, places])),
        "gate_opening": float(np.nanmax(sizes[-1])),
        "reach": reach,
    }
    return [
        Finding(
            kind=FindingKind.SATURATED_ACTIVATION,
            severity=Severity.WARNING,
            step=history.rows[-1].step,
            layers=layers,
            cause="weight_scale",
            evidence=evidence,
        )
    ]


def _layers_before(history: History, places: npt.NDArray[np.intp]) -> tuple[str, ...]:
    """The layers right before these points; nothing where one has none."""
    layers = np.flatnonzero(layer_mask(history))
    before = [layers[layers < i] for i in places]
    if not all(found.size for found in before):
        return ()
    return tuple(dict.fromkeys(history.points[found[-1]].module for found in before))
