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
    """Rows with `fractions` of three layers, and if given `outputs`, `deltas` and `losses`."""
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
        history.append(Row(step, values, {"loss_scale": 1.0} if scaled else {}, losses=scale * losses))
    return history


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
    "four skipped steps of a scaler": ([BROKEN] * 4, True, None),
    "five skipped steps of a scaler": ([BROKEN] * 5, True, ("backward", ("fc2", "fc1"))),
    "a scaler that gets through now and then": ([*[BROKEN] * 4, CLEAN, *[BROKEN] * 4], True, None),
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


@pytest.mark.parametrize("case", sorted(set(TABLE) - {"loss", "infinite loss"}))
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


@pytest.mark.parametrize("value", [0, -1])
def test_a_patience_out_of_its_range_is_refused(value):
    with pytest.raises(ValueError, match=rf"scaled_patience must be a whole number in \[1, inf\), got {value}"):
        NonfiniteGradient(scaled_patience=value)


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
