"""Batches that are not finite, left out of the weights and of the running statistics."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_gradflow.findings import FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.remedies.guard import StatisticsGuard
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.plan import REMEDIES
from lightning_gradflow.remedies.training import Training
from tests.remedies.made_up_run import Run, finding

BREAKS = finding(FindingKind.NONFINITE_GRADIENT, "forward")
RATE = finding(FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large")


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))


def _batch(seed, bad=math.nan, share=0.0):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
    x[: int(16 * share)] = bad
    return x


def _statistics(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


# -- running statistics


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_statistics_are_those_of_the_finite_batches_alone(bad):
    """To the bit, as if the other batches had not been."""
    net, twin = _net(), _net()
    guard = StatisticsGuard(net)
    for seed in range(6):
        net(_batch(seed, bad, share=0.25 * (seed in (0, 2, 3))))
        guard.batch_end()
        if seed not in (0, 2, 3):
            twin(_batch(seed))
    found, expected = _statistics(net), _statistics(twin)
    means = [name for name in found if "running" in name]
    assert len(means) == 4
    assert all(torch.equal(found[name], expected[name]) for name in means)


def test_without_a_guard_one_batch_spoils_them_for_ever():
    net = _net()
    for seed in range(6):
        net(_batch(seed, share=0.25 * (seed == 0)))
    assert net[1].running_mean.isnan().any()


def test_what_was_not_finite_before_does_not_hold_up_the_others():
    net, twin = _net(), _net()
    for one in (net, twin):
        one[3].running_var[0] = math.nan
    guard = StatisticsGuard(net)
    for seed in range(3):
        net(_batch(seed))
        guard.batch_end()
        twin(_batch(seed))
    found, expected = _statistics(net), _statistics(twin)
    assert all(torch.equal(found[n].nan_to_num(), expected[n].nan_to_num()) for n in found)


def test_statistics_of_several_types_are_put_back():
    net = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(3).double(), nn.BatchNorm1d(2, track_running_stats=False)])
    guard = StatisticsGuard(net)
    with torch.no_grad():
        net[0].running_mean.fill_(2.0)
        net[1].running_var.fill_(math.inf)
    guard.batch_end()
    assert net[0].running_mean.tolist() == [2.0, 2.0]
    assert net[1].running_var.tolist() == [1.0, 1.0, 1.0]


def test_after_a_layer_was_replaced_it_starts_from_what_is_there():
    net = _net()
    guard = StatisticsGuard(net)
    net[1].running_mean, net[1].running_var = torch.zeros(5), torch.ones(5)
    guard.batch_end()
    net[1].running_var[0] = math.nan
    guard.batch_end()
    assert net[1].running_var.tolist() == [1.0] * 5


def test_other_buffers_are_left_alone():
    net = _net()
    net.register_buffer("mask", torch.zeros(2))
    guard = StatisticsGuard(net)
    net.mask.fill_(-math.inf)
    guard.batch_end()
    assert net.mask.tolist() == [-math.inf] * 2


# -- while clipping is in force


def _held(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    held = Held(Training(net, [optimizer], History()))
    return held, optimizer


def _step(net, optimizer, held, x):
    optimizer.zero_grad()
    net(x).square().mean().backward()
    held.before_step(optimizer, None)
    optimizer.step()
    held.batch_end()


def test_a_batch_that_is_left_out_leaves_weights_and_statistics_finite_and_is_counted():
    net = _net()[:3]
    held, optimizer = _held(net)
    held.start_clipping(held._training)
    for seed in range(6):
        _step(net, optimizer, held, _batch(seed, share=0.25 * (seed in (2, 3))))
    assert all(t.isfinite().all() for t in net.state_dict().values())
    assert held.clipper.left_out() == (2, 6)
    assert held.clipper.left_out_share() == pytest.approx(2 / 6)


def test_the_count_and_the_guard_go_on_from_a_checkpoint():
    net = _net()[:3]
    held, optimizer = _held(net)
    held.start_clipping(held._training)
    _step(net, optimizer, held, _batch(0, share=0.25))
    state = copy.deepcopy(held.state_dict())
    other, other_optimizer = _held(net)
    other.load_state_dict(state)
    _step(net, other_optimizer, other, _batch(1, share=0.25))
    assert other.clipper.left_out() == (2, 2)
    assert net[1].running_mean.isfinite().all()


def test_a_state_from_before_steps_were_counted_is_read():
    held, _ = _held(_net())
    held.start_clipping(held._training)
    state = held.state_dict()
    for its in state["clipper"]["optimizers"]:
        del its["left_out"], its["steps"]
    held.load_state_dict(state)
    assert held.clipper.left_out() == (0, 0)


def test_after_its_release_statistics_are_what_the_batch_makes_of_them():
    net = _net()[:3]
    held, _ = _held(net)
    held.start_clipping(held._training)
    held.release()
    net(_batch(0, share=0.25))
    held.batch_end()
    assert net[1].running_mean.isnan().any()


# -- after a way back


def _broke(allow=REMEDIES, has_learnt=True):
    """A run that went well, or not, and whose weights a batch has destroyed."""
    run = Run(allow=allow)
    if has_learnt:
        run.learns()
    else:
        run.go(2.0)
    with torch.no_grad():
        run.net[0].weight.fill_(math.nan)
    run.go(math.nan, RATE, ratio=0.1)
    return run


def test_a_run_that_went_well_and_broke_goes_back_and_is_guarded_from_then_on():
    run = _broke()
    assert run.actions == [("rollback", "applied")]
    assert run.newest.reason.endswith("steps that are not finite are left out")
    assert run.held.clipper.limits() == (math.inf,)  # no step yet
    run.net[0].weight.grad = torch.full((4, 4), 1e9)
    run.mitigation.before_step(run.optimizer)
    # to twice what was usual: the rows have a norm in all, but none by layer, so it is the ceiling that holds
    assert run.net[0].weight.grad.abs().max() < 1.0
    run.net[0].weight.grad = torch.full((4, 4), math.nan)
    run.mitigation.before_step(run.optimizer)
    assert run.net[0].weight.grad.tolist() == [[0.0] * 4] * 4


@pytest.mark.parametrize(("allow", "has_learnt"), [(("rollback",), True), (REMEDIES, False)])
def test_without_leave_to_clip_or_a_good_past_it_only_goes_back(allow, has_learnt):
    run = _broke(allow, has_learnt)
    assert run.newest.kind == "rollback"
    assert run.held.clipper is None


def test_a_run_that_is_slowed_down_where_it_stands_is_not_clipped():
    """Nothing broke: only the rate is to blame."""
    run = Run()
    run.learns()
    run.go(0.2, finding(FindingKind.UPDATE_RATIO, "learning_rate_too_large"), ratio=0.1)
    assert run.newest.kind == "rollback"
    assert run.held.clipper is None


def _left_out(run, number=1):
    for _ in range(number):
        run.net(torch.ones(1, 4)).sum().backward()
        run.net[0].weight.grad.fill_(math.nan)
        run.mitigation.before_step(run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()


def test_a_batch_that_was_left_out_does_not_end_the_trial_and_calls_for_no_action():
    run = _broke()
    run.train()
    for steps in range(6):
        run.train()
        _left_out(run)
        run.go(0.2, BREAKS)
        if steps > 4:
            break
    assert run.actions == [("rollback", "kept")]
    assert run.newest.after["steps_left_out"] >= 1
    for _ in range(8):
        run.train()
        _left_out(run)
        assert run.go(0.2, BREAKS) is None
    assert len(run.actions) == 1


def test_a_single_loss_that_is_not_finite_does_not_end_the_trial():
    run = _broke()
    for loss in (0.2, 0.2, math.nan, 0.2, 0.2):
        run.go(loss, steps=1)
    assert run.actions == [("rollback", "applied")]


def test_where_most_steps_are_left_out_the_trial_has_failed():
    run = _broke()
    _left_out(run, 3)
    assert run.go(0.2, BREAKS).outcome == "rolled_back"


def test_what_was_found_although_nothing_was_left_out_ends_the_trial():
    run = _broke()
    run.train()
    assert run.go(0.2, BREAKS).outcome == "rolled_back"
