"""How large the steps are beside the weights, layer by layer; see `UpdateRatio`."""

from __future__ import annotations

import numpy as np

from lightning_gradflow.detectors.known import first_values, newest_values
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import Bools, Floats, History


def ratios_of(history: History) -> Floats:
    """(R, L) update ratios, NaN for layers that were zero when they were first seen."""
    ratios, without = history["update_ratio"], _without_scale(history)
    return history.facts.of_now("ratios", lambda: np.where(without, np.nan, ratios)) if without.any() else ratios


def _without_scale(history: History) -> Bools:
    """(L,) layers that were zero when they were first seen."""
    return np.asarray(first_values(history, "weight_norm") == 0)


def medians_of(history: History, among: Bools | None = None) -> Floats:
    """(R,) the median over the layers, or over those where `among` (L,) holds; NaN where none was measured."""
    ratios = ratios_of(history)
    chosen = np.ones(ratios.shape[1], dtype=bool) if among is None else among
    key = ("median ratios", _without_scale(history).tobytes(), chosen.tobytes())
    return history.facts.of_rows(
        key,
        len(ratios),
        lambda start: np.array(
            [np.median(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in ratios[start:, chosen]]
        ),
    )


def largest_of(history: History) -> Floats:
    """(R,) the largest one of the layers; NaN where none was measured."""
    ratios, key = ratios_of(history), ("largest ratios", _without_scale(history).tobytes())
    return history.facts.of_rows(
        key, len(ratios), lambda start: np.asarray(np.fmax.reduce(ratios[start:], axis=1, initial=np.nan))
    )


def entries_of(history: History) -> Floats:
    """(L,) how many numbers each layer's parameters have; NaN where its gradient was never above 0."""
    with np.errstate(all="ignore"):
        first, newest = (
            np.square(values(history, "grad_norm") / values(history, "grad_rms"))
            for values in (first_values, newest_values)
        )
    return np.where(np.isfinite(first), first, newest)  # a gradient may be zero at first


def finding_of(history: History, cause: str, badness: Floats, evidence: dict[str, float]) -> Finding:
    """A warning that names the measured layers, the one with the lowest `badness` (L,) first."""
    order = [int(i) for i in np.argsort(badness, kind="stable") if not np.isnan(badness[i])]
    return Finding(
        kind=FindingKind.UPDATE_RATIO,
        severity=Severity.WARNING,
        step=history.rows[-1].step,
        layers=tuple(history.layers[i] for i in order),
        cause=cause,
        evidence=evidence,
    )
