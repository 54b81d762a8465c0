"""Regressions whose targets are far larger than the outputs: each condition from both sides."""

import math

import numpy as np
import pytest

from lightning_gradflow.advice import explain
from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.detectors.unscaled_targets import UnscaledTargets
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.plan import remedies_for
from tests.detectors.runs import verdict

POINTS = [Point("fc", "fc"), Point("act", "act", "relu"), Point("out", "out"), Point("bound", "bound", "softplus")]
STANDS = np.full(101, 1e4)
FOUND = [("warning", "unscaled_targets", ("out",))]


def run(errors=(100.0, 100.0), outputs=(0.3, 0.5), losses=STANDS, lr=None, interval=10, planned_steps=100.0, **scalars):
    """A run of which the first and the later samples have these errors and outputs."""
    history = History()
    history.layer_axis.merge(["fc", "out"])
    history.add_points(POINTS)
    last = -1
    for step in range(0, len(losses), interval):
        error, output = (both[min(step, 1)] for both in (errors, outputs))
        sizes = {} if math.isnan(error) else {"residual_rms": error, "compared_rms": output}
        sizes |= {} if math.isnan(planned_steps) else {"planned_steps": planned_steps}
        rates = {} if lr is None else {"lr": lr(step)}
        seen = {"output_rms": np.array([50.0, 50.0, output, 50.0])}
        history.append(Row(step, seen, {**sizes, **rates, **scalars}, losses=np.array(losses[last + 1 : step + 1])))
        last = step
    return history


def judged(**changes):
    return verdict(UnscaledTargets().judge(run(**changes)))


@pytest.mark.parametrize(
    ("errors", "outputs", "expected"),
    [
        ((100.0, 100.0), (0.3, 0.5), FOUND),
        ((31.0, 31.0), (0.3, 0.5), FOUND),
        ((29.0, 29.0), (0.3, 0.5), []),  # a last layer grows to that
        ((31.0, 29.0), (0.3, 0.5), []),
        ((100.0, 100.0), (0.3, 9.9), FOUND),
        ((100.0, 100.0), (0.3, 10.1), []),  # it gets there
        ((100.0, 100.0), (10.1, 0.5), []),  # nothing that it was born with
        ((math.nan, 100.0), (0.3, 0.5), []),  # nobody has seen the start
        ((100.0, math.inf), (0.3, 0.5), []),
    ],
)
def test_it_is_judged_by_the_error_beside_the_outputs(errors, outputs, expected):
    assert judged(errors=errors, outputs=outputs) == expected


@pytest.mark.parametrize(
    ("length", "planned", "expected"),
    [(51, 3000.0, []), (291, 3000.0, []), (301, 3000.0, FOUND), (291, math.nan, []), (301, math.nan, FOUND)],
)
def test_a_run_has_time_to_get_there(length, planned, expected):
    assert judged(outputs=(0.3, 5.0), losses=np.full(length, 1e4), planned_steps=planned) == expected


@pytest.mark.parametrize(
    ("output", "planned", "expected"),
    [
        (0.1, 40.0, FOUND),  # 1.6 at the end
        (0.1, 90.0, FOUND),  # 8.1
        (0.1, 110.0, []),  # 12.1
        (0.1, math.nan, []),
    ],
)
def test_outputs_that_will_not_get_there_are_told_after_ten_steps(output, planned, expected):
    assert judged(outputs=(0.05, output), losses=STANDS[:11], planned_steps=planned) == expected
    assert judged(outputs=(0.05, output), losses=STANDS[:10], interval=9, planned_steps=planned) == []


def offset(errors, first=(293.0, 0.3), deviation=10.0, planned=200.0, **changes):
    """A run with targets 293 +- 10, and the errors of the samples behind the first, at every tenth step."""
    history = run(losses=np.full(10 * len(errors) + 1, 1e3), planned_steps=planned, **changes)
    known = [first, *((error, 200.0) for error in errors)]
    for row, (error, output) in zip(history.rows, known, strict=True):
        row.scalars.update(residual_rms=error, compared_rms=output, target_deviation=deviation)
    return history


@pytest.mark.parametrize(
    ("errors", "changes", "expected"),
    [
        ([16.0] * 5, {}, FOUND),
        ([14.0] * 5, {}, []),  # about what a constant leaves
        ([16.0, 14.0, 16.0, 16.0, 16.0], {}, []),  # it has been there
        ([16.0] * 4, {}, []),  # there was no time
        ([16.0] * 5, {"planned": 260.0}, []),
        ([16.0] * 5, {"planned": 1000.0}, []),
        ([16.0] * 30, {"planned": math.nan}, FOUND),
        ([16.0] * 29, {"planned": math.nan}, []),
        ([16.0] * 5, {"first": (293.0, 29.0)}, FOUND),
        ([16.0] * 5, {"first": (293.0, 30.0)}, []),  # nothing that it was born with
        ([16.0] * 5, {"first": (31.0, 0.3)}, FOUND),
        ([16.0] * 5, {"first": (29.0, 0.3)}, []),  # the mean is not what the error is made of
        ([1.6] * 5, {"first": (10.1, 0.3), "deviation": 1.0}, FOUND),
        ([1.6] * 5, {"first": (9.9, 0.3), "deviation": 1.0}, []),  # that is made up soon
        ([16.0] * 5, {"first": (330.0, 0.3)}, []),  # next to nothing is left of it
        ([16.0] * 5, {"deviation": 0.0}, []),  # all alike
        ([16.0] * 5, {"deviation": math.nan}, []),  # too few targets in a batch
        ([16.0, 16.0, 16.0, 16.0, math.inf], {}, []),
        ([math.nan] * 4 + [16.0], {}, FOUND),
        ([16.0] * 5, {"lr": lambda step: 1e-3 * min(1.0, (step + 1) / 20)}, []),  # a warm-up is not counted
    ],
)
def test_a_run_that_is_on_the_way_to_the_mean_for_a_fifth_of_its_steps_is_found(errors, changes, expected):
    assert verdict(UnscaledTargets().judge(offset(errors, **changes))) == expected


def test_the_deviation_stands_in_the_evidence():
    (finding,) = UnscaledTargets().judge(offset([16.0] * 5))
    assert finding.evidence["target_deviation"] == 10.0
    assert "what tells targets apart is 10" in explain(finding)


def test_a_warm_up_does_not_count():
    for until, expected in ((160, []), (90, FOUND)):
        found = judged(
            outputs=(0.3, 5.0),
            losses=np.full(401, 1e4),
            lr=lambda step, until=until: 1e-3 * min(step, until),
            planned_steps=3000.0,
        )
        assert found == expected


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([3.1e4], FOUND),
        ([2.9e4], []),
        ([1e4, 1e4, 3.1e4], []),  # a batch that stands out
        ([1e4, 3.1e4, 3.1e4], FOUND),
        ([math.inf], FOUND),
        ([math.nan], FOUND),
        ([1e4] * 49 + [math.nan], FOUND),
        ([1e4] * 50 + [math.nan], []),  # what breaks later has another reason
    ],
)
def test_steps_that_are_too_large_for_it_show_at_once(later, expected):
    losses = np.array([1e4, *later])
    found = judged(outputs=(0.3, 9.9), losses=losses, interval=len(later), planned_steps=3000.0)
    assert found == expected


def test_the_numbers_behind_it_are_told():
    (finding,) = UnscaledTargets().judge(run(losses=STANDS[:61]))
    assert (finding.kind, finding.step) == ("loss_mismatch", 60)
    assert finding.evidence == {"error": 100.0, "output_rms": 0.5, "steps": 60.0, "loss": 1e4}


def test_the_layer_that_gives_what_is_compared_is_named():
    history = run()
    heads = [Point("price", "price"), Point("kind", "kind")]
    history.layer_axis.merge(["price", "kind"])
    history.add_points(heads)
    sizes = {"residual_rms": 100.0, "compared_rms": 0.5, "planned_steps": 100.0}
    history.append(Row(101, {"output_rms": np.array([50.0, 50.0, 3.0, 50.0, 0.51, 2.0])}, sizes))
    assert verdict(UnscaledTargets().judge(history)) == [("warning", "unscaled_targets", ("price",))]


def test_nothing_is_said_of_nothing():
    assert UnscaledTargets().judge(History()) == []


def test_the_plateau_detector_tells_it_and_a_new_output_layer_is_the_remedy():
    said = [finding for detector in PlateauDetector().detectors(alone=True) for finding in detector.judge(run())]
    assert verdict(said[:1]) == FOUND
    for has_learnt in (False, True):
        assert remedies_for(said[0].kind, said[0].cause, has_learnt=has_learnt) == ("reinit",)


@pytest.mark.parametrize(("argument", "values"), [("min_error", (0.0, -1.0, math.nan)), ("min_times", (1.0, math.inf))])
def test_limits_out_of_range_are_refused(argument, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{argument} must be .*, got"):
            UnscaledTargets(**{argument: value})
