"""Does nothing get learnt because of weights that no usual initialisation gives?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import first_values, layer_mask
from lightning_gradflow.detectors.standstill import stands_still, starts_with_embedding, steps_at_full_rate
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_OVERWRITTEN = 0.3  # of the weights, by the first step
_LEARNT = 0.2  # of the starting loss: what is behind the sick layers learns a little by itself
_HANDED_ON = 3.0  # rms of what differs between samples: a normalisation behind it makes it 1

Seen = tuple[tuple[str, ...], dict[str, float]]


@dataclass(frozen=True)
class UnusualStart:
    """Finds a run that stands still, with weights that were far from any usual initialisation in its first sample.

    Such weights alone are no finding, for many a network learns with them. Together with a run that learns nothing
    (`stands_still`) they are the reason. It is enough if one of these was so:

    - the recurrent weights of a layer had a spectral radius above `max_radius`: its state is chaos, which its bounds
      hide (`recurrence`);
    - an embedding gave outputs of more than `max_embedding`, and what comes behind handed them on (`weight_scale`).

    The size of the outputs, the largest singular values and the gain of the gradient do not count: those of trained
    weights, from which a run may go on where there is little left to learn, are as large.

    Args:
        max_radius: in (0, inf). The default of 4 is far beyond what is drawn: uniform weights have 0.6 and orthogonal
            ones 1; from about 1.5 on the state is chaotic.
        max_embedding: root mean square, in (0, inf). By default 10: `nn.Embedding` is drawn with 1, and most others are
            smaller.

    Raises:
        ValueError: if a limit is out of its range.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; Sompolinsky
        et al. 1988, Chaos in random neural networks.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn"])
        >>> history.append(Row(0, {"recurrent_radius": np.array([8.0])}))
        >>> history.append(Row(60, losses=np.full(60, 2.3)))
        >>> [(f.cause, f.layers) for f in UnusualStart().judge(history)]
        [('recurrence', ('rnn',))]
    """

    max_radius: float = 4.0
    max_embedding: float = 10.0

    def __post_init__(self) -> None:
        check_range("max_radius", self.max_radius, 0, float("inf"))
        check_range("max_embedding", self.max_embedding, 0, float("inf"))

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not stands_still(history, min_learnt=_LEARNT):
            return []
        seen = {
            "recurrence": _chaotic(history, self.max_radius),
            "weight_scale": _embedded(history, self.max_embedding),
        }
        return [_finding(history, cause, *it) for cause, it in seen.items() if it[0]][:1]


def _finding(history: History, cause: str, layers: tuple[str, ...], evidence: dict[str, float]) -> Finding:
    return Finding(
        kind=FindingKind.LOSS_PLATEAU,
        severity=Severity.WARNING,
        step=history.rows[-1].step,
        layers=layers,
        cause=cause,
        evidence={
            "steps": float(steps_at_full_rate(history)),
            "loss": float(history.losses[np.isfinite(history.losses)][-1]),
            **evidence,
        },
    )


def _chaotic(history: History, max_radius: float) -> Seen:
    """Recurrences with weights far too large for their state to keep anything, the worst first."""
    # a first step that overwrites the weights has been made when they are measured
    kept = ~(first_values(history, "update_ratio") > _OVERWRITTEN)
    radii = np.where(kept, np.nan_to_num(first_values(history, "recurrent_radius"), nan=0.0), 0.0)
    worst = [int(i) for i in np.argsort(-radii, kind="stable") if radii[i] > max_radius]
    return tuple(history.layers[i] for i in worst), {"recurrent_radius": float(radii[worst[0]])} if worst else {}


def _embedded(history: History, max_embedding: float) -> Seen:
    """An embedding, first of all layers, whose outputs are far too large for those behind it."""
    if not starts_with_embedding(history):
        return (), {}
    layers = np.flatnonzero(layer_mask(history))
    sizes, spreads = (first_values(history, name)[layers] for name in ("output_rms", "output_spread"))
    differs = (sizes * spreads)[1:]
    differs = differs[np.isfinite(differs)]
    if not (sizes[0] > max_embedding and differs.size and differs[0] > _HANDED_ON):
        return (), {}
    return (history.points[layers[0]].module,), {"output_rms": float(sizes[0])}
