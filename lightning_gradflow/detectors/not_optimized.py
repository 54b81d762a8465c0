"""Are there parameters that get a gradient and that no optimizer holds?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.standstill import is_judged, still_falls
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History

_SAMPLES = 2
_MOST = 0.5  # of the entries of a layer: a bias that is left out is no layer that is


@dataclass(frozen=True)
class NotOptimized:
    """Finds layers that get a gradient, and that no optimizer changes.

    An optimizer that was made before layers were replaced holds the old ones; layers in a list of Python's are in no
    `parameters()`; a part of the model may have been forgotten. A layer is found if in the last two samples more than
    half of its entries had a gradient, wanted one, and were held by no optimizer of the Trainer.

    Who trains a new head on a backbone that is not frozen leaves it out on purpose, and so does who steps by hand: it
    is an info as long as the run learns, and with several optimizers. It is a warning where there was time to learn,
    nothing was learnt and the loss does not fall. What changes from sample to sample does not count: something else
    than an optimizer of the Trainer trains it.

    References:
        Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["emb", "out"])
        >>> for step in range(2):
        ...     history.append(Row(step, {"not_optimized_fraction": np.array([1.0, 0.0])}))
        >>> [(f.severity.value, f.cause, f.layers) for f in NotOptimized().judge(history)]
        [('info', 'not_optimized', ('emb',))]
    """

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        shares = history["not_optimized_fraction"][-_SAMPLES:]
        left_out = np.flatnonzero((shares > _MOST).all(axis=0)) if len(shares) == _SAMPLES else np.empty(0, dtype=int)
        if not left_out.size:
            return []
        in_vain = is_judged(history, young=math.inf) and not has_learnt(history) and not still_falls(history)
        return [
            Finding(
                kind=FindingKind.NO_GRADIENT,
                severity=Severity.WARNING if in_vain else Severity.INFO,
                step=history.rows[-1].step,
                layers=tuple(history.layers[i] for i in left_out),
                cause="not_optimized",
                evidence={"layers": float(left_out.size)},
            )
        ]
