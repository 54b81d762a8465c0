"""Are the inputs of a size that initialisations are not made for, and which of their columns?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.known import (
    columns_of_layers,
    first_values,
    input_point,
    known_rows,
    newest_known,
)
from lightning_gradflow.history import Floats, History

_MAX_RMS = 10.0  # initialisations are made for 1; up to about 10 the first steps of the training make up for it
_SMALL_PART = 0.01  # of the largest column: what is below has no say beside it
_NORMALISED = 2.0  # rms of the first layer's output: so it has absorbed the size of its inputs
_OPEN = 0.5  # of a recurrence's gates at most that the inputs shut: so it has
_ROUNDING = 1e-6  # of the mean: a spread that single precision hardly holds
_MOST_NAMED = 5
_NOTHING = 1e-9  # output of weights that are not 0, for inputs that are large
_JUMP = 10.0  # times their own past: no augmentation does that
_LOOK_BACK = 6  # samples in which it may have set in


def offending_features(history: History) -> list[int]:
    """Which columns of the input are far larger than a network is initialised for, by index, the worst first.

    The inputs count as unscaled where their rms over all columns is above 10, and the first layer hands that on: a
    normalisation, or weights made for such inputs, bring it to the usual size. Then those columns are named that are
    above 10 themselves and above a hundredth of the largest one. A constant offset counts as size: to the weights
    behind it a column of 1000 +- 1 is one of 1000.

    Args:
        history: where to read; the newest sample that measured the inputs tells.

    Returns:
        Indexes of feature columns, or of channels in front of a convolution. Empty where all is well, and where the
        inputs were not measured (tokens, more than 1024 features).

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.3.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_features(3)
        >>> history.append(Row(step=0, values={"input_rms": np.array([0.9, 750.0, 1.1])}))
        >>> offending_features(history)
        [1]
    """
    sizes = _sizes(history)
    known = sizes[~np.isnan(sizes)]
    if not known.size or not np.sqrt(np.mean(np.square(known))) > _MAX_RMS:
        return []
    if _is_absorbed(history) and not inputs_jumped(history):
        return []
    largest = float(np.max(known, where=np.isfinite(known), initial=0.0))
    over = np.nan_to_num(sizes) > max(_MAX_RMS, _SMALL_PART * largest)
    return [int(i) for i in np.argsort(-np.nan_to_num(sizes), kind="stable") if over[i]]


def feature_evidence(history: History) -> dict[str, float]:
    """The numbers behind it: how many `features` offend, and `feature_<index>` -> rms for the worst five.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_features(2)
        >>> history.append(Row(step=0, values={"input_rms": np.array([1.0, 750.0])}))
        >>> feature_evidence(history)
        {'features': 1.0, 'feature_1': 750.0}
    """
    offending = offending_features(history)
    if not offending:
        return {}
    sizes = _sizes(history)
    worst = {f"feature_{i}": float(sizes[i]) for i in offending[:_MOST_NAMED]}
    return {"features": float(len(offending)), **worst}


def large_from_start(history: History) -> bool:
    """Whether the rms of the inputs over all columns was above 10 when they were first measured.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_features(2)
        >>> history.append(Row(step=0, values={"input_rms": np.array([1.0, 750.0])}))
        >>> large_from_start(history)
        True
    """
    rows = np.flatnonzero(known_rows(history, "input_rms"))
    return bool(rows.size and np.sqrt(np.nanmean(np.square(history["input_rms"][rows[0]]))) > _MAX_RMS)


def inputs_jumped(history: History) -> bool:
    """Whether the inputs have lately become ten times as large as they were before.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_features(1)
        >>> for step, size in enumerate([1.0, 1.0, 255.0]):
        ...     history.append(Row(step, {"input_rms": np.array([size])}))
        >>> inputs_jumped(history)
        True
    """
    return history.facts.of_now("inputs jumped", lambda: _inputs_jumped(history))


def _inputs_jumped(history: History) -> bool:
    table, known = history["input_rms"], known_rows(history, "input_rms")

    def find(start: int) -> Floats:
        sizes = np.full(len(table) - start, np.nan)
        rows = known[start:]
        sizes[rows] = np.sqrt(np.nanmean(np.square(table[start:][rows]), axis=1))
        return sizes

    if known.sum() < 2:
        return False
    sizes = history.facts.of_rows("input sizes", len(table), find)[known]
    backs = range(1, min(_LOOK_BACK, len(sizes) - 1) + 1)
    return any(bool(sizes[-back:].min() > _JUMP * float(np.median(sizes[:-back])) > 0) for back in backs)


def deviations(history: History, row: int) -> tuple[Floats, Floats]:
    """(F,) mean, without its sign, and (F,) deviation of each feature in a row; those that are not finite left out."""
    rms, deviation = history["input_rms"][row], history["input_deviation"][row]
    known = np.isfinite(rms) & np.isfinite(deviation)
    rms, deviation = rms[known], deviation[known]
    return np.sqrt(np.maximum(np.square(rms) - np.square(deviation), 0.0)), deviation


def contrast(history: History, row: int) -> float:
    """What tells inputs apart, over what they have in common, `sum s^2 / (1 + sum m^2)`; see `UnscaledInputs`.

    NaN where nothing tells them apart, or only rounding.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.add_features(2)
        >>> values = {"input_rms": np.array([5.0, 1.0]), "input_deviation": np.array([3.0, 0.0])}
        >>> history.append(Row(step=0, values=values))
        >>> contrast(history, 0)  # (9 + 0) / (1 + 16 + 1)
        0.5
    """
    mean, deviation = deviations(history, row)
    known = deviation > _ROUNDING * mean
    if not known.any():
        return math.nan
    return float(np.square(deviation[known]).sum() / (1.0 + np.square(mean).sum()))


def is_measured(history: History) -> bool:
    """Whether the size of the inputs is known."""
    return bool(_sizes(history).size)


def _sizes(history: History) -> Floats:
    """(F,) rms of each column in the newest row that has it; (0,) where none has."""
    newest = newest_known(history, "input_rms")
    return np.empty(0) if newest is None else newest


def _is_absorbed(history: History) -> bool:
    """Whether the output of the layer that takes them is of the usual size in the first sample.

    It is not where nothing comes out, or the same for all samples, as of a basis of bumps that all stand elsewhere.
    That of a recurrence is, whatever comes: there the share of its gates tells that the inputs shut.
    """
    at = input_point(history)
    if at is None:
        return False
    shut = float(first_values(history, "saturated_fraction")[at])
    if not math.isnan(shut):
        return shut <= _OPEN
    output, spread = (float(first_values(history, name)[at]) for name in ("output_rms", "output_spread"))
    if output == 0:
        layer = columns_of_layers(history)[at]
        # weights of exactly 0 say nothing of the inputs
        return layer < 0 or not first_values(history, "weight_norm")[layer] > 0
    return _NOTHING <= output <= _NORMALISED and not spread <= _ROUNDING  # NaN where it was not measured
