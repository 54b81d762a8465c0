"""What is behind a loss that stands still?"""

from __future__ import annotations

import math

import numpy as np

from lightning_gradflow.detectors.dead_units import mostly_dead
from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.detectors.progress import is_blind
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.saturation import SaturatedActivation
from lightning_gradflow.detectors.vanishing import is_vanishing
from lightning_gradflow.findings import FindingKind
from lightning_gradflow.history import Bools, History
from lightning_gradflow.metrics import LOSS_LINE, PAIRING

_BLOWN_UP = 1.5  # times the first loss: what random weights cost, no step that is right makes worse by half
_ROUNDED = 6e-8  # half of float32's precision: of smaller updates the weights take next to nothing
_BLIND_DECAY = -2.0  # decades: where the output ignores the input, a loss of so much is what blocks it
_SAME_INPUT = 1e-4  # of its size: such a spread of the first layer's output is rounding
_GAIN = 0.01  # of the loss: what counts as progress in `LossPlateau`
_UNPAIRED = 2.5  # z score: targets that were shuffled have more once in a hundred measurements
_BY_HEART = 0.15  # of the loss: more than that is gained by heart only while the loss falls faster
AGREE = 3.0  # z score of a direction that the batches have in common


def cause_of(history: History) -> str:
    """What is behind the standstill, by what else is wrong at the same time."""
    if _has_blown_up(history):
        return "learning_rate_too_large"
    if is_vanishing(history):
        return "vanishing_gradient"
    if mostly_dead(history):
        return "dead_units"
    if any(finding.severity.is_alarm for finding in SaturatedActivation().judge(history)):
        return "saturation"
    if _is_rounded_away(history):
        return "learning_rate_too_small"
    if is_blind(history):
        return _cause_of_blindness(history)
    cause = _cause_by_line(history)
    # a default LSTM or GRU begins so and heals: asked only once nothing else is left. Who cannot look back can't tell
    # either whether there is anything to be found there
    is_left = cause == "no_signal_in_data" or (cause == "unknown" and bool(line_of(history)))
    return "vanishing_gradient" if is_left and _dies_through_time(history) else cause


def _dies_through_time(history: History) -> bool:
    return any(finding.kind is FindingKind.VANISHING_GRADIENT for finding in RecurrentGradient().judge(history))


def _has_blown_up(history: History) -> bool:
    """Whether the steps have once driven the loss far up, and it has not come back below its start since."""
    losses = history.losses[np.isfinite(history.losses)]
    recent = losses[-min(200, max(1, len(losses) // 3)) :]
    first, now, peak = float(losses[0]), float(np.median(recent)), float(losses.max())
    noise = float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0
    if first <= 0 or now < 0.9 * first:  # a loss of either sign has no scale
        return False
    stands_above = now > _BLOWN_UP * first + 4 * noise
    # a peak that the noise of small batches makes is not by itself
    was_above = peak > _BLOWN_UP * max(first, float(recent.max())) and peak > now + 10 * noise
    return stands_above or was_above


def _is_rounded_away(history: History) -> bool:
    ratios = history["update_ratio"]
    known = ratios[-1][np.isfinite(ratios[-1])] if ratios.size else np.empty(0)
    return known.size > 0 and bool(known.max() < _ROUNDED)


def _cause_of_blindness(history: History) -> str:
    """Why the output is the same for every sample: the inputs are, or the network lets nothing through."""
    spread = history["output_spread"][-1]
    known = spread[np.isfinite(spread)]
    if known.size and known[0] < _SAME_INPUT:
        return "no_signal_in_data"
    profile = depth_profile(history, len(history) - 1)
    is_lost = profile is not None and profile.span <= _BLIND_DECAY
    return "vanishing_gradient" if is_lost else "unknown"


def line_of(history: History) -> dict[str, float]:
    """The numbers of the loss line, of the row that was measured last; empty without one."""
    measured = np.flatnonzero(_has_line(history))
    scalars = history.rows[measured[-1]].scalars if measured.size else {}
    return {name: scalars[name] for name in (*LOSS_LINE, *PAIRING) if name in scalars}


def _has_line(history: History) -> Bools:
    """(R,) the rows in which the loss line was measured."""
    rows = history.rows
    return history.facts.of_rows(
        "has line", len(rows), lambda start: np.array(["loss_line" in row.scalars for row in rows[start:]], dtype=bool)
    )


def _cause_by_line(history: History) -> str:
    """What the loss along the update tells (see `loss_line`)."""
    line = line_of(history)
    if not {"line_gain_far", "line_gain_1x"} <= set(line):
        return "unknown"
    if is_unpaired(history):
        return "no_signal_in_data"
    agreement = line.get("gradient_agreement", math.inf)
    # a recurrence at its start has little to gain in any one step; where the batches agree, less is enough
    enough = _GAIN / 10 if math.isfinite(agreement) and agreement >= AGREE else _GAIN
    if line["line_gain_far"] >= enough and line["line_gain_1x"] > -_GAIN:
        return "learning_rate_too_small"
    if line["line_gain_1x"] <= -_GAIN and line["line_gain_tenth"] > line["line_gain_1x"]:
        return "learning_rate_too_large"
    if line.get("pairing_agreement", 0.0) >= AGREE:
        return "unknown"  # the targets do follow from the inputs
    # a gain on a few samples may be chance; it counts where the gradients do not speak against it
    learns = agreement >= AGREE or (agreement >= AGREE / 2 and line["line_gain_other"] >= _GAIN)
    return "unknown" if learns else "no_signal_in_data"


def is_unpaired(history: History) -> bool:
    """Whether the last measurement found no relation between inputs and targets, and no direction to go."""
    line = line_of(history)
    # longer steps are not asked for: those of an optimizer with a memory help on batches that it has seen
    if not {"gradient_agreement", "line_shuffled", "pairing_agreement"} <= set(line):
        return False
    is_paired = line["line_shuffled"] >= _BY_HEART or line["pairing_agreement"] >= _UNPAIRED
    return not is_paired and line["gradient_agreement"] < AGREE
