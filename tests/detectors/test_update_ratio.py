import math

import numpy as np
import pytest

from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import is_due, measured_too, verdict

nan, inf = math.nan, math.inf
SMALL, LARGE = "learning_rate_too_small", "learning_rate_too_large"
PLAIN = {"lr": 1e-3, "lr_scheduled": 0.0, "planned_steps": 1000.0, "optimizers": 1.0}


def run(ratios, losses=None, interval=50, scale=1.0, weights=1.0, grads=1e-3, **scalars):
    """A run whose `ratios` give, step by step or for all steps, the update ratio of each of its layers."""
    history = History()
    steps = len(losses) if losses is not None else 3
    by_step = [ratios] * steps if np.ndim(ratios) == 1 else ratios
    width = len(by_step[0])
    history.layer_axis.merge([f"fc{i}" for i in range(width)])
    last = -1
    for step in range(steps):
        if not is_due(step, interval):
            continue
        facts = {**PLAIN, **{name: value[step] if np.ndim(value) else value for name, value in scalars.items()}}
        known = scale * np.array([2.3] * (step - last) if losses is None else losses[last + 1 : step + 1], dtype=float)
        ratio, norm = np.array(by_step[step], dtype=float), weights * np.ones(width)
        values = {"update_ratio": ratio, "weight_norm": norm, "update_norm": ratio * norm}
        values["grad_norm"] = scale * grads * np.ones(width)
        history.append(Row(step, values, {**facts, "loss": float(known.mean())}, losses=known))
        last = step
    return history


def judge(*args, limits=None, **kwargs):
    return verdict(UpdateRatio(**(limits or {})).judge(run(*args, **kwargs)))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([9e-6, 1e-7], [("warning", SMALL, ("fc1", "fc0"))]),
        ([1.1e-5, 1e-7], []),
        ([0.0, 0.0], [("warning", SMALL, ("fc0", "fc1"))]),
        ([9e-6, nan], [("warning", SMALL, ("fc0",))]),
        ([nan, nan], []),
    ],
)
def test_the_layer_that_moves_most_tells_whether_anything_can_be_learnt(ratios, expected):
    assert judge(ratios) == expected


def test_the_reach_is_the_largest_step_times_the_planned_steps():
    (finding,) = UpdateRatio().judge(run([[2e-6, 1e-7], [4e-6, 1e-7], [3e-6, 1e-7]]))
    assert finding.evidence == {"update_ratio": 4e-6, "reach": pytest.approx(4e-3), "planned_steps": 1000.0}


@pytest.mark.parametrize(
    ("planned", "found"), [(49.0, False), (50.0, True), (999.0, True), (1001.0, False), (nan, False)]
)
def test_a_small_step_may_be_enough_for_a_long_run(planned, found):
    assert bool(judge([1e-5, 1e-6], planned_steps=planned)) == found


def test_an_endless_run_is_judged_as_a_long_one():
    assert bool(judge([0.9e-7, 1e-9], planned_steps=nan))
    assert not judge([1.1e-7, 1e-9], planned_steps=nan)


def test_it_takes_three_samples():
    assert not judge([1e-7], losses=[2.3] * 2)
    assert judge([1e-7], losses=[2.3] * 3)


@pytest.mark.parametrize(("grads", "found"), [(0.1, True), (30.0, False)])
def test_a_gradient_that_promises_much_is_believed(grads, found):
    # 1e-6 a step and layer * gradient * 1000 steps / 2.3
    assert bool(judge([1e-6, 1e-6], grads=grads, weights=10.0)) == found


def test_a_layer_that_was_zero_at_first_has_no_ratio():
    history = History()
    history.layer_axis.merge(["head", "fc"])
    for step in range(3):
        values = {"update_ratio": np.array([5.0, 1e-7]), "weight_norm": np.array([1e-4 * step, 1.0])}
        history.append(Row(step, values, PLAIN, losses=np.array([2.3])))
    assert verdict(UpdateRatio().judge(history)) == [("warning", SMALL, ("fc",))]


def test_a_run_whose_steps_were_large_before_has_converged():
    ratios = [[1e-3, 1e-3]] * 100 + [[1e-9, 1e-9]] * 101
    assert not judge(ratios, losses=[2.3] * 201)


def test_warm_up_from_zero_is_left_alone_and_the_tail_of_a_schedule_too():
    rates = np.concatenate([np.linspace(0, 1e-3, 201), np.linspace(1e-3, 0, 200)])
    assert not judge([[0.0]] * 201, losses=[2.3] * 201, lr=rates, lr_scheduled=1.0)
    assert not judge([[0.0]] * 201, losses=[2.3] * 201, lr=rates)  # a schedule of the user's own
    assert not judge([[0.0]] * 401, losses=[2.3] * 401, lr=rates, lr_scheduled=1.0)


def test_a_schedule_is_judged_when_its_rate_has_stopped_to_rise():
    rates = np.concatenate([np.linspace(0, 1e-9, 31), np.full(70, 1e-9)])
    assert not judge([1e-8], losses=[2.3] * 33, lr=rates, lr_scheduled=1.0)
    assert not judge([1e-8], losses=[2.3] * 101, lr=rates, lr_scheduled=1.0, planned_steps=201.0)  # it may rise again
    assert judge([1e-8], losses=[2.3] * 101, lr=rates, lr_scheduled=1.0, planned_steps=199.0)
    falling = np.concatenate([rates[:60], np.full(41, 0.9e-9)])
    assert judge([1e-8], losses=[2.3] * 101, lr=falling, lr_scheduled=1.0, planned_steps=1000.0)


def test_a_warm_up_by_epochs_has_two_of_them_to_begin():
    rates = np.repeat([1e-12, 1e-11, 1e-10, 1e-3], 60)
    for end in (51, 101, 151):
        ratios = [[float(rate), float(rate)] for rate in rates[:end]]
        told = judge(ratios, [2.3] * end, lr=rates[:end], lr_scheduled=1.0, steps_per_epoch=60.0, interval=10)
        assert told == []
    assert judge([1e-8], [2.3] * 119, lr=1e-9, lr_scheduled=1.0, steps_per_epoch=60.0, interval=10) == []
    assert judge([1e-8], [2.3] * 121, lr=1e-9, lr_scheduled=1.0, steps_per_epoch=60.0, interval=10)


def test_inputs_of_another_size_make_any_step_too_large():
    history = run([[3.0, 3.0]] * 5, [1.0, 5.0, 9.0, 9.0, 9.0])
    assert [finding.cause for finding in UpdateRatio().judge(history)] == [LARGE]
    history.add_features(2)
    history = measured_too(history, *[{}] * (len(history) - 1), {"input_rms": [1.0, 255.0]})
    (finding,) = UpdateRatio().judge(history)
    assert (finding.cause, finding.evidence["feature_1"]) == ("unscaled_inputs", 255.0)


def test_clipping_that_leaves_next_to_nothing_is_told():
    (finding,) = UpdateRatio().judge(run([1e-7], clip_factor=1e-5))
    assert finding.evidence["clip_factor"] == 1e-5
    (finding,) = UpdateRatio().judge(run([1e-7], clip_factor=0.5))
    assert "clip_factor" not in finding.evidence


@pytest.mark.parametrize(
    ("ratios", "losses", "expected"),
    [
        ([3.0, 4.0, 5.0], [2.3, 900, 400], True),
        ([3.0, 4.0, 5.0], [2.3, 900, 6], False),  # it comes back
        ([1.5, 1.5, 1.5], [2.3, 900, 400], False),  # nearly all healthy ones come back in two steps more
        ([1.5, 1.5, 1.5], [2.3, 900, 400, 300, 200], True),
        ([1.5, 1.5, 1.5], [2.3, 900, 400, 300, 6], False),
        ([0.9, 0.9, 0.9], [2.3, 900, 400, 300, 200], False),
        ([9.0, 0.1, 0.1], [2.3, 900, 400, 300, 200], False),  # one layer among three
        ([9.0], [2.3, 900, 400, 300, 200], False),  # a linear model comes back from anywhere
        ([3.0, 3.0, 3.0], [2.3, 2.1, 1.8, 1.4, 1.0], False),
        ([3.0, 3.0, 3.0], [2.3, nan, nan, nan, nan], False),  # told as not finite
        ([3.0, 3.0, 3.0], [2.3, 900, 400, 300, 200] + [2.6] * 28, True),
        ([3.0, 3.0, 3.0], [2.3, 900, 400, 300, 200] + [2.4] * 28, False),
    ],
)
def test_steps_larger_than_the_weights_that_make_the_loss_worse(ratios, losses, expected):
    found = judge(ratios, losses=losses)
    order = tuple(f"fc{i}" for i in np.argsort(-np.array(ratios), kind="stable"))
    assert found == ([("warning", LARGE, order)] if expected else [])


@pytest.mark.parametrize(
    ("ratio", "norms", "losses", "expected"),
    [
        (0.5, [1.0, 1.0, 1.0, 3.5, 9.0], [900, 800], True),  # by 1.25 in each of two steps
        (0.5, [1.0, 1.0, 1.0, 2.5, 3.0], [900, 800], False),  # by 0.75
        (0.05, [1.0, 1.0, 1.0, 3.5, 9.0], [900, 800], False),  # so do weights that somebody else has set
        (0.5, [1.0, 1.0, 1.0, 3.5, 9.0], [6.8, 6.8], False),  # no harm was done
        (0.5, [1.0, 1.0, 1.0, 11.9, 12.0], [900, 800], False),  # steps of half their size can't do that
        (0.5, [0.0, 0.0, 0.0, 1.0, 9.0], [900, 800], False),  # what starts from zero has no scale
    ],
)
def test_weights_that_grow_between_the_samples_tell_of_steps_that_nobody_saw(ratio, norms, losses, expected):
    history = History()
    history.layer_axis.merge(["fc0", "fc1"])
    last = -1
    for step, norm in zip([0, 1, 2, 4, 8], norms, strict=True):
        values = {name: np.array([value] * 2) for name, value in (("update_ratio", ratio), ("weight_norm", norm))}
        known = np.full(step - last, losses[0] if step == 4 else losses[1] if step == 8 else 2.3)
        history.append(Row(step, values | {"update_norm": np.array([ratio] * 2)}, PLAIN, losses=known))
        last = step
    assert bool(UpdateRatio().judge(history)) == expected


def test_a_first_step_that_overwrites_is_remembered():
    ratios = [[9.0, 9.0], *[[0.01, 0.01]] * 32]
    assert judge(ratios, losses=[2.3, 900, 400, 300, 200] + [2.6] * 28)
    assert not judge(ratios, losses=[2.3, 900, 400, 300, 200] + [1.0] * 28)


@pytest.mark.parametrize(("steps", "found"), [(5, False), (9, True)])
def test_steps_that_fall_by_themselves_are_judged_later(steps, found):
    losses = ([2.3, 900] + [400] * 31)[:steps]
    assert bool(judge([9.0, 9.0], losses=losses, falling_updates=1.0)) is found
    assert judge([9.0, 9.0], losses=losses, falling_updates=0.0)


def test_several_optimizers_are_not_judged_by_their_losses():
    assert not judge([9.0, 9.0], losses=[2.3, 900, 400, 300, 200], optimizers=2.0)


SPIKE = [2.3] * 20 + [0.5] * 130


@pytest.mark.parametrize(
    ("ratio", "after", "found"), [(2.0, 2.3, True), (2.0, 0.6, False), (0.9, 2.3, False), (0.01, 2.3, False)]
)
def test_a_jump_later_on_is_found_one_interval_after_it(ratio, after, found):
    ratios = [[1e-3, 1e-3]] * 150 + [[ratio, ratio]] * 51
    assert bool(judge(ratios, losses=[*SPIKE, *[after] * 51])) == found


def test_a_jump_of_the_learning_rate_is_known_where_its_first_steps_were_not_sampled():
    ratios = [[1e-3, 1e-3]] * 160 + [[0.03, 0.03]] * 41
    rates = np.array([1e-3] * 160 + [0.1] * 41)
    assert judge(ratios, losses=[*SPIKE, *[0.5] * 10, *[2.3] * 41], lr=rates)
    assert not judge(ratios, losses=[*SPIKE, *[0.5] * 51], lr=rates)
    restarted = np.array([1e-3] * 50 + [1e-5] * 110 + [1e-3] * 41)
    assert not judge(ratios, losses=[*SPIKE, *[0.5] * 10, *[2.3] * 41], lr=restarted)


CASES = [
    {"ratios": [9e-6, 1e-7]},
    {"ratios": [1.1e-5, 1e-7]},
    {"ratios": [3.0, 4.0], "losses": [2.3, 900, 400]},
    {"ratios": [3.0, 4.0], "losses": [2.3, 2.1, 1.8]},
    {"ratios": [[1e-3, 1e-3]] * 150 + [[2.0, 2.0]] * 51, "losses": [*SPIKE, *[2.3] * 51]},
]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("case", CASES)
def test_multiplying_the_loss_changes_no_verdict(case, scale):
    assert judge(**case, scale=scale) == judge(**case)


@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_not_measured_change_no_verdict(case):
    history = run(**case)
    history.layer_axis.merge(["frozen"])
    assert verdict(UpdateRatio().judge(history)) == judge(**case)


def test_no_rows_and_rows_of_others_tell_nothing():
    assert UpdateRatio().judge(History()) == []
    history = History()
    history.append(Row(0, scalars=PLAIN))
    assert UpdateRatio().judge(history) == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_reach": -1e-9}, r"min_reach must be in \[0, 1\), got -1e-09"),
        ({"min_reach": 1}, r"min_reach must be in \[0, 1\), got 1"),
        ({"max_ratio": 0}, r"max_ratio must be in \(0, inf\), got 0"),
    ],
)
def test_a_limit_out_of_its_range_is_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        UpdateRatio(**limits)


def test_the_limits_are_used():
    assert not judge([9e-6, 1e-7], limits={"min_reach": 0.0})
    assert judge([0.9, 0.9], losses=[2.3, 900, 400], limits={"max_ratio": 0.4})


@pytest.mark.parametrize(
    ("gamma", "planned", "found"),
    [
        (0.3, 300.0, True),
        (0.99, 300.0, False),
        (0.3, 120.0, False),  # the tail of a run is meant to be slow
    ],
)
def test_a_schedule_that_is_over_before_the_run_has_begun(gamma, planned, found):
    rates = 1e-3 * gamma ** np.arange(101)
    ratios = [[float(rate), float(rate)] for rate in rates]
    told = judge(ratios, np.full(101, 2.3), interval=10, lr=rates, lr_scheduled=1.0, planned_steps=planned)
    assert told == ([("warning", SMALL, ("fc0", "fc1"))] if found else [])


def test_a_rate_that_rises_again_is_no_end():
    rates = np.where(np.arange(101) % 60 < 5, 1e-3, 1e-8)
    ratios = [[float(rate), float(rate)] for rate in rates]
    assert judge(ratios, np.full(101, 2.3), interval=10, lr=rates, lr_scheduled=1.0, planned_steps=300.0) == []


def together(growth=3.0, peak=0.1, end=2.3, start=2.3, last=50, jump=1.0, optimizers=1.0, gain=1.0, grads=1e-3):
    """A run whose first steps are the largest; its weights grow with them, and once by `jump` from outside."""
    history = History()
    history.layer_axis.merge(["fc0", "fc1", "fc2"])
    steps = [0, 1, 2, 4, 8, *range(10, last + 1, 10)]
    for i, (step, gap) in enumerate(zip(steps, np.diff(steps, prepend=-1), strict=True)):
        norm = (1 + (growth - 1) * step / steps[-1]) * (jump if step > 2 else 1.0) * np.ones(3)
        ratio = np.array([peak, peak, nan]) if i < 3 else np.full(3, 0.05 / jump)
        values = {"update_ratio": ratio, "weight_norm": norm, "update_norm": np.nan_to_num(ratio, nan=peak) * norm}
        values |= {"spectral_norm": gain * norm, "grad_norm": np.full(3, grads if step else 1.0)}
        scalars = {**PLAIN, "optimizers": optimizers, "loss": end}
        history.append(Row(step, values, scalars, losses=np.full(gap, end if step else start)))
    return history


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"growth": 2.9}, False),
        ({"peak": 0.09}, False),
        ({"last": 40}, False),
        ({"end": 2.08}, True),
        ({"end": 2.06}, False),  # more than a tenth is gone
        ({"start": -2.3, "end": -2.3}, True),
        ({"optimizers": 2.0}, False),
        ({"gain": 0.3}, False),  # weights that were too small have to grow
        ({"jump": 50.0, "growth": 1.5, "last": 60}, False),  # somebody else drew them anew
    ],
)
def test_steps_that_leave_nothing_of_the_first_weights_and_lead_nowhere(made, found):
    assert verdict(UpdateRatio().judge(together(**made))) == ([("warning", LARGE, ("fc0", "fc1"))] if found else [])


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"growth": 0.11}, False),
        ({"last": 40}, False),
        ({"end": 2.08}, True),
        ({"end": 2.06}, False),  # more than a tenth is gone
        ({"gain": 0.3}, False),
        ({"optimizers": 2.0}, False),
        ({"peak": 0.01}, True),  # whatever the steps
    ],
)
def test_weights_that_decay_to_nothing_and_learn_nothing(made, found):
    findings = UpdateRatio().judge(together(**{"growth": 0.09, **made}))
    assert verdict(findings) == ([("warning", "weight_decay", ("fc0", "fc1", "fc2"))] if found else [])


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"end": 1.16}, True),
        ({"end": 1.14}, False),  # half of it is gone
        ({"peak": 0.9}, False),  # no step was as large as the weights
        ({"growth": 2.9}, False),
        ({"last": 80}, False),  # too young to say that it stands
        ({"gain": 0.3}, False),
        ({"start": 1e5, "grads": 0.0}, True),  # wherever it came from: there is no way on
        ({"start": 1e5}, False),
        ({"start": 1e5, "grads": 0.0, "end": 0.0}, False),  # it is where it wants to be
        ({"start": 1e5, "grads": 0.0, "peak": 0.9}, False),
    ],
)
def test_a_loss_that_stands_after_steps_as_large_as_the_weights(made, found):
    history = together(**{"peak": 1.2, "end": 1.9, "last": 150, **made})
    assert verdict(UpdateRatio().judge(history)) == ([("warning", LARGE, ("fc0", "fc1"))] if found else [])


@pytest.mark.parametrize(
    ("made", "left", "found"),
    [
        ({}, 0.51, True),
        ({}, 0.49, False),
        ({"end": 0.1}, 0.51, True),  # whatever the loss has come down by
        ({"classes": nan}, 0.51, False),  # of squares half of it may be noise
        ({"peak": 0.09}, 0.51, False),
        ({"growth": 2.9}, 0.51, False),
        ({"last": 80}, 0.51, False),
        ({"gain": 0.3}, 0.51, False),
    ],
)
def test_a_run_that_knows_no_more_than_a_constant_and_stands_is_told_after_smaller_steps(made, left, found):
    made = dict(made)
    scores = {"score_classes": made.pop("classes", 10.0)}
    history, again = together(**{"peak": 0.2, "end": 1.9, "last": 150, **made}), History()
    again.layer_axis.merge(history.layers)
    again.add_points([Point(name, name) for name in history.layers])
    for i, row in enumerate(history.rows):
        again.append(
            Row(
                row.step,
                {**row.values, "delta_norm": np.full(3, left if i else 1.0)},
                {**row.scalars, **scores},
                losses=row.losses,
            )
        )
    assert bool(UpdateRatio().judge(again)) is found


def test_where_no_gradient_comes_no_rate_is_too_small():
    assert not judge([0.0, 0.0], grads=0.0)
    assert judge([0.0, 0.0], grads=1e-9)


@pytest.mark.parametrize(("norms", "found"), [(2, True), (0, False)])
def test_only_layers_with_a_matrix_tell_how_large_the_steps_are(norms, found):
    """Beside gains of 1 all steps are small."""
    history, made = together(), History()
    made.layer_axis.merge([*history.layers, "norm0", "norm1", "norm2", "norm3"])
    for row in history.rows:
        more = {name: [*values, *[0.01] * 4] for name, values in row.values.items()}
        more["spectral_norm"] = [*row.values["spectral_norm"], *[nan if norms else 0.01] * 4]
        values = {name: np.array(values) for name, values in more.items()}
        made.append(Row(row.step, values, row.scalars, losses=row.losses))
    assert bool(UpdateRatio().judge(made)) is found


def test_a_loss_that_still_falls_is_left_alone():
    history = together(peak=1.2, end=1.9, last=150)
    falling = History()
    falling.layer_axis.merge(history.layers)
    losses = np.concatenate([[2.3], np.linspace(2.05, 1.7, 150)])
    for i, row in enumerate(history.rows):
        last = history.rows[i - 1].step if i else -1
        falling.append(Row(row.step, row.values, row.scalars, losses=losses[last + 1 : row.step + 1]))
    assert UpdateRatio().judge(falling) == []


def test_the_largest_step_is_told_where_it_was_another_one():
    (finding,) = UpdateRatio().judge(together())
    assert finding.evidence["largest_step"] == 0.0
    ratios = [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1], [2.5, 2.5]]
    (now,) = UpdateRatio().judge(run(ratios, losses=[1.0, 1.0, 1.0, 5.0, 5.0], interval=1))
    assert now.evidence["update_ratio"] == 2.5
    assert "largest_step" not in now.evidence
