import math

import numpy as np
import pytest

from lightning_gradflow.advice.explanations import explain
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.time_profile import time_profile
from lightning_gradflow.history import MAX_CALLS, History, Point, Row
from tests.detectors.runs import verdict

inf, nan = math.inf, math.nan
RNN = Point("rnn", "rnn")


def curve(decades, steps=33):
    """Norms by time step: `decades` are lost on the way to the first."""
    return np.logspace(-decades, 0, steps)


def run(*rows, at=(0, 50, 100), losses=None, points=(RNN,), layers=(), **scalars):
    """A run with these norms by time step, one series a row, or a series for each point; the loss stands still."""
    history = History()
    history.layer_axis.merge(layers)
    history.add_points(points)
    history.add_features(3)
    last = -1
    for step, row in zip(at, rows, strict=False):
        calls = row if isinstance(row, dict) else {"rnn": np.array(row, dtype=float)}
        values = calls.pop("values", {}) if isinstance(row, dict) else {}
        loss = np.tile([2.31, 2.29], step)[last + 1 : step + 1] if losses is None else losses[last + 1 : step + 1]
        history.append(Row(step, values, dict(scalars), losses=loss, calls=calls))
        last = step
    return history


WARNING, INFO = [("warning", "recurrence", ("rnn",))], [("info", "recurrence", ("rnn",))]
TABLE = {
    "no row": (run(), []),
    "just inside the limit": (run(curve(3.9), curve(3.9), curve(3.9)), []),
    "just beyond the limit": (run(curve(4.1), curve(4.1), curve(4.1)), WARNING),
    "at first it may heal": (run(curve(9)), INFO),
    "for fifty steps it may, while it heals": (run(curve(9), curve(6)), INFO),
    "what does not heal may not": (run(curve(9), curve(7)), WARNING),
    "for a hundred steps it may not": (run(curve(9), curve(9), curve(9)), WARNING),
    "a long run waits longer": (run(curve(9), curve(9), curve(9), planned_steps=2000.0), INFO),
    "a short one does not": (run(curve(9), curve(9), curve(9), planned_steps=150.0), WARNING),
    "one odd batch": (run(curve(0), curve(0), curve(9)), []),
    "two in a row are not odd": (run(curve(0), curve(9), curve(9)), INFO),
    "healed": (run(curve(9), curve(9), curve(1)), []),
    "a memory of a step or less": (run(curve(20), curve(20), curve(20), at=(0, 16, 32)), WARNING),
    "a memory of two steps at that age": (run(curve(7), curve(7), curve(7), at=(0, 16, 32)), INFO),
    "seven calls are no recurrence": (run(*[curve(9, 7)] * 3), []),
    "eight are": (run(*[curve(9, 8)] * 3), WARNING),
    "a loss at every step": (run(*[np.ones(33)] * 3), []),
    "only the last step gets much": (run(*[[1e-9] * 32 + [1.0]] * 3), []),
    "only the first gets little": (run(*[[1e-9] + [1.0] * 32] * 3), []),
    "the early steps underflow": (run(*[[0.0] * 20 + list(curve(9, 13))] * 3), WARNING),
    "cut off, and well as far as it goes": (run(*[[0.0] * 20 + [1.0] * 13] * 3), []),
    "all zero": (run(*[np.zeros(33)] * 3), []),
    "all infinite": (run(*[np.full(33, inf)] * 3), []),
    "with calls that got none": (run(*[np.where(np.arange(33) % 2, nan, curve(9))] * 3), WARNING),
    "skipped by a gradient scaler": (run(*[curve(9)] * 3, step_skipped=1.0), []),
    "not measured in the newest row": (run(curve(9), curve(9), {}), []),
    "grows, just inside": (run(curve(-2.9)), []),
    "grows, just beyond": (run(curve(-3.1)), WARNING),
    "grew once": (run(curve(-9), curve(0)), []),
    "grows and is clipped": (run(curve(-9), curve(-9), clip_factor=0.1), INFO),
    "grows and was clipped all the time": (run(curve(-9), curve(-9), curve(-9), clip_factor=0.1), WARNING),
    "grows and clipping has nothing to do": (run(curve(-9), clip_factor=1.0), WARNING),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case):
    history, expected = TABLE[case]
    assert verdict(RecurrentGradient().judge(history)) == expected


@pytest.mark.parametrize("case", TABLE)
def test_the_size_of_the_loss_does_not_matter(case):
    history, expected = TABLE[case]
    for factor in (1e-6, 1e6):
        scaled = History()
        scaled.add_points([RNN])
        for row in history.rows:
            calls = {name: norms * factor for name, norms in row.calls.items()}
            scaled.append(Row(row.step, row.values, row.scalars, losses=row.losses * factor, calls=calls))
        assert verdict(RecurrentGradient().judge(scaled)) == expected


@pytest.mark.parametrize("decades", [9, 20])
def test_what_has_learnt_is_no_alarm(decades):
    losses = np.linspace(2.3, 1.0, 101)
    assert verdict(RecurrentGradient().judge(run(*[curve(decades)] * 3, losses=losses))) == INFO


def test_nor_is_what_learns_slowly():
    noise = 0.01 * np.random.default_rng(0).standard_normal(101)
    falling = np.linspace(2.30, 2.27, 101) + noise  # far from learnt
    assert verdict(RecurrentGradient().judge(run(*[curve(9)] * 3, losses=falling))) == INFO
    assert verdict(RecurrentGradient().judge(run(*[curve(9)] * 3, losses=2.3 + noise))) == WARNING


def test_a_run_whose_weights_hardly_move_is_given_time():
    for ratio, expected in [(1e-4, INFO), (1e-2, WARNING)]:
        row = {"rnn": curve(9), "values": {"update_ratio": np.array([ratio])}}
        history = run(*[dict(row) for _ in range(3)], layers=["rnn"])
        assert verdict(RecurrentGradient().judge(history)) == expected


STATE = [Point("rec", "rec"), Point("rec/op", "rec", "relu")]


def _state(size, inputs=1.0, op="relu", **kwargs):
    """A loop that grows and is clipped, once: the size of its state, and of the inputs."""
    values = {"output_rms": np.array([1.0, size]), "input_rms": np.full(3, inputs)}
    row = {"rec": curve(-9), "rec/op": curve(-9), "values": values}
    points = [STATE[0], Point("rec/op", "rec", op)]
    return verdict(RecurrentGradient().judge(run(row, points=points, clip_factor=0.1, **kwargs)))


@pytest.mark.parametrize(
    ("found", "severity"),
    [
        (_state(31.0), "info"),
        (_state(32.0), "warning"),
        (_state(inf), "warning"),
        (_state(nan), "info"),
        (_state(3100.0, inputs=100.0), "info"),
        (_state(3200.0, inputs=100.0), "warning"),
        (_state(32.0, inputs=0.01), "warning"),
        (_state(31.0, inputs=0.01), "info"),
        (_state(1e9, op="tanh"), "info"),
        (_state(32.0, inputs=nan), "warning"),
    ],
)
def test_clipping_holds_no_state_that_grows_with_the_gradient(found, severity):
    assert found == [(severity, "recurrence", ("rec",))]


def test_a_state_that_is_large_without_growing_is_none_of_it():
    row = {"rec": curve(-2.9), "values": {"output_rms": np.array([1e9])}}
    assert verdict(RecurrentGradient().judge(run(row, points=STATE[:1], clip_factor=0.1))) == []


def _stack(*decades, others=None, **kwargs):
    rows = [{**(others or {}), "values": {"stack_gain": 10.0 ** np.array([nan, lost])}} for lost in decades]
    return run(*rows, layers=["out", "rnn"], **kwargs)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (_stack(-3.9, -3.9, -3.9), []),
        (_stack(-4.1), INFO),
        (_stack(-4.1, -4.1, -4.1), WARNING),
        (_stack(-9, -4.1), INFO),
        (_stack(-9, -7), WARNING),
        (_stack(0, 0, -9), []),
        (_stack(0, -9, -9), INFO),
        (_stack(-inf, -inf, -inf), WARNING),
        (_stack(-9, -9, nan), []),
        (_stack(-9, -9, -9, planned_steps=2000.0), INFO),
        (_stack(-9, -9, -9, losses=np.linspace(2.3, 1.0, 101)), INFO),
        (_stack(-9, -9, -9, step_skipped=1.0), []),
        (_stack(-5.9, -5.9, -5.9, normalised_updates=1.0), INFO),
        (_stack(-6.1, -6.1, -6.1, normalised_updates=1.0), WARNING),
        (_stack(-5.9, -5.9, -5.9, normalised_updates=0.0), WARNING),
    ],
)
def test_a_stack_is_judged_as_time_is(history, expected):
    assert verdict(RecurrentGradient().judge(history)) == expected


def test_what_is_lost_in_a_stack_is_told():
    (finding,) = RecurrentGradient().judge(_stack(-9, -9, -6))
    assert (finding.kind, finding.evidence) == ("vanishing_gradient", {"stack_gain": pytest.approx(1e-6)})
    assert "from the last layer of the stack to the first a share of 1.0e-6 is left" in explain(finding)
    assert "through time" not in explain(finding)


def test_what_is_lost_through_time_is_told_first():
    (finding,) = RecurrentGradient().judge(_stack(-9, -9, -9, others={"rnn": curve(9)}))
    assert "stack_gain" not in finding.evidence
    assert "through time" in explain(finding)


def test_a_growth_that_has_learnt_is_no_alarm():
    losses = np.linspace(2.3, 1.0, 101)
    assert verdict(RecurrentGradient().judge(run(*[curve(-9)] * 3, losses=losses))) == INFO


def test_what_dies_and_what_grows_are_two_findings():
    points = [RNN, Point("other", "other")]
    history = run(*[{"rnn": curve(9), "other": curve(-9)} for _ in range(3)], points=points)
    findings = RecurrentGradient().judge(history)
    assert [(str(f.kind), f.layers) for f in findings] == [
        ("vanishing_gradient", ("rnn",)),
        ("exploding_gradient", ("other",)),
    ]


def test_the_layers_of_a_loop_are_named_worst_first_and_activations_are_not():
    points = [Point("ih", "ih"), Point("hh", "hh"), Point("hh/tanh", "hh", "tanh")]
    rows = [{"ih": curve(8), "hh": curve(9), "hh/tanh": curve(10)} for _ in range(3)]
    (finding,) = RecurrentGradient().judge(run(*rows, points=points))
    assert finding.layers == ("hh", "ih")


def test_beside_a_recurrence_the_layers_called_once_a_step_are_not_named():
    points = [Point("encode", "encode"), Point("cell", "cell")]
    row = {"encode": curve(10), "cell": curve(9), "values": {"recurrent_radius": np.array([nan, 0.5])}}
    history = run(*[dict(row) for _ in range(3)], points=points, layers=["encode", "cell"])
    (finding,) = RecurrentGradient().judge(history)
    assert finding.layers == ("cell",)
    assert finding.evidence["recurrent_radius"] == 0.5


def test_the_evidence():
    (finding,) = RecurrentGradient().judge(run(*[0.5 ** np.arange(33.0)[::-1]] * 3))
    assert finding.evidence == {
        "time_decay": pytest.approx(0.5),
        "memory_steps": pytest.approx(1 / math.log(2)),
        "reach": pytest.approx(32 * math.log10(0.5)),
        "time_steps": 33.0,
    }


def test_of_a_long_loop_the_time_between_the_calls_that_were_kept_counts():
    steps = 631
    kept = np.rint(np.linspace(0, steps - 1, MAX_CALLS))
    history = run({"rnn": 0.99 ** (steps - 1 - kept), "values": {"calls": np.array([float(steps)])}})
    profile = time_profile(history, RNN)
    assert (profile.decay, profile.steps) == (pytest.approx(0.99), steps)


def test_a_gradient_that_neither_dies_nor_grows_is_remembered_for_ever():
    assert time_profile(run(np.ones(10)), RNN).memory == inf


def test_healthy_recurrences_beside_it_change_nothing():
    points = [RNN, *(Point(f"well{i}", f"well{i}") for i in range(5))]
    rows = [{"rnn": curve(9)} | {f"well{i}": np.ones(33) for i in range(5)} for _ in range(3)]
    assert verdict(RecurrentGradient().judge(run(*rows, points=points))) == WARNING


@pytest.mark.parametrize("argument", ["max_decay", "max_growth"])
def test_limits_out_of_range_are_named(argument):
    with pytest.raises(ValueError, match=rf"{argument} must be in \(0, 100\), got 0"):
        RecurrentGradient(**{argument: 0})


def test_the_evidence_tells_whether_the_hidden_state_has_collapsed():
    history = History()
    history.add_points([Point("rnn", "rnn")])
    for spread in (math.nan, 0.01):
        calls = {"rnn": 0.5 ** np.arange(20.0)[::-1]}
        history.append(Row(len(history), {"output_spread": np.array([spread])}, calls=calls))
        (finding,) = RecurrentGradient().judge(history)
        assert finding.evidence.get("output_spread", math.nan) == pytest.approx(spread, nan_ok=True)
