"""Were the gains of norm layers drawn around 0, as weights are?"""

from __future__ import annotations

import numpy as np

from lightning_gradflow.detectors.known import first_values
from lightning_gradflow.detectors.progress import has_learnt
from lightning_gradflow.detectors.small_steps import reaches_of
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Floats, History

_SMALL = 0.1  # where 1 is usual: networks with gains of 0.1 learn about as well
_AROUND = 0.5  # of their size, for a mean: of eight gains that are drawn around 0 it is 0.3
_FEWEST = 2  # layers
_REACH = 0.1  # where 1 is usual: runs that can move gains farther get over it


def drawn_gains(history: History) -> tuple[str, ...]:
    """The norm layers whose gains are small and spread around 0, where those of all were so before the first step.

    What starts from gains that are small on purpose, at the ends of residual branches, starts from 0 or a constant.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["norm1", "fc", "norm2"])
        >>> gains = {"gain_rms": np.array([0.02, np.nan, 0.02]), "gain_mean": np.array([1e-3, np.nan, 2e-3])}
        >>> sizes = {"weight_norm": np.full(3, 0.2), "grad_norm": np.ones(3), "grad_rms": np.full(3, 0.1)}
        >>> history.append(Row(0, gains | sizes))
        >>> drawn_gains(history)
        ('norm1', 'norm2')
    """
    if not history.rows or history.rows[0].step != 0 or not history["gain_rms"].size:
        return ()
    first, mean = first_values(history, "gain_rms"), first_values(history, "gain_mean")
    norms = ~np.isnan(first)
    # they are measured behind the step: what starts from 0 is nothing but that step
    were_zero = _sizes(history) < first / 2
    if norms.sum() < _FEWEST or not (_around_zero(first, mean) & ~were_zero)[norms].all():
        return ()
    now = _around_zero(history["gain_rms"][-1], history["gain_mean"][-1])
    return tuple(name for i, name in enumerate(history.layers) if now[i])


def small_gains(history: History) -> list[Finding]:
    """The finding of the newest row, where most norm layers have such gains and keep them; else none.

    A norm gives what its gains are: the branches behind it pass on next to nothing, and are no part of the network,
    even if what is carried past them learns something. It is so where all planned steps together move the gains by
    less than a tenth of what is usual, in the median layer.
    """
    layers = drawn_gains(history)
    norms = int((~np.isnan(first_values(history, "gain_rms"))).sum()) if layers else 0
    if not layers or 2 * len(layers) <= norms:
        return []
    chosen = np.isin(history.layers, layers)
    reach = float(np.median((reaches_of(history) * _sizes(history))[chosen]))
    if not reach < _REACH:
        return []
    evidence = {"gain_rms": float(np.median(history["gain_rms"][-1][chosen])), "gain_reach": reach}
    return [
        Finding(
            kind=FindingKind.VANISHING_GRADIENT,
            severity=Severity.INFO if has_learnt(history) else Severity.WARNING,
            step=history.rows[-1].step,
            layers=layers,
            cause="weight_scale",
            evidence=evidence,
        )
    ]


def _sizes(history: History) -> Floats:
    """(L,) root mean square of the parameters of each layer, before the first step."""
    with np.errstate(all="ignore"):
        root_entries = first_values(history, "grad_norm") / first_values(history, "grad_rms")
        return np.asarray(first_values(history, "weight_norm") / root_entries)


def _around_zero(size: Floats, mean: Floats) -> np.ndarray:
    return np.asarray((size > 0) & (size < _SMALL) & (mean < _AROUND * size))
