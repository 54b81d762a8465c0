"""Does nothing get learnt because weights share a mean, and units are all but alike?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.base import check_range
from lightning_gradflow.detectors.known import first_values, newest_values
from lightning_gradflow.detectors.large_weights import BACK, reach
from lightning_gradflow.detectors.made_by_size import starts_far_off
from lightning_gradflow.detectors.standstill import from_the_start, is_past_chance, learns_little
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

_FEWEST = 2  # layers
_COPIES = 0.1  # a finding of their own


@dataclass(frozen=True)
class AlikeUnits:
    r"""Finds a run that gets nowhere with units that were drawn all but alike, as positive weights make them.

    Weights with the mean :math:`\mu` and the deviation :math:`\sigma` give every unit the same sum of what comes in,
    :math:`\mu \sum_j x_j`, and only :math:`\sigma` for what tells them apart. Copies are a finding at once
    (`dead_units`, `symmetry`); this is one (`loss_plateau`, `symmetry`) where most layers, and two at least, were drawn
    so and still are, and

    - the first outputs were far from anything that is asked for (see `starts_far_off`), and all planned steps change
      these weights by less than four times their norm, or
    - the run had time to learn, and most of what its first outputs were off by is left (see `learns_little`).

    Normalisations take a common sum away, and many a network learns in spite of it: then nothing is told.

    Args:
        min_spread: how far units differ / their norm, in (0, 1.2). By default 0.8: units that are drawn independently
            have 1.2, those with weights between 0 and 1 0.6.

    Raises:
        ValueError: if the limit is out of its range.

    References:
        Goodfellow, Bengio and Courville 2016, Deep learning, section 8.4; LeCun et al. 1998, Efficient BackProp,
        section 4.3, on weights and inputs that have a mean.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> values = {"unit_spread": np.full(2, 0.6), "update_ratio": np.full(2, 1e-3)}
        >>> scalars = {"score_deviation": 9.0, "score_classes": 10.0, "planned_steps": 400.0}
        >>> history.append(Row(0, values, scalars))
        >>> history.append(Row(8, scalars=scalars, losses=np.full(9, 12.0)))
        >>> [(f.cause, f.layers) for f in AlikeUnits().judge(history)]
        [('symmetry', ('fc1', 'fc2'))]
    """

    min_spread: float = 0.8

    def __post_init__(self) -> None:
        check_range("min_spread", self.min_spread, 0, 1.2)

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        if not history.rows:
            return []
        first, spreads = first_values(history, "unit_spread"), newest_values(history, "unit_spread")
        with np.errstate(invalid="ignore"):
            alike = np.flatnonzero((spreads < self.min_spread) & (spreads > _COPIES))
        if len(alike) < _FEWEST or 2 * len(alike) <= np.isfinite(first).sum() or is_past_chance(history):
            return []
        is_spent = starts_far_off(history) and reach(history, alike) < BACK
        if not (is_spent or learns_little(history)):
            return []
        layers = tuple(history.layers[i] for i in alike)
        return [from_the_start(history, "symmetry", layers, {"unit_spread": float(np.median(spreads[alike]))})]
