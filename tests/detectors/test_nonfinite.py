import math

import numpy as np
import pytest

from lightning_gradflow.detectors.nonfinite import NonfiniteGradient
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import stack, verdict

nan, inf = math.nan, math.inf
CLEAN = {"fractions": [0.0, 0.0, 0.0]}
BROKEN = {"fractions": [0.0, 0.5, 1.0]}


def run(*rows, scaled=False, extra=(), scale=1.0):
    """Rows with `fractions` of three layers, and if given `outputs`, `deltas`, `losses`, `at` and `skipped`."""
    history = History()
    points = [*stack(3), *extra]
    history.layer_axis.merge([point.module for point in points])
    history.add_points(points)
    healthy = len(extra)
    for step, row in enumerate(rows):
        values = {"grad_nonfinite_fraction": np.array([*row["fractions"], *[0.0] * healthy])}
        if "outputs" in row:
            values["output_rms"] = np.array([*row["outputs"], *[1.0] * healthy])
        if "deltas" in row:
            values["delta_norm"] = np.array([*[scale * v for v in row["deltas"]], *[1.0] * healthy])
        losses = np.array(row.get("losses", []), dtype=float)
        skipped = row.get("skipped", float(max(row["fractions"]) > 0))
        facts = {"loss_scale": row.get("at", 65536.0), "step_skipped": skipped} if scaled else {}
        history.append(Row(step, values, facts, losses=scale * losses))
    return history


def at(scale, **others):
    """A backward pass that is not finite, at this loss scale."""
    return {**BROKEN, "at": scale, **others}


# rows, whether a gradient scaler is at work -> (cause, layers) or None
TABLE = {
    "clean": ([CLEAN], False, None),
    "the smallest share": ([{"fractions": [0.0, 1e-9, 0.0]}], False, ("backward", ("fc1",))),
    "no row": ([], False, None),
    "not measured": ([{"fractions": [nan, nan, nan]}], False, None),
    "over again": ([BROKEN, CLEAN], False, None),
    "forward": ([{**BROKEN, "outputs": [1.0, inf, inf], "deltas": [inf] * 3}], False, ("forward", ("fc1", "fc2"))),
    "forward of the first layer": ([{**BROKEN, "outputs": [inf] * 3}], False, ("forward", ("fc0", "fc1", "fc2"))),
    "loss": ([{**BROKEN, "outputs": [1.0] * 3, "losses": [2.0, nan]}], False, ("loss", ("fc2",))),
    "infinite loss": ([{**BROKEN, "losses": [inf]}], False, ("loss", ("fc2",))),
    "the loss of the step before": (
        [{**BROKEN, "deltas": [inf, inf, 1.0], "losses": [nan, 2.0]}],
        False,
        ("backward", ("fc1", "fc0", "fc2")),
    ),
    "backward": ([{**BROKEN, "deltas": [inf, 1.0, 1.0]}], False, ("backward", ("fc0", "fc2", "fc1"))),
    "only in parameters": ([{**BROKEN, "deltas": [1.0, nan, 1.0]}], False, ("backward", ("fc2", "fc1"))),
    "skipped steps while the scale comes down": ([at(2.0**k) for k in (16, 15, 14, 12, 8, 0)], True, None),
    "still broken below the limit": ([at(1.0), at(0.5)], True, ("backward", ("fc2", "fc1"))),
    "still broken at the limit": ([at(2.0), at(1.0)], True, None),
    "one skipped step below the limit": ([CLEAN, at(0.5)], True, None),
    "broken from the first sample on, below the limit": ([at(0.5)], True, None),
    "a scale that fell to nothing": ([at(1e-38), at(0.0)], True, ("backward", ("fc2", "fc1"))),
    "a scaler that gets through now and then": ([at(4.0), at(0.5), CLEAN, at(0.25)], True, None),
    "mended": ([at(0.5), at(0.25), CLEAN], True, None),
    "a step that was not skipped": ([at(65536.0, skipped=0.0)], True, ("backward", ("fc2", "fc1"))),
    "a scaler of which skips are not known": ([at(65536.0, skipped=nan)] * 2, True, None),
    "forward under a scaler": ([at(65536.0, outputs=[1.0, inf, inf])], True, ("forward", ("fc1", "fc2"))),
    "loss under a scaler": ([at(65536.0, outputs=[1.0] * 3, losses=[2.0, inf])], True, ("loss", ("fc2",))),
    "most losses under a scaler": ([at(65536.0, losses=[nan, nan, 2.0])], True, ("backward", ("fc2", "fc1"))),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    rows, scaled, expected = TABLE[case]
    found = verdict(NonfiniteGradient().judge(run(*rows, scaled=scaled)))
    assert found == ([] if expected is None else [("critical", *expected)])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", TABLE)
def test_multiplying_the_loss_changes_no_verdict(case, scale):
    rows, scaled, _ = TABLE[case]
    plain = NonfiniteGradient().judge(run(*rows, scaled=scaled))
    assert verdict(NonfiniteGradient().judge(run(*rows, scaled=scaled, scale=scale))) == verdict(plain)


@pytest.mark.parametrize("case", sorted(set(TABLE) - {"loss", "infinite loss", "loss under a scaler"}))
def test_healthy_layers_change_no_verdict(case):
    rows, scaled, _ = TABLE[case]
    plain = NonfiniteGradient().judge(run(*rows, scaled=scaled))
    assert verdict(NonfiniteGradient().judge(run(*rows, scaled=scaled, extra=stack(6)[3:]))) == verdict(plain)


@pytest.mark.parametrize("case", TABLE)
def test_layers_that_never_run_change_no_verdict(case):
    rows, scaled, _ = TABLE[case]
    history = run(*rows, scaled=scaled)
    history.layer_axis.merge(["unused"])
    plain = NonfiniteGradient().judge(run(*rows, scaled=scaled))
    assert verdict(NonfiniteGradient().judge(history)) == verdict(plain)


@pytest.mark.parametrize("value", [0, -1, inf])
def test_a_limit_out_of_its_range_is_refused(value):
    with pytest.raises(ValueError, match=rf"min_scale must be in \(0, inf\), got {value}"):
        NonfiniteGradient(min_scale=value)


def test_a_nan_in_every_backward_pass_is_found_at_step_32_under_a_scaler_from_65536():
    history = History()
    history.layer_axis.merge(["fc"])
    found = []
    for step in (0, 1, 2, 4, 8, 16, 32, 50):
        facts = {"loss_scale": 65536.0 * 0.5**step, "step_skipped": 1.0}
        history.append(Row(step, {"grad_nonfinite_fraction": np.ones(1)}, facts))
        if NonfiniteGradient().judge(history):
            found.append(step)
    assert found == [32, 50]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([math.inf], True),
        ([math.nan, math.nan, 1.0], True),
        ([math.nan, 1.0], False),
        ([1.0, 1.0, math.nan], False),
        ([1.0], False),
        ([], False),
    ],
)
def test_a_loss_that_is_mostly_not_finite_counts_even_where_the_gradients_are(losses, found):
    history = History()
    history.layer_axis.merge(["fc"])
    history.add_points([Point("fc", "fc")])
    values = {"grad_nonfinite_fraction": np.zeros(1), "output_rms": np.ones(1), "delta_norm": np.ones(1)}
    history.append(Row(0, values, losses=np.array(losses, dtype=float)))
    assert len(NonfiniteGradient().judge(history)) == found


def led(*rows, sizes=None):
    """Rows of two layers: (step, losses, {metric: both values}, scalars)."""
    history = History()
    history.layer_axis.merge(["fc0", "fc1"])
    history.add_points(stack(2))
    if sizes is not None:
        history.add_features(len(sizes))
    for step, losses, values, scalars in rows:
        found = {"grad_nonfinite_fraction": np.zeros(2)} | {k: np.array(v, dtype=float) for k, v in values.items()}
        if sizes is not None:
            found["input_rms"] = np.array(sizes, dtype=float)
        history.append(Row(step, found, scalars, losses=np.array(losses, dtype=float)))
    return history


HUGE = {"grad_nonfinite_fraction": [1, 1], "output_rms": [1e3, inf]}
FORWARD = {"grad_nonfinite_fraction": [1, 1], "output_rms": [1, inf]}
WEIGHTS = {"grad_nonfinite_fraction": [1, 1], "output_rms": [inf, inf], "weight_norm": [inf, 1]}
QUIET = [(step, [2.3], {"update_ratio": [1e-3, 1e-3], "weight_norm": [1, 1]}, {"lr": 0.1}) for step in range(3)]
LARGE = [(step, losses, {**values, "output_rms": [1e3, 1e3]}, scalars) for step, losses, values, scalars in QUIET]
LATE = (50, [2.2] * 47, {"update_ratio": [1e-3, 1e-3]}, {"lr": 0.1})
LED = {
    "the first sample": ([(0, [nan], FORWARD, {})], None, ("forward", ("fc1",))),
    "out of nothing": ([*QUIET, (4, [2.3, nan], FORWARD, {})], None, ("forward", ("fc1",))),
    "after a rise of the loss": (
        [*QUIET, (8, [3, 60, 4e9, nan, nan], FORWARD, {})],
        None,
        ("learning_rate_too_large", ("fc1",)),
    ),
    "after a rise of the loss, in the backward pass": (
        [*QUIET, (8, [3, 60, 4e9], {"grad_nonfinite_fraction": [1, 1]}, {})],
        None,
        ("learning_rate_too_large", ("fc1", "fc0")),
    ),
    "noise is no rise": ([*QUIET, (8, [1, 5, 9, nan, nan], FORWARD, {})], None, ("forward", ("fc1",))),
    "after a step larger than the weights": (
        [(0, [2.3], {"update_ratio": [50, 70], "weight_norm": [1, 1]}, {}), (1, [nan], FORWARD, {})],
        None,
        ("learning_rate_too_large", ("fc1",)),
    ),
    "a pole of the backward pass after a large step": (
        [
            (0, [2.3], {"update_ratio": [50, 70], "weight_norm": [1, 1]}, {}),
            (1, [2.3], {"grad_nonfinite_fraction": [1, 1]}, {}),
        ],
        None,
        ("backward", ("fc1", "fc0")),
    ),
    "after a jump of the gradient": (
        [
            *[(step, [2.3], {}, {"grad_norm_total": 1e4 if step == 8 else 1.0}) for step in range(9)],
            (9, [nan], FORWARD, {}),
        ],
        None,
        ("learning_rate_too_large", ("fc1",)),
    ),
    "after a jump of the learning rate": (
        [*QUIET, LATE, (100, [2.2] * 9 + [nan] * 41, WEIGHTS, {"lr": 30.0})],
        None,
        ("learning_rate_too_large", ("fc0", "fc1")),
    ),
    "weights that were spoilt between two samples": (
        [*QUIET, LATE, (100, [2.2] * 9 + [nan] * 41, WEIGHTS, {"lr": 0.1})],
        None,
        ("forward", ("fc0", "fc1")),  # by a batch as well as by a step: nobody saw it
    ),
    "weights that were so before the first step": ([(0, [nan], WEIGHTS, {})], None, ("initialisation", ("fc0",))),
    "weights that are still so": (
        [(step, [nan], WEIGHTS, {}) for step in (0, 1, 8)],
        None,
        ("initialisation", ("fc0",)),
    ),
    "weights that were so when it began to look": ([(7, [nan], WEIGHTS, {})], None, ("forward", ("fc0", "fc1"))),
    "weights that were so, and large inputs": (
        [(0, [nan], {**WEIGHTS, "output_rms": [inf, 1e30]}, {})],
        [1, 1e30],
        ("initialisation", ("fc0",)),
    ),
    "a step that spoils weights, at once": (
        [*QUIET, (3, [2.3], {"update_norm": [1, inf]}, {})],
        None,
        ("optimizer_step", ("fc1",)),
    ),
    "unscaled inputs": ([(0, [inf], HUGE, {})], [1, 1e30], ("unscaled_inputs", ("fc1",))),
    "unscaled inputs that take a few steps": (
        [*LARGE, (8, [3, 60, 4e9, nan, nan], HUGE, {})],
        [1, 900],
        ("unscaled_inputs", ("fc1",)),
    ),
    "unscaled inputs that did not hurt so far": (
        [*LARGE, LATE, (100, [2.2] * 9 + [nan] * 41, HUGE, {"lr": 0.1})],
        [1, 900],
        ("forward", ("fc1",)),
    ),
    "a NaN among the inputs": ([(0, [nan], HUGE, {})], [1, inf], ("forward", ("fc1",))),
}


@pytest.mark.parametrize("case", LED)
def test_what_led_there(case):
    rows, sizes, expected = LED[case]
    assert verdict(NonfiniteGradient().judge(led(*rows, sizes=sizes))) == [("critical", *expected)]


def test_the_cause_stays_the_same_while_it_lasts():
    rows, _, expected = LED["after a rise of the loss"]
    later = [(step, [nan] * 50, WEIGHTS, {"lr": 0.1}) for step in (50, 100, 150, 200)]
    (finding,) = NonfiniteGradient().judge(led(*rows, *later))
    assert finding.cause == expected[0]
