import math

import numpy as np
import pytest

from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.detectors.underflow import underflow_of
from lightning_gradflow.detectors.vanishing import VanishingGradient, is_vanishing
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import is_due, rows_of, stack

nan, inf = math.nan, math.inf
HALF, SINGLE = -24, -149  # exponents of the smallest numbers of fp16 and fp32


def values_of(headroom, exponent=HALF, entries=1024):
    """The metrics of deltas with this headroom in bits, in a format, or in one for each point."""
    headroom = np.array(headroom, dtype=float)
    return {"delta_norm": np.exp2(headroom + exponent) * math.sqrt(entries), "delta_headroom": headroom}


def history_of(headroom, exponent=HALF, op="relu", steps=(0, 1), points=None, losses=2.3, **others):
    """A run with these bits at each step; an odd number of points, layers and activations by turns."""
    history = History()
    points = points or stack((len(headroom) + 1) // 2, op)
    history.add_points(points)
    previous = -1
    for step in steps:
        more = {name: np.array(values, dtype=float) for name, values in others.items()}
        known = np.broadcast_to(losses, max(steps) + 1)[previous + 1 : step + 1]
        history.append(Row(step, {**values_of(headroom, exponent), **more}, losses=known))
        previous = step
    return history


def lost(history):
    """The points at which the format is the reason, by name."""
    found = underflow_of(history, -1)
    if found is None:
        return []
    return [point.name for point, is_lost in zip(found.profile.points, found.where, strict=True) if is_lost]


# bits of fc0 act0 fc1 act1 fc2 -> the points that the format took
PLACES = {
    "healthy in fp16": ([12, 13, 14, 15, 16], []),
    "on the floor with all entries": ([0, 0, 0, 0, 0], []),
    "just above the limit": ([-2.9, 0, 1, 2, 3], []),
    "just below the limit": ([-3.1, 0, 1, 2, 3], ["fc0"]),
    "runs out": ([-inf, -inf, -2, 0, 2], ["fc0", "act0"]),
    "runs out from the edge": ([-inf, -inf, 0.9, 2, 4], ["fc0", "act0"]),
    "one step of pooling": ([-inf, -inf, -inf, -inf, 7.9], ["fc0", "act0", "fc1", "act1"]),
    "zeros of a structure": ([-inf, -inf, -inf, -inf, 8.1], []),
    "no pooling in an activation": ([-inf, 1.1, 3, 4, 5], []),
    "an activation at the edge": ([-inf, 0.9, 3, 4, 5], ["fc0"]),
    "a branch of zeros": ([5, 5, -inf, 5, 5], []),
    "a branch at the floor": ([0, 0, -inf, 0, 0], ["fc1"]),
    "all of it at the floor": ([-inf, -inf, -inf, -5, -4], ["fc0", "act0", "fc1", "act1", "fc2"]),
    "zero from the loss on": ([-inf] * 5, []),
    "not measured": ([nan] * 5, []),
    "a point that never ran": ([-inf, nan, -2, 0, 2], ["fc0"]),
    "an overflowed point": ([-inf, -2, inf, 0, 2], ["fc0"]),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_table_of_places(case):
    headroom, expected = PLACES[case]
    assert lost(history_of(headroom)) == expected


@pytest.mark.parametrize("case", PLACES)
def test_points_that_never_run_change_nothing(case):
    headroom, expected = PLACES[case]
    history = history_of(headroom)
    history.add_points([*stack(3, "relu"), *stack(9, "relu")[-4:]])
    assert lost(history) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.89, ["fc0"]), (0.91, [])])
def test_dead_units_are_the_reason_themselves(share, expected):
    assert lost(history_of([-inf, 0, 2, 3, 4], dead_fraction=[nan, share, nan, 0.1, nan])) == expected


def test_zeros_in_float32_are_none_of_the_format():
    assert lost(history_of([-inf, -inf, 120, 121, 122], SINGLE)) == []


@pytest.mark.parametrize(("bits", "expected"), [(0.9, ["fc0", "act0"]), (8.1, [])])
def test_a_point_that_autocast_keeps_in_float32_counts_in_bits_of_fp16(bits, expected):
    formats = np.array([HALF, HALF, SINGLE, HALF, HALF])
    assert lost(history_of([-inf, -inf, bits + 125, 6, 7], formats)) == expected


def test_the_loss_scale_does_not_hide_the_format():
    history = History()
    history.add_points(stack(3, "relu"))
    values = values_of([-inf, -inf, 125.5, 6, 7], np.array([HALF, HALF, SINGLE, HALF, HALF]))
    values["delta_norm"] = values["delta_norm"] / 65536
    history.append(Row(0, values, {"loss_scale": 65536.0, "step_skipped": 0.0}))
    assert lost(history) == ["fc0", "act0"]


def test_a_skipped_step_tells_nothing():
    history = History()
    history.add_points(stack(3, "relu"))
    history.append(Row(0, values_of([-inf, -inf, -2, 0, 2]), {"loss_scale": 1.0, "step_skipped": 1.0}))
    assert underflow_of(history, 0) is None


def severities(headroom, steps, losses=2.3, **how):
    """The severity at each step of a run."""
    known = np.broadcast_to(losses, max(steps) + 1)
    found = []
    for count in range(1, len(steps) + 1):
        history = history_of(headroom, steps=steps[:count], losses=known[: steps[count - 1] + 1], **how)
        found.append(next((f"{f.severity} {f.cause}" for f in VanishingGradient().judge(history)), ""))
    return found


STEPS = (0, 1, 2, 4, 8, 16, 32, 50)


def layers_lost(count, of=8, edge=-1.0):
    """The bits of a stack whose first `count` layers get nothing."""
    return [-inf if i < 2 * count else edge if i == 2 * count else 1.0 for i in range(2 * of - 1)]


@pytest.mark.parametrize(
    ("count", "first", "second", "last"),
    [
        (0, "", "", ""),
        (1, "", "info underflow", "info underflow"),
        (2, "", "info underflow", "warning underflow"),
        (3, "", "info underflow", "warning underflow"),
        (4, "info underflow", "info underflow", "critical underflow"),
        (7, "info underflow", "info underflow", "critical underflow"),
    ],
)
def test_the_share_of_layers_that_get_nothing_for_50_steps_tells_how_bad_it_is(count, first, second, last):
    found = severities(layers_lost(count), STEPS)
    assert (found[0], *set(found[1:-1]), found[-1]) == (first, second, last)


def test_a_layer_of_zeros_may_be_the_reason_until_50_steps_have_passed():
    assert severities([-inf] * 8 + [6.0], STEPS) == [*[""] * 7, "critical underflow"]


def test_a_run_that_learns_gets_an_info_at_most():
    assert severities(layers_lost(4), STEPS, np.linspace(2.3, 1.0, 51))[-1] == "info underflow"
    assert severities([-inf] * 8 + [6.0], STEPS, np.linspace(2.3, 1.0, 51))[-1] == ""


def test_zeros_at_the_first_step_alone_are_no_finding():
    history = history_of([-inf] * 8 + [4.0], steps=(0,))
    for step in (1, 2, 50, 60):
        history.append(Row(step, values_of([2.0] * 9), losses=np.full(2, 2.3)))
        assert VanishingGradient().judge(history) == []


def test_a_sample_of_nothing_but_zeros_is_passed_over():
    history = history_of(layers_lost(4), steps=STEPS)
    history.append(Row(51, values_of([-inf] * 15), losses=np.array([2.3])))
    (finding,) = VanishingGradient().judge(history)
    assert (finding.step, finding.cause, str(finding.severity)) == (51, "underflow", "critical")


def test_a_run_of_nothing_but_zeros_cannot_be_told_apart():
    assert severities([-inf] * 9, STEPS) == [""] * 8


@pytest.mark.parametrize(("bits_a_point", "cause"), [(0.8, "underflow"), (1.0, "weight_scale")])
def test_what_would_vanish_in_float32_too_keeps_its_cause(bits_a_point, cause):
    # 15 points, 8 of them in fp16: the decay carried on to the first is 14 times the bits; 4 decades are 13.3 bits
    kept = bits_a_point * np.arange(8) - 2
    history = history_of([*[-inf] * 7, *kept], op="sigmoid", steps=STEPS)
    (finding,) = VanishingGradient().judge(history)
    assert finding.cause == cause
    assert str(finding.severity) == "critical"


def test_the_decay_is_told_up_to_the_first_layer():
    history = history_of([*[-inf] * 7, *(np.arange(8) - 2.0)], op="sigmoid")
    (finding,) = VanishingGradient().judge(history)
    assert finding.evidence["span"] == pytest.approx(-14 * math.log10(2))
    assert finding.evidence["points"] == 15


def test_a_hundred_sigmoids_in_float32_are_saturation():
    bits = np.maximum(140 - 2.9 * np.arange(199)[::-1], -inf)
    history = history_of(np.where(bits < 0, -inf, bits), SINGLE, op="sigmoid")
    (finding,) = VanishingGradient().judge(history)
    assert (finding.cause, str(finding.severity)) == ("saturation", "critical")


def test_the_evidence_is_the_headroom_and_the_share_of_points_lost():
    (finding,) = VanishingGradient().judge(history_of(layers_lost(4)))
    assert finding.evidence == {"lost_share": pytest.approx(8 / 15), "points": 15.0, "headroom": 1.0}
    assert finding.layers == ("fc0", "fc1", "fc2", "fc3")


def test_a_limit_of_its_own_is_used():
    history = history_of([-2, -2, 0, 1, 2])
    assert VanishingGradient().judge(history) == []
    assert VanishingGradient(min_headroom=-1.5).judge(history)[0].layers == ("fc0",)


@pytest.mark.parametrize("value", [-20, 20])
def test_a_limit_out_of_its_range_is_refused(value):
    with pytest.raises(ValueError, match=rf"min_headroom must be in \(-20, 20\), got {value}"):
        VanishingGradient(min_headroom=value)


def test_a_plateau_is_a_consequence_of_an_underflow():
    history = History()
    history.add_points(stack(8, "relu"))
    losses = 2.3 + 0.01 * np.sin(np.arange(400.0))
    for row in rows_of(losses):
        history.append(Row(row.step, values_of(layers_lost(4)), row.scalars, losses=row.losses))
    assert is_vanishing(history)
    assert [finding.cause for finding in LossPlateau().judge(history)] == ["vanishing_gradient"]


def test_skipped_steps_hide_no_underflow_that_lasts():
    history = History()
    history.add_points([Point(p.name, p.module, p.op) for p in stack(8, "relu")])
    for step in range(101):
        if is_due(step, 50):
            skipped = step in (2, 4)
            facts = {"loss_scale": 65536.0, "step_skipped": float(skipped)}
            values = {"delta_norm": np.full(15, inf)} if skipped else values_of(layers_lost(4))
            history.append(Row(step, values, facts, losses=np.full(1, 2.3)))
    assert [str(finding.severity) for finding in VanishingGradient().judge(history)] == ["critical"]


def all_zero(floor=HALF, loss=2.3, steps=(0, 1)):
    """A run in which the gradient of the loss is zero from the loss on."""
    history = History()
    history.add_points(stack(4, "relu"))
    for step in steps:
        values = {"delta_norm": np.zeros(7), "delta_headroom": np.full(7, -inf)}
        history.append(Row(step, values, {"delta_floor": floor, "loss": loss}, losses=np.array([loss])))
    return history


def test_in_fp16_a_gradient_that_is_zero_from_the_loss_on_is_an_underflow_of_every_layer():
    (finding,) = VanishingGradient().judge(all_zero())
    assert (str(finding.severity), finding.cause) == ("critical", "underflow")
    assert set(finding.layers) == {"fc0", "fc1", "fc2", "fc3"}


def test_the_first_sample_of_zeros_is_only_an_info():
    (finding,) = VanishingGradient().judge(all_zero(steps=(0,)))
    assert str(finding.severity) == "info"


@pytest.mark.parametrize(("floor", "loss"), [(-133, 2.3), (SINGLE, 2.3), (HALF, 0.0), (HALF, inf), (nan, 2.3)])
def test_in_a_wider_format_or_without_a_loss_zeros_have_another_reason(floor, loss):
    assert VanishingGradient().judge(all_zero(floor, loss)) == []
