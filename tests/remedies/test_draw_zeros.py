"""Weights that are zero, drawn."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.draw_zeros import draw_zeros
from lightning_gradflow.remedies.plan import remedies_for
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.training import Training


def _zeros(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Adapter(nn.Module):
    """A frozen map and what is added to it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.zeros(16, 24), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.zeros(8, 24)), nn.Parameter(torch.zeros(16, 8))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x @ self.base.T + x @ self.down.T @ self.up.T + self.bias


def test_a_layer_that_has_a_textbook_initialisation_gets_it():
    net = nn.Sequential(_zeros(nn.Linear(64, 96)), nn.ReLU(), _zeros(nn.Linear(96, 96)), nn.Tanh())
    assert list(draw_zeros(net, ["0", "2"], {"0": ("", "relu"), "2": ("relu", "tanh")}, seed=0)) == ["0", "2"]
    assert net[0].weight.var().item() == pytest.approx(2 / 64, rel=0.1)
    torch.testing.assert_close(net[2].weight @ net[2].weight.T, torch.eye(96), atol=1e-5, rtol=0)


def test_of_an_adapter_one_factor_is_drawn_and_it_does_the_same_as_before():
    net = nn.Sequential(Adapter())
    x = torch.randn(5, 24)
    before = net(x)
    draw_zeros(net, ["0"], {}, seed=0)
    assert net[0].down.std().item() == pytest.approx(24**-0.5, rel=0.2)
    assert not net[0].base.any()
    assert torch.equal(net(x), before)
    net(x).sum().backward()
    assert net[0].up.grad.any()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_the_scale_of_a_norm_layer_becomes_one(norm):
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, 0.5)
    assert list(draw_zeros(nn.Sequential(norm), ["0"], {}, seed=0)) == ["0"]
    assert (norm.weight == 1).all()
    assert (norm.bias == 0.5).all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNNCell])
def test_a_recurrence_is_drawn_as_one(kind):
    net = nn.ModuleDict({"rnn": _zeros(kind(4, 8))})
    assert list(draw_zeros(net, ["rnn"], {}, seed=0)) == ["rnn"]
    assert all(p.any() for p in net.parameters() if p.dim() > 1)


def test_what_is_frozen_shared_or_not_zero_stays():
    net = nn.Sequential(_zeros(nn.Linear(4, 4)).requires_grad_(False), _zeros(nn.Linear(4, 4)), nn.Linear(4, 4))
    net.append(nn.Linear(4, 4))
    net[3].weight = net[1].weight
    before = copy.deepcopy(net.state_dict())
    assert draw_zeros(net, ["0", "1", "2", "3", "of another model"], {}, seed=0) == {}
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_same_seed_gives_the_same_weights():
    nets = [nn.Sequential(Adapter()) for _ in range(3)]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        draw_zeros(net, ["0"], {}, seed)
    assert torch.equal(nets[0][0].down, nets[1][0].down)
    assert not torch.equal(nets[0][0].down, nets[2][0].down)


# -- in a run


def _history():
    history = History()
    layers = ["0", "2", "4"]
    history.layer_axis.merge(layers)
    history.add_points(
        [Point("0", "0"), Point("1", "1", "tanh"), Point("2", "2"), Point("3", "3", "tanh"), Point("4", "4")]
    )
    values = {
        "zero_weights": np.array([np.nan, 1, 1]),
        "output_rms": np.array([1, 1, 0, 0, 0.0]),
        "delta_norm": np.array([0, 0, 0, 0, 0.3]),
    }
    for step in range(3):
        history.append(Row(step, values, {"lr": 0.1}))
    return history


@pytest.mark.parametrize("can_rehearse", [True, False])
def test_the_last_zeros_stay_and_so_does_what_is_not_zero(can_rehearse):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), _zeros(nn.Linear(32, 32)), nn.Tanh(), _zeros(nn.Linear(32, 3)))
    nn.init.normal_(net[0].weight, std=1e-4)  # far too small, and none of our business
    x = torch.randn(16, 24)
    before, first = net(x), net[0].weight.clone()

    @contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    optimizer = torch.optim.Adam(net.parameters())
    net(x).square().sum().backward()
    optimizer.step()
    nn.init.zeros_(net[4].bias)
    first = net[0].weight.detach().clone()
    finding = Finding(FindingKind.NO_GRADIENT, Severity.WARNING, 2, ("2", "4"), "initialisation")
    done = reinitialise(Training(net, [optimizer], _history(), rehearse if can_rehearse else None), finding)
    assert done is not None
    assert done.layers == ("2",)
    assert torch.equal(net[0].weight, first)
    assert torch.equal(net(x), before)
    assert net[2].weight not in optimizer.state
    assert net[0].weight in optimizer.state
    optimizer.zero_grad()
    (1 + net(x)).square().sum().backward()
    assert net[4].weight.grad.any()


def test_it_is_drawn_by_reinit_alone():
    assert remedies_for(FindingKind.NO_GRADIENT, "initialisation") == ("reinit",)
    assert remedies_for(FindingKind.NO_GRADIENT, "initialisation", has_learnt=True) == ("reinit",)
    assert remedies_for(FindingKind.NO_GRADIENT, "detached") == ()
