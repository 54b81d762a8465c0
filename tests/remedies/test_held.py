"""The remedies that stay in force, together."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_gradflow.history import History
from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.training import Training


def _made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, Training(net, [optimizer], History())


def _all_in_force(held, training):
    held.centre({"0": Centre(torch.tensor([1.0, 2.0, 3.0]), 0.5)})
    held.rate.factor = 0.25
    held.start_clipping(training)


def _step(net, optimizer, held, seed=0, size=1.0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (size * net(x).square().mean()).backward()
    held.before_step(optimizer, None)
    optimizer.step()
    held.batch_end()


def _weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_with_nothing_in_force_a_step_is_the_plain_step():
    net, optimizer, training = _made()
    _step(net, optimizer, Held(training))
    plain, plain_optimizer, _ = _made()
    plain(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    plain_optimizer.step()
    assert torch.equal(_weights(net), _weights(plain))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_checkpoint_brings_back_all_that_is_in_force():
    net, optimizer, training = _made()
    held = Held(training)
    _all_in_force(held, training)
    held.rollbacks, held.slowest = 2, 0.01
    for seed in range(4):
        _step(net, optimizer, held, seed, size=10.0**seed)
    saved = _saved({"held": held.state_dict(), "net": net.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer, other_training = _made()
    other.load_state_dict(saved["net"])
    other_optimizer.load_state_dict(saved["optimizer"])
    resumed = Held(other_training)
    resumed.load_state_dict(saved["held"])
    assert (resumed.rollbacks, resumed.slowest) == (2, 0.01)
    for one, its, by in ((net, optimizer, held), (other, other_optimizer, resumed)):
        for seed in range(4, 8):
            _step(one, its, by, seed, size=10.0 ** (8 - seed))
    assert torch.equal(_weights(net), _weights(other))


def test_what_is_not_in_a_state_is_not_in_force_any_more():
    net, optimizer, training = _made()
    held = Held(training)
    nothing = held.state_dict()
    _all_in_force(held, training)
    _step(net, optimizer, held)
    held.load_state_dict(nothing)
    plain, plain_optimizer, plain_training = _made()
    plain.load_state_dict(net.state_dict())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(net, optimizer, held, 1)
    _step(plain, plain_optimizer, Held(plain_training), 1)
    assert torch.equal(_weights(net), _weights(plain))


def test_a_state_is_not_changed_by_what_comes_after_it():
    net, optimizer, training = _made()
    held = Held(training)
    _all_in_force(held, training)
    _step(net, optimizer, held)
    state = held.state_dict()
    before = repr(state)
    for seed in range(3):
        _step(net, optimizer, held, seed, size=100.0)
    held.rate.factor = 0.01
    assert repr(state) == before


def test_release_takes_all_hooks_off_and_may_be_repeated():
    net, optimizer, training = _made()
    held = Held(training)
    _all_in_force(held, training)
    _step(net, optimizer, held)
    for _ in range(2):
        held.release()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_never_came_leaves_nothing_behind():
    net, optimizer, training = _made()
    held = Held(training)
    _all_in_force(held, training)
    before = _weights(net)
    net(torch.ones(2, 3)).sum().backward()
    held.before_step(optimizer, None)
    assert not torch.equal(_weights(net), before)
    held.batch_end()
    torch.testing.assert_close(_weights(net), before, atol=1e-6, rtol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_norms_are_clipped_in_the_coordinates_that_the_layer_trains_in():
    net, optimizer, training = _made()
    held = Held(training)
    held.centre({"0": Centre(torch.zeros(3), 0.01)})
    held.start_clipping(training)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net[0].weight.grad[0, 0] = 1e6
    held.before_step(optimizer, None)
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert norm == pytest.approx(held.clipper.limits()[0], rel=1e-5)


def test_steps_are_smaller_by_the_factor():
    net, optimizer, training = _made()
    held = Held(training)
    held.rate.factor = 0.25
    start = _weights(net)
    _step(net, optimizer, held)
    plain, plain_optimizer, plain_training = _made()
    _step(plain, plain_optimizer, Held(plain_training))
    torch.testing.assert_close(_weights(net) - start, 0.25 * (_weights(plain) - start))


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_what_is_clipped_is_the_step_that_is_made_and_not_the_one_that_the_schedule_asks_for(factor):
    """A rate of 1 that is lowered makes the step of a rate that is as low."""
    ends = []
    for rate, held_factor in ((1.0, factor), (factor, 1.0)):
        net, optimizer, training = _made()
        optimizer.param_groups[0]["lr"] = rate
        held = Held(training)
        held.rate.factor = held_factor
        held.start_clipping(training)
        start = _weights(net)
        _step(net, optimizer, held, size=1e6)
        ends.append(_weights(net) - start)
        assert optimizer.param_groups[0]["lr"] == rate
    torch.testing.assert_close(*ends)
    assert ends[0].norm() > 1e-4 * _weights(net).norm()
