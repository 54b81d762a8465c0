"""The loop of a cure, on made-up histories: act, verify, keep or put back, pause, and try the next remedy."""

import io
import math
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies import treatments
from lightning_gradflow.remedies.plan import DESTRUCTIVE, REMEDIES
from lightning_gradflow.remedies.verdict import Trial, verdict
from tests.remedies.made_up_run import Run, finding, net

SICK = finding()
EXPLODES = finding(FindingKind.EXPLODING_GRADIENT, "unknown")  # clip, then rollback
BREAKS = finding(FindingKind.NONFINITE_GRADIENT, "unknown", Severity.CRITICAL)  # clip, then rollback
DRIFTS = finding(FindingKind.SATURATED_ACTIVATION, "drift")  # reinit, then rollback


def _ends(run, loss, *found, rows=5):
    """The rest of a trial of 20 steps, and what is decided at its end."""
    for _ in range(rows - 1):
        assert run.go(loss, *found) is None
    return run.go(loss, *found)


# -- whether to act


@pytest.mark.parametrize("severity", [Severity.WARNING, Severity.CRITICAL])
def test_an_alarm_is_treated(severity):
    run = Run()
    action = run.go(2.0, finding(severity=severity))
    assert (action.kind, action.outcome, action.step, action.decided_step) == ("reinit", "applied", 3, None)
    assert action.layers == ("0", "2")
    assert action.reason == "vanishing gradient, saturation"


def test_what_is_no_alarm_is_not_treated():
    run = Run()
    assert run.go(2.0, finding(severity=Severity.INFO)) is None
    assert torch.equal(run.weights(), Run().weights())


def test_the_most_severe_alarm_is_treated_first():
    run = Run()
    run.go(2.0, SICK, BREAKS)
    assert run.actions == [("clip", "applied")]


@pytest.mark.parametrize("cause", ["no_signal_in_data", "learning_rate_too_small", "underflow"])
def test_what_only_the_user_can_cure_is_not_treated(cause):
    assert Run().go(2.0, finding(cause=cause)) is None


def test_where_nothing_is_allowed_nothing_is_done():
    run = Run(allow=())
    for _ in range(8):
        assert run.go(2.0, SICK, EXPLODES, BREAKS, DRIFTS) is None
    assert torch.equal(run.weights(), Run().weights())


@pytest.mark.parametrize("remedy", REMEDIES)
def test_only_what_is_allowed_is_done(remedy):
    run = Run(allow=(remedy,))
    for _ in range(20):
        run.go(2.0, SICK, EXPLODES, BREAKS, DRIFTS)
    assert {kind for kind, _ in run.actions} <= {remedy}


def test_what_would_fit_and_may_not_be_used_is_told_with_the_finding():
    run = Run(allow=("scale_inputs",))
    run.go(2.0)
    assert run.mitigation.forbidden == ""
    run.go(2.0, EXPLODES)
    told = run.mitigation.forbidden
    assert told.startswith("exploding gradient was found")
    assert "clip or rollback would fit" in told
    run.go(2.0, SICK)
    assert run.mitigation.forbidden == told


def test_of_what_has_been_treated_nothing_is_called_forbidden():
    run = Run()
    run.go(2.0, SICK)
    assert run.mitigation.forbidden == ""


@pytest.mark.parametrize("most", [0, 1, 2])
def test_there_are_no_more_actions_than_the_maximum(most):
    run = Run(max_actions=most)
    for _ in range(40):
        run.go(2.0, SICK, EXPLODES, BREAKS, DRIFTS)
    assert len(run.actions) == most


@pytest.mark.parametrize(("progress", "acts"), [(0.7, True), (0.8, False), (math.nan, True)])
def test_late_in_a_run_no_weights_are_overwritten(progress, acts):
    action = Run(allow=tuple(DESTRUCTIVE)).go(2.0, SICK, progress=progress)
    assert (action is not None) == acts


def test_late_in_a_run_gradients_are_still_clipped():
    assert Run().go(2.0, EXPLODES, progress=0.99).kind == "clip"


def test_a_run_that_has_learnt_is_not_drawn_anew():
    run = Run(allow=("reinit",))
    run.learns()
    before = run.weights()
    assert run.go(0.2, SICK) is None
    assert torch.equal(run.weights(), before)


@pytest.mark.parametrize("found", [SICK, EXPLODES, DRIFTS], ids=lambda f: str(f.kind))
def test_a_run_that_has_learnt_goes_back_first(found):
    run = Run()
    run.learns()
    run.go(0.2, found)
    assert run.actions == [("rollback", "applied")]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(factor):
    def told(scale):
        run = Run(scale=scale)
        losses = [2.0] * 6 + [1.9, 5.0, 7.0] + [2.0] * 12
        for loss in losses:
            run.go(loss, SICK, DRIFTS)
        return [(a.kind, a.step, a.outcome, a.decided_step) for a in run.mitigation.actions]

    assert told(factor) == told(1.0)
    assert len(told(1.0)) > 1


# -- the trial


def test_a_remedy_is_kept_where_the_alarm_is_gone_and_the_loss_is_not_higher():
    run = Run()
    run.go(2.0, SICK)
    drawn = run.weights()
    action = _ends(run, 2.0)
    assert (action.outcome, action.step, action.decided_step) == ("kept", 3, 23)
    assert (action.before["loss"], action.after["loss"]) == (2.0, 2.0)
    assert torch.equal(run.weights(), drawn)


def test_a_remedy_is_kept_where_the_loss_has_fallen_though_the_alarm_stays():
    run = Run()
    run.go(2.0, SICK)
    assert _ends(run, 1.0, SICK).outcome == "kept"


def test_a_remedy_is_put_back_where_the_alarm_stays_and_the_loss_has_not_fallen():
    run = Run()
    run.go(2.0, SICK)
    assert _ends(run, 2.0, SICK).outcome == "rolled_back"


def test_a_remedy_is_put_back_where_the_alarm_is_gone_and_the_loss_is_higher():
    run = Run()
    run.go(2.0, SICK)
    assert _ends(run, 3.0).outcome == "rolled_back"


@pytest.mark.parametrize(("losses", "outcome"), [([2.0, 2.05, 2.1, 2.12, 2.15], "rolled_back"), ([2.15] * 5, "kept")])
def test_a_remedy_is_put_back_where_the_loss_goes_up_and_up(losses, outcome):
    """New weights may start a little higher than a constant does, and stay; what has got worse gets worse still."""
    run = Run()
    run.go(2.0, SICK)
    for loss in losses:
        action = run.go(loss)
    assert action.outcome == outcome


@pytest.mark.parametrize(("planned", "steps"), [(10, 16), (200, 20), (1000, 100), (1e6, 200), (math.nan, 50)])
def test_a_trial_lasts_a_tenth_of_the_run_within_limits(planned, steps):
    run = Run(planned=planned)
    run.go(2.0, SICK)
    assert run.go(1.0, steps=steps - 1) is None
    assert run.go(1.0, steps=1).outcome == "kept"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trial_whose_loss_is_not_finite_ends_at_once(loss):
    run = Run()
    run.go(2.0, SICK)
    assert run.go(loss, SICK).outcome == "rolled_back"


def test_a_trial_whose_gradient_is_not_finite_ends_at_once():
    run = Run()
    run.go(2.0, SICK)
    assert run.go(2.0, BREAKS).outcome == "rolled_back"


def test_a_trial_whose_loss_is_far_higher_ends_before_its_time():
    run = Run()
    run.go(2.0, SICK)
    assert run.go(19.0, SICK, steps=8) is None
    assert run.go(21.0, SICK, steps=8).outcome == "rolled_back"
    assert run.newest.decided_step == 19


def test_a_trial_goes_on_while_a_far_higher_loss_comes_down():
    run = Run()
    run.go(2.0, SICK)
    for loss in (80.0, 60.0, 40.0, 25.0):
        assert run.go(loss) is None


def test_a_row_that_was_measured_before_the_action_says_nothing_of_it():
    run = Run()
    run.go(2.0, SICK)
    assert run.mitigation.decide([BREAKS], run.history, math.nan) is None


# -- what is put back, and what stays


def _state(run):
    return [run.weights(), *(s["momentum_buffer"].clone() for s in run.optimizer.state.values())]


def test_what_was_drawn_anew_comes_back_to_the_bit():
    """To what it was just before, not to the start of the run."""
    run = Run()
    run.train()
    before = _state(run)
    run.go(2.0, SICK)
    assert not torch.equal(run.weights(), before[0])
    run.train()
    _ends(run, 2.0, SICK)
    assert all(map(torch.equal, _state(run), before))


@pytest.mark.parametrize("allow", [REMEDIES, ("clip",)])
def test_weights_that_are_not_finite_are_replaced_before_any_remedy_and_never_come_back(allow):
    run = Run(allow=allow)
    start = run.weights()
    with torch.no_grad():
        run.net[0].weight.fill_(math.nan)
    run.go(2.0, BREAKS, ratio=0.1)
    assert torch.equal(run.weights(), start)
    assert _ends(run, 2.0, BREAKS, rows=1).outcome == "rolled_back"
    assert torch.equal(run.weights(), start)


def test_nothing_goes_back_behind_what_has_helped():
    run = Run()
    run.go(2.0, SICK)
    run.train()
    assert _ends(run, 1.99).outcome == "kept"
    kept = run.weights()
    run.train()
    with torch.no_grad():
        run.net[0].weight.fill_(math.nan)
    while run.go(1.99, BREAKS, ratio=0.1) is None:
        pass
    assert run.newest.kind == "rollback"
    assert torch.equal(run.weights(), kept)


def test_a_run_that_learnt_nothing_but_went_on_for_a_while_goes_back_to_its_last_good_weights():
    """An accident, such as a bad batch, says nothing against what came before it."""
    run = Run(allow=("clip",))
    start = run.weights()
    for _ in range(8):
        run.go(2.0)
    run.train()
    good = run.weights()
    run.go(2.0)  # the weights are remembered
    run.train()
    run.go(2.0)  # and now they are known to be good
    with torch.no_grad():
        run.net[0].weight.fill_(math.nan)
    run.go(math.nan, BREAKS)
    assert torch.equal(run.weights(), good)
    assert not torch.equal(good, start)


@pytest.mark.parametrize(("evidence", "outcome"), [({}, "kept"), ({"output_growth": 9.0}, "rolled_back")])
def test_an_alarm_that_is_told_at_the_start_alone_proves_nothing_by_its_end(evidence, outcome):
    run = Run()
    run.go(2.0, replace(SICK, evidence=evidence))
    assert _ends(run, 2.0).outcome == outcome


@pytest.mark.parametrize(("end", "outcome"), [(2.0, "rolled_back"), (1.0, "kept")])
def test_a_plateau_is_over_when_the_loss_falls_and_not_when_nobody_speaks_of_it(end, outcome):
    run = Run()
    run.go(2.0, finding(FindingKind.LOSS_PLATEAU, "weight_scale"))
    assert _ends(run, end).outcome == outcome


def test_a_trial_of_a_plateau_goes_on_while_the_loss_falls():
    run = Run()
    run.go(2.0, finding(FindingKind.LOSS_PLATEAU, "weight_scale"))
    for loss in np.linspace(4.0, 2.1, 7):
        assert run.go(float(loss)) is None
    for loss in np.linspace(1.9, 1.0, 7):
        if (action := run.go(float(loss))) is not None:
            break
    assert action.outcome == "kept"
    assert action.decided_step > 3 + 20


@pytest.mark.parametrize(("before", "what"), [(1, "keep"), (40, "roll_back")])
def test_a_loss_that_is_known_from_one_batch_is_no_more_certain_than_a_batch_is(before, what):
    """Batches differ by 0.1; what is 0.2 above one of them may be where the loss stood."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(60)
    history = History()
    history.append(Row(before - 1, {}, {"planned_steps": 200.0}, losses=np.full(before, 0.8)))
    history.append(Row(before + 29, {}, {"planned_steps": 200.0}, losses=1.0 + noise[:30]))
    trial = Trial(0, "reinit", SICK, before - 1, 0.8, {})
    assert verdict(trial, [], history).what == what


@pytest.mark.parametrize(
    ("remedy", "then", "now", "end", "what"),
    [
        ("rollback", 0.5, 0.9, 1.0, "roll_back"),
        ("rollback", 0.5, 0.89, 1.0, "keep"),
        ("rollback", 0.51, 0.9, 1.0, "keep"),  # most were dead before
        ("rollback", math.nan, 0.9, 1.0, "keep"),
        ("rollback", math.nan, math.nan, 1.0, "keep"),
        ("rollback", 0.5, 0.9, 0.5, "keep"),  # it learns without them
        ("clip", 0.5, 0.9, 1.0, "keep"),
    ],
)
def test_a_rate_that_kills_the_units_that_it_was_to_save_is_still_too_large(remedy, then, now, end, what):
    history = History()
    history.add_points([Point("a", "a"), Point("a/relu", "a", "relu"), Point("b/relu", "b", "relu")])
    for step, share in ((9, 1.0), (10, then), (40, now)):
        dead = {"dead_fraction": np.array([math.nan, share, 0.2])}
        losses = np.linspace(1.0, end, 30) if step == 40 else np.ones(1)
        history.append(Row(step, dead, {"planned_steps": 200.0}, losses=losses))
    trial = Trial(0, remedy, SICK, 9, 2.0, {})
    assert verdict(trial, [], history).what == what


def test_a_run_that_stands_still_with_what_it_was_born_with_is_drawn_anew_though_it_learnt_a_little():
    run = Run(allow=("reinit",))
    for loss in np.linspace(2.0, 1.7, 12):
        run.go(loss)
    assert run.go(1.7, SICK) is None
    assert run.go(1.7, finding(FindingKind.LOSS_PLATEAU, "vanishing_gradient")) is None
    assert run.go(1.7, finding(FindingKind.LOSS_PLATEAU, "weight_scale")).kind == "reinit"


@pytest.mark.parametrize(("left", "starts_anew"), [(1.0, True), (0.6, True), (0.4, False)])
def test_a_run_with_weights_too_large_that_knows_no_more_than_a_constant_starts_anew(left, starts_anew):
    run = Run()
    start = run.net[4].weight.detach().clone()  # the finding is about the others
    run.go(60.0, decades=0.0, ratio=1e-3)  # with large steps the start would be kept for another reason
    for _ in range(12):
        run.train()
        assert run.go(2.6, decades=0.0, residual=left, ratio=1e-3) is None
    assert run.mitigation.state_dict()["learnt"]
    run.go(2.6, finding(FindingKind.LOSS_PLATEAU, "weight_scale"), decades=0.0, residual=left)
    assert run.newest.kind == "reinit"
    assert torch.equal(run.net[4].weight, start) == starts_anew


def test_a_run_whose_weights_unscaled_inputs_have_overwritten_starts_anew_on_scaled_ones():
    """Its loss has come down from an absurd start: that is nothing that could be lost."""
    x = 1000 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    run = _with_inputs(x)
    usual = run.net(x / x.std(0)).detach()
    run.history.add_features(4)
    for loss in (14.0, *[2.3] * 24):
        run.go(loss)
        with torch.no_grad():
            run.net[0].weight.mul_(1.2).add_(0.5)  # of one direction, as what is trained is
    assert run.mitigation.state_dict()["learnt"]
    run.go(2.3, finding(FindingKind.LOSS_PLATEAU, "unscaled_inputs"))
    assert run.actions == [("scale_inputs", "applied")]
    torch.testing.assert_close(run.net(x), usual, atol=0.05, rtol=0)


def test_an_alarm_that_is_told_at_the_start_alone_is_cured_where_the_loss_falls():
    run = Run()
    run.go(2.0, replace(SICK, evidence={"output_growth": 9.0}))
    assert _ends(run, 1.0).outcome == "kept"


def test_a_run_that_is_well_but_for_its_alarm_comes_back_to_where_it_was():
    """What was learnt since its last good sample is not lost."""
    run = Run(allow=("recycle",))
    run.learns()
    run.train()
    before = _state(run)
    done = treatments.Treatment(("0",))

    def spoils(patient):
        patient.training.model[0].weight.data.zero_()
        return done

    with mock.patch.dict(treatments._TREATMENTS, recycle=spoils):
        run.go(0.2, finding(FindingKind.DEAD_UNITS, "unknown"))
    assert not run.net[0].weight.any()
    run.train()
    _ends(run, 0.6, finding(FindingKind.DEAD_UNITS, "unknown"))
    assert run.newest.outcome == "rolled_back"
    assert all(map(torch.equal, _state(run), before))


def test_a_run_that_broke_goes_back_to_its_last_good_weights():
    run = Run()
    run.learns(40)
    run.train()
    good = run.weights()
    run.go(0.2)  # the weights are remembered
    run.train()
    run.go(0.2)  # and now they are known to be good, as the next sample is well too
    run.train()
    with torch.no_grad():
        run.net[0].weight.fill_(math.nan)
    run.go(math.nan, BREAKS)
    assert [outcome for _, outcome in run.actions] == ["applied"]
    assert torch.equal(run.weights(), good)


def _loses_it(run):
    for _ in range(4):
        assert run.go(2.0) is None


@pytest.mark.parametrize(("ratio", "factor"), [(0.1, 0.1), (0.04, 0.25)])
def test_a_young_run_whose_first_steps_were_too_large_starts_anew_with_smaller_ones(ratio, factor):
    run = Run()
    start = run.weights()
    for loss in np.linspace(2.0, 1.0, 6):
        run.go(loss, ratio=ratio)
        run.train()
    _loses_it(run)
    assert run.mitigation.state_dict()["learnt"]
    run.go(2.0, SICK)
    assert run.newest.kind == "rollback"
    assert run.newest.after["lr_factor"] == pytest.approx(factor)
    assert torch.equal(run.weights(), start)


@pytest.mark.parametrize(("rows", "ratio"), [(6, 0.015), (12, 0.1)])
def test_a_run_that_began_well_or_went_well_for_long_keeps_what_it_has_learnt(rows, ratio):
    run = Run()
    start = run.weights()
    for loss in np.linspace(2.0, 1.0, rows):
        run.go(loss, ratio=ratio)
        run.train()
    _loses_it(run)
    run.go(2.0, SICK)
    assert run.newest.kind == "rollback"
    assert not torch.equal(run.weights(), start)


def _parabola(rate):
    """Trials of a run whose rate is so many times too large."""

    def pace(factor, steps, _scaling):
        weight, losses = 1.0, []
        for _ in range(steps):
            losses.append(weight**2)
            weight -= factor * rate * weight
        return losses

    return pace


@pytest.mark.parametrize(
    ("left", "rate", "starts_anew"), [(0.9, 30.0, True), (0.4, 30.0, False), (0.9, None, False), (0.9, 0.5, False)]
)
def test_a_young_run_that_knows_no_more_than_a_constant_starts_anew_if_a_trial_finds_a_rate(left, rate, starts_anew):
    """Momentum may make large steps of small first ones."""
    run = Run()
    run.training = replace(run.training, pace=_parabola(rate) if rate else None)
    start = run.weights()
    for row, loss in enumerate(np.linspace(2.0, 1.0, 6)):
        run.go(loss, ratio=0.015, decades=0.0, residual=left if row else 1.0)
        run.train()
    _loses_it(run)
    run.go(2.0, _too_large(), decades=0.0, residual=left)
    assert run.newest.kind == "rollback"
    assert torch.equal(run.weights(), start) == starts_anew


UNSCALED = finding(FindingKind.SATURATED_ACTIVATION, "unscaled_inputs")


def _with_inputs(x):
    run = Run()

    @contextmanager
    def rehearse():
        yield run.net, lambda: run.net(x)

    run.training = replace(run.training, rehearse=rehearse)
    return run


def test_a_young_run_on_unscaled_inputs_starts_anew_on_scaled_ones():
    x = 1000 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    run = _with_inputs(x)
    usual = run.net(x / x.std(0)).detach()
    for loss in np.linspace(2.0, 1.0, 6):
        run.go(loss)
        run.train()
    _loses_it(run)
    assert run.mitigation.state_dict()["learnt"]
    run.go(2.0, UNSCALED)
    assert run.actions == [("scale_inputs", "applied")]
    assert run.held.scaling.layers == ("0",)
    torch.testing.assert_close(run.net(x), usual, atol=0.05, rtol=0)


def test_a_run_that_learnt_for_long_on_unscaled_inputs_goes_back_first():
    x = 1000 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    run = _with_inputs(x)
    run.learns()
    _loses_it(run)
    run.go(2.0, UNSCALED)
    assert run.actions == [("rollback", "applied")]


def test_clipping_that_helped_goes_on_and_is_not_started_again():
    run = Run()
    run.go(2.0, EXPLODES)
    _ends(run, 1.0)
    assert run.actions == [("clip", "kept")]
    assert run.held.clipper is not None
    for _ in range(10):
        run.go(1.0, finding(FindingKind.EXPLODING_GRADIENT, "weight_scale"))
    assert [kind for kind, _ in run.actions].count("clip") == 1


@pytest.mark.parametrize("trains", [True, False])
def test_the_limit_is_told_with_what_helped(trains):
    run = Run(allow=("clip",))
    run.go(2.0, EXPLODES)
    if trains:
        run.train()
    action = _ends(run, 1.0)
    assert action.after.get("clip_limit") == (run.held.clipper.limits()[0] if trains else None)


def test_clipping_that_did_not_help_ends():
    run = Run()
    run.go(2.0, EXPLODES)
    clipper = run.held.clipper
    _ends(run, 2.0, EXPLODES)
    assert run.held.clipper is None
    run.net[0].weight.grad = torch.full((4, 4), 1e9)
    clipper.before_step(run.optimizer)
    assert run.net[0].weight.grad.max() == 1e9


def test_a_way_back_that_did_not_help_leaves_the_rate_as_it_was_and_the_next_one_is_slower_still():
    run = Run(allow=("rollback",))
    factors = []
    for _ in range(3):
        while run.go(2.0, BREAKS, ratio=0.1) is None:
            pass
        factors.append(run.held.rate.factor)
        assert run.go(math.nan, BREAKS, ratio=0.1).outcome == "rolled_back"
        assert run.held.rate.factor == 1.0
    assert factors == pytest.approx([0.1, 0.01, 0.001])


def test_a_rate_that_helped_stays():
    run = Run(allow=("rollback",))
    run.go(2.0, BREAKS, ratio=0.1)
    assert _ends(run, 1.0).outcome == "kept"
    assert run.held.rate.factor == pytest.approx(0.1)


# -- the next remedy


def test_after_a_pause_of_half_a_trial_the_next_remedy_is_tried():
    run = Run()
    run.go(2.0, EXPLODES)
    _ends(run, 2.0, EXPLODES)
    assert run.actions == [("clip", "rolled_back")]
    assert run.go(2.0, EXPLODES, steps=9) is None
    assert run.go(2.0, EXPLODES, steps=1).kind == "rollback"


def test_a_remedy_is_not_tried_twice_for_the_same_kind():
    run = Run(allow=("reinit",))
    run.go(2.0, SICK)
    _ends(run, 2.0, SICK)
    for _ in range(20):
        assert run.go(2.0, SICK) is None
    assert run.go(2.0, finding(FindingKind.SATURATED_ACTIVATION, "weight_scale")).kind == "reinit"


@pytest.mark.parametrize(("cause", "acts"), [("saturation", False), ("weight_scale", True)])
def test_what_had_nothing_to_do_is_tried_again_for_another_cause(cause, acts):
    run = Run(allow=("reinit",))
    run.net.requires_grad_(False)
    assert run.go(2.0, finding(cause="saturation")) is None
    run.net.requires_grad_(True)
    assert (run.go(2.0, finding(cause=cause)) is not None) == acts


class _Bare(nn.Module):
    """Has weights, but no layer that could be drawn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def test_a_remedy_that_can_do_nothing_is_passed_over():
    run = Run(model=_Bare())
    run.go(2.0, DRIFTS)
    assert run.actions == [("rollback", "applied")]


def test_where_no_remedy_can_do_anything_nothing_has_changed():
    run = Run(allow=("reinit", "rollback"), model=_Bare())
    run.optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    run.optimizer.step()
    before = _state(run)
    assert run.go(2.0, SICK) is None
    assert run.actions == []
    assert all(map(torch.equal, _state(run), before))
    assert len(run.optimizer.state) == 1


def test_a_remedy_that_could_do_nothing_is_not_asked_again():
    run = Run(allow=("reinit",), model=_Bare())
    run.go(2.0, SICK)
    with mock.patch.dict(treatments._TREATMENTS, reinit=mock.Mock(side_effect=AssertionError("asked again"))):
        for _ in range(5):
            run.go(2.0, SICK)


def test_what_failed_half_way_can_be_undone():
    run = Run()
    run.train()
    before = _state(run)
    run.go(2.0, finding(FindingKind.UPDATE_RATIO, "learning_rate_too_large"), ratio=0.5)
    assert run.held.rate.factor < 1
    run.mitigation.undo(run.training)
    assert all(map(torch.equal, _state(run), before))
    assert run.held.rate.factor == 1
    assert run.actions == []


# -- from one fit to the next


def _resumed(run):
    """Another one that goes on with what a checkpoint holds."""
    file = io.BytesIO()
    torch.save(run.mitigation.state_dict(), file)
    file.seek(0)
    other = Run()
    other.history.load_state_dict(run.history.state_dict())
    other.step = run.step
    other.mitigation.end()
    other.mitigation.load_state_dict(torch.load(file, weights_only=True), run.mitigation.actions)
    other.mitigation.start(other.training)
    return other


def test_a_resumed_run_has_the_same_remedies_in_force():
    run = Run()
    run.go(2.0, EXPLODES)
    _ends(run, 1.0)
    for one in (run, other := _resumed(run)):
        with torch.no_grad():
            for mine, theirs in zip(one.net.parameters(), net().parameters(), strict=True):
                mine.copy_(theirs)
        one.optimizer.state.clear()
        for _ in range(3):
            one.train()
    assert other.actions == [("clip", "kept")]
    assert torch.equal(other.weights(), run.weights())
    plain = Run()
    for _ in range(3):
        plain.train()
    assert not torch.equal(plain.weights(), run.weights())


def test_a_resumed_run_pauses_and_knows_what_was_tried():
    run = Run(allow=("reinit",))
    run.go(2.0, SICK)
    _ends(run, 2.0, SICK)
    other = _resumed(run)
    for _ in range(10):
        action = other.go(2.0, SICK)
        assert action is None or action.kind != "reinit"


def test_a_resumed_run_that_had_learnt_is_not_drawn_anew():
    run = Run()
    run.learns()
    other = _resumed(run)
    other.go(0.2, SICK)
    assert other.actions == [("rollback", "applied")]
    assert other.newest.before["loss"] == pytest.approx(np.median(run.history.losses[-16:]))


@pytest.mark.parametrize(("loss", "outcome"), [(1.0, "kept"), (2.0, "rolled_back")])
def test_a_trial_that_a_stop_interrupts_goes_on_and_is_decided(loss, outcome):
    run = Run()
    run.go(2.0, SICK)
    for _ in range(2):
        run.go(loss, SICK)
    other = _resumed(run)
    action = _ends(other, loss, SICK, rows=3)
    assert (action.kind, action.outcome, action.step, action.decided_step) == ("reinit", outcome, 3, 23)


def test_a_rate_that_was_on_trial_at_a_stop_is_put_back_where_it_does_not_help():
    run = Run(allow=("rollback",))
    run.go(2.0, BREAKS, ratio=0.1)
    other = _resumed(run)
    assert other.held.rate.factor == pytest.approx(0.1)
    resumed = other.weights()
    other.train()
    assert other.go(math.nan, BREAKS).outcome == "rolled_back"
    assert other.held.rate.factor == 1.0
    assert torch.equal(other.weights(), resumed)  # there is nothing older


def test_a_fit_that_goes_on_from_before_a_trial_knows_nothing_of_it():
    run = Run()
    run.go(2.0)
    state = run.mitigation.state_dict()
    run.go(2.0, SICK)
    run.mitigation.end()
    run.mitigation.load_state_dict(state, [])
    run.mitigation.start(run.training)
    assert run.go(math.nan) is None
    assert run.go(2.0, EXPLODES).kind == "clip"


def test_after_the_end_nothing_acts():
    run = Run()
    run.go(2.0, BREAKS)
    run.mitigation.end()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    run.mitigation.before_step(run.optimizer)
    run.mitigation.batch_end()
    run.mitigation.end()


# -- where the harm was done


def _stands(run, ratio):
    """A run whose loss has fallen by a third in its first steps, and stands since; the last good weights are young."""
    run.train()
    run.go(3.0, ratio=ratio)
    for loss in np.linspace(2.2, 2.0, 12):
        run.train()
        run.go(loss, ratio=1e-3)


def _too_large(**evidence):
    return replace(finding(FindingKind.UPDATE_RATIO, "learning_rate_too_large"), evidence=evidence)


def test_a_run_goes_back_behind_the_step_that_did_the_harm():
    run, start = Run(), Run().weights()
    _stands(run, ratio=2.0)
    assert run.go(2.0, _too_large(update_ratio=2.0, largest_step=3.0), ratio=1e-3).kind == "rollback"
    assert torch.equal(run.weights(), start)


def test_weights_that_an_earlier_step_has_harmed_are_no_good_ones():
    run, start = Run(), Run().weights()
    run.train()
    run.go(3.0, ratio=2.0)
    run.train()
    run.go(2.0, ratio=1e-3)
    assert run.mitigation._ways.good_step == -1  # nothing was kept yet, and the loss has fallen by a third
    assert run.go(2.0, _too_large(update_ratio=2.0, largest_step=0.0), ratio=1e-3).kind == "rollback"
    assert torch.equal(run.weights(), start)


def test_without_that_step_a_run_that_learns_stays_where_it_is():
    run, start = Run(), Run().weights()
    _stands(run, ratio=2.0)
    before = run.weights()
    assert run.go(2.0, _too_large(update_ratio=2.0), ratio=1e-3).kind == "rollback"
    assert torch.equal(run.weights(), before)
    assert not torch.equal(before, start)


@pytest.mark.parametrize(
    ("start", "good", "acts"),
    [(5.0, 5.0, False), (0.5, 5.0, True), (5.0, 0.5, True), (2.4, 2.4, True), (2.6, 2.6, False)],
)
def test_to_go_back_is_no_way_out_where_the_gradient_vanished_then_as_well(start, good, acts):
    run, vanishing = Run(allow=("rollback",)), finding(cause="depth")
    for row in range(12):
        assert run.go(2.0, ratio=0.1, decades=good if row else start) is None
    assert run.mitigation._ways.good_step > 0
    assert (run.go(2.0, vanishing, ratio=0.1, decades=5.0) is not None) == acts


@pytest.mark.parametrize(
    ("then", "left", "starts_anew"),
    [(0.9, 1.0, True), (0.5, 0.6, True), (0.4, 1.0, False), (math.nan, 1.0, False), (0.9, 0.4, False)],
)
def test_a_run_whose_units_died_before_it_came_down_to_a_constant_starts_anew(then, left, starts_anew):
    run = Run(allow=("rollback",))
    start = run.weights()
    run.go(6.0, ratio=0.1, decades=0.0, dead=0.0)
    for _ in range(12):
        run.train()
        run.go(2.0, ratio=0.1, decades=0.0, residual=left, dead=then)
    assert run.mitigation.state_dict()["learnt"]
    died = finding(FindingKind.DEAD_UNITS, "learning_rate_too_large")
    assert run.go(2.0, died, ratio=0.1, decades=0.0, residual=left, dead=1.0).kind == "rollback"
    assert torch.equal(run.weights(), start) == starts_anew


@pytest.mark.parametrize(("then", "acts"), [(5.0, False), (0.5, True)])
def test_what_a_remedy_that_helped_left_is_a_start_of_its_own(then, acts):
    run, vanishing = Run(), finding(cause="depth")
    assert run.go(2.0, vanishing, decades=5.0).kind == "reinit"
    for _ in range(9):
        run.go(2.0, ratio=0.1, decades=then)
    assert run.actions == [("reinit", "kept")]
    assert (run.go(2.0, vanishing, ratio=0.1, decades=5.0) is not None) == acts


def test_of_small_first_steps_the_start_is_not_kept_for_ever():
    run, start = Run(), Run().weights()
    _stands(run, ratio=1e-3)
    run.go(2.0, _too_large(update_ratio=2.0, largest_step=3.0), ratio=1e-3)
    assert not torch.equal(run.weights(), start)
