"""Steps in the coordinates of standardised targets, held against a network that is trained on these."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradflow.remedies.coordinates import Coordinates
from lightning_gradflow.remedies.output_scaling import OutputScaling, TargetScale

MEAN, DEVIATION = torch.tensor([300.0, -20.0]).double(), 50.0
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
LOSSES = {"squares": (F.mse_loss, 2), "absolute values": (F.l1_loss, 1)}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def on_raw(model):
    """The same network with outputs in the unit of the targets."""
    raw = copy.deepcopy(model)
    with torch.no_grad():
        raw[2].weight.mul_(DEVIATION)
        raw[2].bias.mul_(DEVIATION).add_(MEAN)
    return raw


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator).double()
    return x, torch.sin(x[:, :2]) + x[:, 1:]


def train(model, targets, error, optimizer, scaling=None, steps=30, clip=None):
    x, _ = data()
    for _ in range(steps):
        optimizer.zero_grad()
        error(model(x), targets).backward()
        if scaling is not None:
            scaling.before_step(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scaling is not None:
            scaling.batch_end()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_on_raw_targets_is_the_one_on_standardised_ones(name, loss, clip):
    error, power = LOSSES[loss]
    twin = net()
    raw, scaling = on_raw(twin), OutputScaling()
    scaling.start(raw, TargetScale("2", MEAN, DEVIATION, power))
    _, targets = data()
    train(twin, targets, error, OPTIMIZERS[name](twin.parameters()), clip=clip)
    train(raw, MEAN + DEVIATION * targets, error, OPTIMIZERS[name](raw.parameters()), scaling, clip=clip)
    for one, other in zip(on_raw(twin).parameters(), raw.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_between_steps_the_weights_are_those_for_the_raw_targets():
    raw, scaling = on_raw(net()), OutputScaling()
    scaling.start(raw, TargetScale("2", MEAN, DEVIATION, 2))
    before = [p.clone() for p in raw.parameters()]
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.0)
    x, targets = data()
    F.mse_loss(raw(x), targets).backward()
    scaling.before_step(optimizer)
    assert not torch.equal(raw[2].weight, before[2])
    optimizer.step()  # its hook takes them back
    torch.testing.assert_close([*raw.parameters()], before, rtol=1e-12, atol=1e-9)


def test_a_step_that_is_skipped_is_taken_back_and_a_release_ends_all():
    raw, scaling = on_raw(net()), OutputScaling()
    scaling.start(raw, TargetScale("2", MEAN, DEVIATION, 2))
    optimizer = torch.optim.SGD(raw.parameters(), lr=1.0)
    before = [p.clone() for p in raw.parameters()]
    for end in (scaling.batch_end, scaling.release):
        for p in raw.parameters():
            p.grad = torch.ones_like(p)
        scaling.attach(raw)
        scaling.before_step(optimizer)
        scaling.before_step(optimizer)  # twice is once
        end()
        torch.testing.assert_close([*raw.parameters()], before, rtol=1e-12, atol=1e-9)
    assert not optimizer._optimizer_step_post_hooks
    assert not raw[2]._forward_hooks
    assert not raw[2]._forward_pre_hooks


def test_what_does_not_come_through_the_layer_is_left_alone():
    raw, scaling = on_raw(net()), OutputScaling()
    scaling.start(raw, TargetScale("2", MEAN, DEVIATION, 2))
    other = nn.Linear(8, 3).double()
    hidden = raw[1](raw[0](data()[0]))
    (raw[2](hidden).sum() + other(hidden).sum()).backward()
    twin, plain = copy.deepcopy(raw), copy.deepcopy(other)
    twin.zero_grad()
    plain.zero_grad()
    hidden = twin[1](twin[0](data()[0]))
    (nn.functional.linear(hidden, twin[2].weight).sum() / DEVIATION**2 + plain(hidden).sum()).backward()
    torch.testing.assert_close(other.weight.grad, plain.weight.grad)
    torch.testing.assert_close(raw[0].weight.grad, twin[0].weight.grad)
    before = raw[2].weight.clone()
    scaling.before_step(torch.optim.SGD([*raw[0].parameters(), *other.parameters()], lr=1.0))
    assert torch.equal(raw[2].weight, before)


def test_a_forward_pass_within_a_step_takes_the_weights_back():
    raw, scaling = on_raw(net()), OutputScaling()
    scaling.start(raw, TargetScale("2", MEAN, DEVIATION, 2))
    x, _ = data()
    before = raw(x).detach()
    raw(x).sum().backward()
    scaling.before_step(torch.optim.SGD(raw.parameters(), lr=1.0))
    torch.testing.assert_close(raw(x).detach(), before)


def test_inputs_and_targets_of_one_layer_may_both_be_unscaled():
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(3, 2)).double()
    x, targets = data()
    scale, shift = torch.tensor([5.0, 100.0, 1.0]).double(), torch.tensor([0.0, 400.0, 3.0]).double()
    raw = copy.deepcopy(twin)
    with torch.no_grad():
        raw[0].weight.div_(scale)
        raw[0].bias.sub_(raw[0].weight @ shift)
        raw[0].weight.mul_(DEVIATION)
        raw[0].bias.mul_(DEVIATION).add_(MEAN)
    both = Coordinates()
    both.load_state_dict({"layers": {"0": {"scale": scale, "shift": shift}}, "outputs": {}})
    both.attach(raw)
    both.outputs.start(raw, TargetScale("0", MEAN, DEVIATION, 2))
    assert both.is_in_force
    optimizers = [OPTIMIZERS["adam"](model.parameters()) for model in (twin, raw)]
    for _ in range(20):
        for model, inputs, wanted, optimizer in zip(
            (twin, raw), (x, x * scale + shift), (targets, MEAN + DEVIATION * targets), optimizers, strict=True
        ):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), wanted).backward()
            if model is raw:
                both.before_step(optimizer)
            optimizer.step()
    torch.testing.assert_close(raw(x * scale + shift), MEAN + DEVIATION * twin(x), rtol=1e-8, atol=1e-6)


def test_its_state_goes_on_in_another_process():
    raw, scaling = on_raw(net()), Coordinates()
    scaling.outputs.start(raw, TargetScale("2", MEAN, DEVIATION, 2))
    again = Coordinates()
    again.load_state_dict(scaling.state_dict())
    again.attach(raw)
    assert again.outputs.layer == "2"
    assert again.state_dict() == scaling.state_dict()
    again.load_state_dict({"layers": {}})  # of a checkpoint from before there was any
    assert not again.is_in_force
