"""What was read of parameter gradients, on the host: from a number for each parameter to one for each layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradflow.history import Bools, Floats, Ints
from lightning_gradflow.metrics import HISTOGRAM_BINS

NORMS = "norm", "weight", "update", "clipped"
SUMS = "sum", "nonzero", "nonfinite", "lost", "slope"
OF_SIZE = "norm", "nonfinite"
"""What there is where the size of the gradients alone was read."""
WIDTH = HISTOGRAM_BINS + 2
"""Numbers of a histogram: of its bins, of zeros, of entries that are not finite."""


@dataclass
class Group:
    """Parameters of one optimizer on one device, as the host knows them.

    Args:
        optimizer: which one.
        is_shared: whether some are spread over ranks, so that the numbers of all are summed over them.
        owners: (n,) the layers that they belong to.
        numel: (n,) their numbers of entries.
        is_frozen: (n,) whether they want no gradient.
    """

    optimizer: int
    is_shared: bool
    owners: list[str] = field(default_factory=list)
    numel: list[int] = field(default_factory=list)
    is_frozen: list[bool] = field(default_factory=list)


def key(i: int, group: Group, name: str) -> Hashable:
    """A name for the transfer, where each has one length: another layer may be trained in the next sample."""
    return "gradients", i, len(group.owners), name


class GradientColumns:
    """Each statistic as one column over all parameters; NaN is for what was not measured, infinity for the rest.

    Args:
        groups: the parameters that were read.
        without: owner and number of entries of each that has no gradient where one is due.
        host: what was fetched.
        unheld: the number of entries, by layer, that get a gradient although no optimizer holds them.
        only_size: whether the size of the gradients alone was read.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        without: Sequence[tuple[str, int]],
        host: Mapping[Hashable, Floats],
        *,
        unheld: Mapping[str, int] | None = None,
        only_size: bool = False,
    ) -> None:
        self._owners = [owner for group in groups for owner in group.owners]
        self._optimizer = np.repeat([group.optimizer for group in groups], [len(group.owners) for group in groups])
        self._numel = np.array([n for group in groups for n in group.numel], dtype=np.float64)
        self._is_frozen = np.array([frozen for group in groups for frozen in group.is_frozen], dtype=bool)
        self._without = without
        self._unheld = unheld or {}
        self._has = _joined(
            host[key(i, group, "has")] > 0 if group.is_shared else np.ones(len(group.owners), dtype=bool)
            for i, group in enumerate(groups)
        ).astype(bool)
        # of several ranks a name that was agreed on once is there in every sample, with zeros
        names = OF_SIZE if only_size else (*NORMS, *SUMS, "max")
        self._columns = {
            name: _joined(_column(host.get(key(i, group, name)), group, name) for i, group in enumerate(groups))
            for name in names
        }
        self._exponents = [
            None if only_size else host[key(i, group, "exponents")].reshape(-1, WIDTH) for i, group in enumerate(groups)
        ]

    @np.errstate(all="ignore")  # what is not finite is told by the numbers
    def layers(self, *, scaled: bool = False) -> tuple[list[str], dict[str, Floats]]:
        """The layers that were measured, and for each metric (L,) values; NaN where a layer has none.

        Args:
            scaled: whether a gradient scaler is at work, which skips a step for gradients that are not finite.
        """
        on_no_rank = np.flatnonzero(~self._has & ~self._is_frozen)
        without = [*self._without, *((self._owners[i], self._numel[i]) for i in on_no_rank)]
        layers = list(dict.fromkeys([*(owner for owner, _ in without), *self._owners, *self._unheld]))
        number = {layer: i for i, layer in enumerate(layers)}
        at = np.array([number[owner] for owner in self._owners], dtype=np.int64)[self._has]
        n = len(layers)

        def total(name: str) -> Floats:
            column = self._columns[name]
            if name in ("update", "lost") and scaled:
                column = np.where(self._is_skipped(), np.nan, column)
            values = column[self._has]
            return _summed(at, np.square(values) if name in NORMS else values, n)

        entries = _summed(at, self._numel[self._has], n)
        missing = _summed([number[owner] for owner, _ in without], [float(size) for _, size in without], n)
        norm = np.sqrt(total("norm"))
        found = {
            "grad_norm": norm,
            "grad_rms": norm / np.sqrt(entries),
            "grad_nonfinite_fraction": total("nonfinite") / entries,
        }
        if "max" in self._columns:  # and with it all the others
            weight, update = np.sqrt(total("weight")), np.sqrt(total("update"))
            largest = np.zeros(n)
            np.maximum.at(largest, at, self._columns["max"][self._has])
            ratio = np.where(weight > 0, update / weight, np.nan)
            found |= {
                "grad_max_abs": largest,
                "weight_norm": weight,
                "grad_mean_abs": total("sum") / entries,
                "grad_zero_fraction": 1.0 - total("nonzero") / entries,
                "update_norm": update,
                "update_ratio": np.where(np.isinf(update) & np.isinf(weight), np.inf, ratio),
                "unchanged_fraction": _share(total("lost"), total("slope")),
            }
        for values in found.values():
            values[entries == 0] = np.nan
        found["grad_missing_fraction"] = np.where(entries + missing > 0, missing / (entries + missing), np.nan)
        unheld = np.array([self._unheld.get(layer, 0) for layer in layers], dtype=np.float64)
        if self._unheld:
            found["not_optimized_fraction"] = unheld / (entries + missing + unheld)
        return layers, {name: values for name, values in found.items() if not np.isnan(values).all()}

    def _is_skipped(self) -> Bools:
        """Which parameters belong to an optimizer that does not step, as a gradient is not finite."""
        bad = np.unique(self._optimizer[self._columns["nonfinite"] > 0])
        return np.isin(self._optimizer, bad)

    def clip_factor(self, factor: float = 1.0) -> float:
        """Total norm after clipping / before, in [0, 1]; NaN where that is not known, or a gradient was not finite.

        Args:
            factor: what the gradients before were multiplied by, to be those of the mean loss.
        """
        if "clipped" not in self._columns:
            return math.nan
        before, after = _length(self._columns["norm"]) / factor, _length(self._columns["clipped"])
        if not (math.isfinite(before) and math.isfinite(after) and before > 0):
            return math.nan
        return min(1.0, after / before)

    def histograms(self, order: Sequence[str]) -> dict[str, Ints]:
        """Exponent histograms of the first and the last third of the layers in `order` (at least one layer each)."""
        tables = [table for table in self._exponents if table is not None]
        if not tables:
            return {}
        known = {owner for owner, has in zip(self._owners, self._has.tolist(), strict=True) if has}
        measured = [layer for layer in order if layer in known]
        third = max(1, len(measured) // 3)
        thirds = {"grad_hist_early": set(measured[:third]), "grad_hist_late": set(measured[-third:])}
        table = np.concatenate(tables)
        return {
            name: np.rint(table[[owner in members for owner in self._owners]].sum(axis=0)).astype(np.int64)
            for name, members in thirds.items()
        }


def _share(part: Floats, whole: Floats) -> Floats:
    """NaN where there is nothing that it could be a share of."""
    share: Floats = np.where((whole > 0) & np.isfinite(whole), np.minimum(part / whole, 1.0), np.nan)
    return share


def _column(column: Floats | None, group: Group, name: str) -> Floats:
    n = len(group.owners)
    if column is None:
        return np.full(n, np.nan)
    column = np.where(np.isfinite(column), column, np.inf)
    if group.is_shared and name == "max":  # a row for each rank
        column = column.reshape(-1, n).max(axis=0)
    elif group.is_shared and name in NORMS:
        column = np.sqrt(column)
    return column


def _joined(columns: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([*columns, np.empty(0)])


def _summed(at: npt.NDArray[np.int64] | Sequence[int], numbers: Floats | Sequence[float], n: int) -> Floats:
    found: Floats = np.bincount(np.asarray(at, dtype=np.int64), numbers, n).astype(np.float64, copy=False)
    return found


def _length(norms: Floats) -> float:
    return math.sqrt(float(np.square(norms).sum()))
