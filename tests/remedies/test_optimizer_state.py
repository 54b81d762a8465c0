"""What an optimizer remembers, removed."""

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.optimizer_state import forget

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
}


def _stepped(make, steps=20):
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = make(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_a_new_optimizer(name):
    (weight, _), optimizer = _stepped(OPTIMIZERS[name])
    weight.data.fill_(1.0)
    forget([optimizer], [weight])
    weight.grad = torch.tensor([0.5, 0.5])
    optimizer.step()
    fresh = nn.Parameter(torch.ones(2))
    fresh.grad = torch.tensor([0.5, 0.5])
    OPTIMIZERS[name]([fresh]).step()
    assert torch.equal(weight, fresh)


def test_other_parameters_keep_their_state():
    (weight, other), optimizer = _stepped(OPTIMIZERS["adam"])
    forget([optimizer], [weight])
    assert list(optimizer.state) == [other]
    assert optimizer.state[other]["step"] == 20


def test_every_optimizer_that_knows_the_parameter_forgets_it():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizers = [torch.optim.Adam([weight]), torch.optim.SGD([weight], lr=0.1, momentum=0.9)]
    for optimizer in optimizers:
        optimizer.step()
    forget(optimizers, iter([weight]))
    assert not any(optimizer.state for optimizer in optimizers)


def test_a_stranger_is_passed_over():
    _, optimizer = _stepped(OPTIMIZERS["adam"])
    forget([optimizer], [nn.Parameter(torch.ones(1))])
    assert len(optimizer.state) == 2
