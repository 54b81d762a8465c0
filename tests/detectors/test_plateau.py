import math

import numpy as np
import pytest

from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import alarms, measured, rows_of, stack

PRIOR = math.log(10)


def t(steps):
    return np.arange(steps, dtype=float)


def noisy(losses, share, seed=0):
    """Losses with multiplicative noise of mean one, as of small batches."""
    rng = np.random.default_rng(seed)
    return losses * np.exp(share * rng.standard_normal(len(losses)) - share**2 / 2)


def put(losses, at, value):
    changed = np.array(losses)
    changed[at] = value
    return changed


def falling(steps=1500, rate=150):
    return 0.1 + (PRIOR - 0.1) * np.exp(-t(steps) / rate)


def sawtooth(steps, epoch, share):
    """A factor that rises by a share within each epoch."""
    return 1 + share * (t(steps) % epoch / epoch - 0.5)


def flat(steps=1500):
    return np.full(steps, PRIOR)


def warm_up(steps, until):
    return np.minimum(1.0, t(steps) / until)


def cosine(steps):
    return 0.5 + 0.5 * np.cos(np.pi * t(steps) / steps)


# losses, what else there is in the rows
HEALTHY = {
    "falling": (falling(), {}),
    "falling in noise": (noisy(falling(), 0.25), {}),
    "falling in wild noise": (noisy(falling(3000, 1000), 0.5), {}),
    "falling by 2 % in 200 steps": (PRIOR * 0.98 ** (t(3000) / 200), {}),
    "falling by 2 % in 200 steps in noise": (noisy(PRIOR * 0.98 ** (t(3000) / 200), 0.1), {}),
    "converged": (noisy(0.05 + PRIOR * np.exp(-t(3000) / 10), 0.3), {}),
    "converged in two steps": (noisy(np.where(t(2000) < 2, PRIOR / (1 + t(2000)), 0.4), 0.05), {}),
    "label noise floor": (noisy(1.8 + 0.5 * np.exp(-t(3000) / 100), 0.1), {}),
    "fine-tuning": (noisy(0.25 + 0.1 * np.exp(-t(3000) / 800), 0.1), {}),
    "power law": (noisy(PRIOR * (1 + t(3000) / 100) ** -0.1, 0.1), {}),
    "warm-up": (noisy(flat(2000), 0.01), {"lr": warm_up(2000, 2000)}),
    "learns in warm-up": (noisy(6 + 5 * np.exp(-t(2500) / 300), 0.02), {"lr": warm_up(2500, 1000)}),
    "cosine tail": (noisy(0.5 + 1.8 * np.exp(-t(3000) / 300), 0.05), {"lr": cosine(3000)}),
    "two optimizers": (noisy(flat(), 0.05), {"optimizers": 2.0}),
    "negative": (-10 + 8 * np.exp(-t(2000) / 500), {}),
    "through zero": (3 - t(2000) / 200 + 0.3 * np.random.default_rng(0).standard_normal(2000), {}),
    "around zero": (0.2 * np.random.default_rng(0).standard_normal(2000), {}),
    "zero": (np.zeros(1500), {}),
    "a spike": (put(noisy(falling(), 0.1), 350, 1e4), {}),
    "NaNs inside": (put(noisy(falling(), 0.1), slice(3, None, 7), math.nan), {}),
    "NaN throughout": (np.full(1500, math.nan), {}),
    "infinite throughout": (np.full(1500, math.inf), {}),
    "known at samples only": (noisy(falling(8000, 1500), 0.1), {"sampled_only": True}),
    "rising within each epoch": (
        0.98 ** (t(3000) / 200) * noisy(PRIOR * sawtooth(3000, 130, 0.3), 0.02),
        {"steps_per_epoch": 130.0},
    ),
    "the validation loss falls": (noisy(flat(3000), 0.01), {"val": PRIOR * 0.9 ** (t(3000) / 200)}),
    "rising": (noisy(PRIOR * (1 + t(1500) / 4000), 0.02), {}),
    "both signs": (noisy(flat(1500), 0.02) * np.where(t(1500) % 3, 1, -1), {}),
    "too short": (flat(299), {}),
}
# losses, what else there is in the rows, the step by which it is found
SICK = {
    "flat": (flat(), {}, 300),
    "flat with a calibration of the bias": (flat() + 0.1 * np.exp(-t(1500) / 5), {}, 300),
    "flat in noise": (noisy(flat(3000), 0.02), {}, 700),
    "flat in much noise": (noisy(flat(4000), 0.1), {}, 2000),
    "falling by 0.3 % in 200 steps": (PRIOR * 0.997 ** (t(1500) / 200), {}, 300),
    "rising so slowly that it stands still": (PRIOR * (1 + t(1500) / 40000), {}, 300),
    "flat after warm-up": (flat(), {"lr": warm_up(1500, 500)}, 900),
    "flat under cosine": (flat(), {"lr": cosine(1500)}, 300),
    "negative and flat": (-flat(), {}, 300),
    "a spike in a flat loss": (put(noisy(flat(3000), 0.01), 3, 50.0), {}, 700),
    "NaNs in a flat loss": (put(flat(), slice(3, None, 7), math.nan), {}, 400),
    "known at samples only": (flat(4000), {"sampled_only": True}, 2350),
    "flat with epochs": (flat(), {"steps_per_epoch": 100.0}, 300),
    "epochs longer than anyone waits": (flat(), {"steps_per_epoch": 1e5}, 300),
    "no learning rate known": (flat(), {"lr": np.full(1500, math.nan)}, 300),
    "the validation loss is flat too": (flat(), {"val": PRIOR + 0.01 * np.sin(t(1500))}, 300),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_gets_no_finding_at_any_row(case):
    losses, how = HEALTHY[case]
    assert alarms(LossPlateau(), losses, **how) == []


@pytest.mark.parametrize("case", SICK)
def test_a_standstill_is_found_in_time(case):
    losses, how, by = SICK[case]
    assert alarms(LossPlateau(), losses, **how)[0] <= by


@pytest.mark.parametrize("scale", [1e-7, 1e6])
@pytest.mark.parametrize("case", [*HEALTHY, *SICK])
def test_multiplying_the_loss_changes_no_verdict(case, scale):
    losses, how = HEALTHY.get(case, SICK.get(case, ())[:2])
    how = {**how, "val": scale * how["val"]} if "val" in how else how
    assert alarms(LossPlateau(), scale * losses, **how) == alarms(LossPlateau(), losses, **how)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_noise_does_not_make_a_slow_fall_a_standstill(noise, seed):
    losses = noisy(PRIOR * 0.98 ** (t(1500) / 200), noise, seed)
    assert alarms(LossPlateau(), losses) == []


@pytest.mark.parametrize("seed", range(10))
def test_noise_does_not_hide_a_standstill_for_long(seed):
    assert alarms(LossPlateau(), noisy(flat(4000), 0.1, seed))[0] <= 2500


def test_once_found_a_standstill_stays_found():
    found = alarms(LossPlateau(), noisy(flat(3000), 0.02))
    assert len(found) >= 0.95 * len([row for row in rows_of(flat(3000)) if row.step >= found[0]])


def test_a_run_that_begins_to_learn_late_is_no_longer_found():
    losses = np.concatenate([flat(1000), falling(1500)])
    found = alarms(LossPlateau(), losses)
    assert found[0] <= 300
    assert found[-1] < 1300


def test_a_long_thinned_run_that_converged_early_is_well():
    history = History()
    losses = noisy(1.8 + 0.5 * np.exp(-t(100_000) / 50), 0.02)
    for row in rows_of(losses, interval=500):
        history.append(row)
    assert len(history.losses) < 10_000
    assert LossPlateau().judge(history) == []


def test_a_long_thinned_run_that_never_learnt_is_found():
    history = History()
    for row in rows_of(noisy(flat(100_000), 0.02), interval=500):
        history.append(row)
    assert LossPlateau().judge(history)


def test_layers_healthy_or_never_run_change_no_verdict():
    history = History()
    history.add_points(stack(5))
    history.layer_axis.merge(["fc0", "unused"])
    for row in rows_of(flat(400)):
        history.append(Row(row.step, {"delta_norm": np.ones(3)}, row.scalars, losses=row.losses))
    assert [found.cause for found in LossPlateau().judge(history)] == ["unknown"]


def with_standstill(history):
    last = history.rows[-1]
    made = History()
    made.add_points(history.points)
    made.append(Row(399, last.values, losses=flat(400)))
    return made


def test_a_vanishing_gradient_is_the_cause_where_there_is_one():
    history = with_standstill(measured(stack(5), "delta_norm", np.logspace(-9, 0, 5)))
    assert LossPlateau().judge(history)[0].cause == "vanishing_gradient"


@pytest.mark.parametrize(("share", "cause"), [(0.95, "dead_units"), (0.6, "unknown")])
def test_dead_units_are_the_cause_where_they_are_an_alarm(share, cause):
    history = with_standstill(measured(stack(2, "relu"), "dead_fraction", [math.nan, share, math.nan]))
    assert LossPlateau().judge(history)[0].cause == cause


def test_the_evidence_is_the_progress_in_the_stretch():
    history = History()
    history.append(Row(399, losses=2.0 - 1e-5 * t(400)))
    (found,) = LossPlateau().judge(history)
    assert found.evidence["steps"] == 200
    assert found.evidence["progress"] == pytest.approx(200 * 1e-5 / 2.0, rel=0.01)
    assert found.evidence["loss"] == pytest.approx(1.997, abs=1e-4)


@pytest.mark.parametrize(("progress", "count"), [(0.0095, 1), (0.0105, 0)])
def test_the_limit_of_progress_is_met_from_both_sides(progress, count):
    history = History()
    history.append(Row(399, losses=2.0 * (1 - progress) ** (t(400) / 200)))
    assert len(LossPlateau().judge(history)) == count


@pytest.mark.parametrize(("learnt", "count"), [(0.045, 1), (0.055, 0)])
def test_the_limit_of_what_is_learnt_is_met_from_both_sides(learnt, count):
    history = History()
    history.append(Row(399, losses=np.where(t(400) < 30, 2.0, 2.0 * (1 - learnt))))
    assert len(LossPlateau().judge(history)) == count


def test_a_shorter_window_finds_it_sooner():
    assert alarms(LossPlateau(window=64), flat())[0] == 100


def test_an_empty_history_has_no_finding():
    assert LossPlateau().judge(History()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("window", 31), ("min_progress", 0), ("min_progress", 1), ("min_learnt", 1)]
)
def test_a_limit_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*in .*, got {value}"):
        LossPlateau(**{name: value})


def severities(losses, **how):
    history, found = History(), []
    for row in rows_of(losses, **how):
        history.append(row)
        found += [finding.severity.value for finding in LossPlateau().judge(history)]
    return set(found)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (flat(600), {"warning"}),
        (flat(600) + 0.015 * np.exp(-t(600) / 30), {"warning"}),  # 0.7 % are gone
        (flat(600) + 0.08 * np.exp(-t(600) / 30), {"info"}),  # 3.4 % are gone
        (flat(600) + 0.3 * np.exp(-t(600) / 30), set()),  # 12 % are gone
    ],
)
def test_a_loss_that_has_clearly_moved_before_it_stood_is_an_info(losses, expected):
    assert severities(losses) == expected


LINE = {
    "loss_line": 1.0,
    "line_gain_tenth": 0.0,
    "line_gain_1x": 0.0,
    "line_gain_own": 0.02,
    "line_gain_other": 0.0,
    "line_gain_far": 0.0,
    "gradient_agreement": 0.3,
}


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        ({}, "no_signal_in_data"),
        ({"line_gain_far": 0.011}, "learning_rate_too_small"),
        ({"line_gain_far": 0.009}, "no_signal_in_data"),
        ({"line_gain_far": 0.002, "gradient_agreement": 3.1}, "learning_rate_too_small"),
        ({"line_gain_far": 0.0009, "gradient_agreement": 3.1}, "unknown"),
        ({"line_gain_1x": -0.011}, "learning_rate_too_large"),
        ({"line_gain_1x": -0.009}, "no_signal_in_data"),
        ({"line_gain_1x": -0.011, "line_gain_tenth": -0.02}, "no_signal_in_data"),
        ({"gradient_agreement": 3.1}, "unknown"),
        ({"gradient_agreement": 2.9}, "no_signal_in_data"),
        ({"gradient_agreement": 1.6, "line_gain_other": 0.02}, "unknown"),
        ({"gradient_agreement": math.nan, "line_gain_far": math.nan}, "unknown"),
    ],
)
def test_the_loss_line_tells_the_cause(numbers, cause):
    history = History()
    scalars = {name: value for name, value in {**LINE, **numbers}.items() if not math.isnan(value)}
    history.append(Row(399, scalars=scalars, losses=flat(400)))
    assert [found.cause for found in LossPlateau().judge(history)] == [cause]


@pytest.mark.parametrize(("peak", "cause"), [(PRIOR * 1.4, "unknown"), (PRIOR * 1.6, "learning_rate_too_large")])
def test_a_loss_that_was_driven_above_its_start_had_too_large_steps(peak, cause):
    history = History()
    history.append(Row(399, losses=put(flat(400), slice(2, 6), peak)))
    assert [found.cause for found in LossPlateau().judge(history)] == [cause]


def with_ratio(ratio, losses):
    history = History()
    history.layer_axis.merge(["fc"])
    history.append(Row(len(losses) - 1, {"update_ratio": np.array([ratio])}, losses=losses))
    return history


@pytest.mark.parametrize(("ratio", "causes"), [(1e-8, ["learning_rate_too_small"]), (4e-6, ["unknown"]), (6e-6, [])])
def test_weights_that_hardly_move_stand_still_in_any_noise(ratio, causes):
    found = LossPlateau().judge(with_ratio(ratio, noisy(flat(400), 0.4)))
    assert [finding.cause for finding in found] == causes


def memorised(steps=700, pace=0.02):
    """A random start that falls to the prior, and then a little more with every epoch, in noise."""
    return noisy((PRIOR + 0.5 * np.exp(-t(steps) / 10)) * (1 - pace) ** (t(steps) / 200), 0.03)


UNPAIRED = {**LINE, "line_shuffled": 0.04, "line_shuffled_z": 3.0, "pairing_agreement": 0.5}


def judged(losses, numbers):
    history = History()
    known = {name: value for name, value in numbers.items() if not math.isnan(value)}
    for row in rows_of(losses, **known):
        history.append(row)
    return [(found.cause, found.severity.value) for found in LossPlateau().judge(history)]


@pytest.mark.parametrize(
    ("numbers", "is_found"),
    [
        ({}, True),
        ({"pairing_agreement": 2.4}, True),
        ({"pairing_agreement": 2.6}, False),
        ({"line_shuffled": 0.14}, True),
        ({"line_shuffled": 0.16}, False),
        ({"gradient_agreement": 2.9}, True),
        ({"gradient_agreement": 3.1}, False),
        ({"line_gain_far": 0.2}, True),  # an optimizer with a memory
        ({"pairing_agreement": math.nan, "line_shuffled": math.nan}, False),
    ],
)
def test_learning_by_heart_is_no_signal_where_the_measurement_says_so(numbers, is_found):
    expected = [("no_signal_in_data", "warning")] if is_found else []
    assert judged(memorised(), {**UNPAIRED, **numbers}) == expected


def test_a_suspicion_by_itself_is_no_finding():
    assert judged(memorised(), {}) == []


@pytest.mark.parametrize("numbers", [{"pairing_agreement": 3.1}, {"pairing_agreement": 8.0, "line_shuffled": 0.0}])
def test_a_standstill_on_targets_that_follow_from_the_inputs_has_another_cause(numbers):
    assert judged(flat(400), {**UNPAIRED, **numbers}) == [("unknown", "warning")]


def test_a_small_fall_to_the_prior_is_a_warning_where_targets_were_found_unpaired():
    losses = flat(600) + 0.08 * np.exp(-t(600) / 30)
    assert judged(losses, LINE) == [("no_signal_in_data", "info")]
    assert judged(losses, UNPAIRED) == [("no_signal_in_data", "warning")]


@pytest.mark.parametrize(
    ("losses", "is_suspicious"),
    [
        (memorised(), True),
        (memorised(299), False),
        (noisy(PRIOR * 0.96 ** (t(700) / 200), 0.03), True),
        (noisy(PRIOR * 0.93 ** (t(700) / 200), 0.03), False),
        (noisy(PRIOR * 1.07 ** (t(700) / 200), 0.03), False),
        (noisy(PRIOR * (0.55 + 0.45 * np.exp(-t(700) / 10)), 0.03), True),
        (noisy(PRIOR * (0.35 + 0.65 * np.exp(-t(700) / 10)), 0.03), False),
        (memorised() - 2.0, False),  # of both signs
        (np.full(700, math.nan), False),
    ],
)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
def test_a_run_that_hardly_falls_and_keeps_half_of_its_loss_is_suspicious(losses, is_suspicious, scale):
    history = History()
    for row in rows_of(scale * losses):
        history.append(row)
    assert LossPlateau().suspects(history) == is_suspicious


@pytest.mark.parametrize(
    ("constant", "learnt", "expected"),
    [
        (1e5, 2.0, {"info"}),  # of the loss 0.002 %, and twenty times its noise
        (1e5, 0.1, {"warning"}),  # no more than noise
    ],
)
def test_beside_a_large_constant_what_was_learnt_counts_by_the_noise(constant, learnt, expected):
    rng = np.random.default_rng(0)
    losses = constant + 2.3 - learnt * (1 - np.exp(-np.arange(600) / 20)) + 0.1 * rng.standard_normal(600)
    assert severities(losses) == expected


@pytest.mark.parametrize(
    ("numbers", "decay", "cause"),
    [
        ({"gradient_agreement": 3.1}, 0.5, "vanishing_gradient"),
        ({"gradient_agreement": 3.1}, 1.0, "unknown"),
        ({}, 0.5, "vanishing_gradient"),
        ({}, 1.0, "no_signal_in_data"),
        (None, 0.5, "unknown"),  # the loss line is asked first
    ],
)
def test_a_memory_that_is_too_short_is_the_cause_where_nothing_else_is_left(numbers, decay, cause):
    history = History()
    history.add_points([Point("rnn", "rnn")])
    scalars = {} if numbers is None else {**LINE, **numbers}
    calls = {"rnn": decay ** np.arange(20.0)[::-1]}
    history.append(Row(399, scalars=scalars, losses=flat(400), calls=calls))
    assert [found.cause for found in LossPlateau().judge(history)] == [cause]
