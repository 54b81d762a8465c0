"""Units that are made to differ."""

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.symmetry import break_symmetry


def _net():
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    return net


AROUND = {"0": ("", "relu"), "2": ("relu", "tanh"), "4": ("tanh", "")}


def test_the_layers_that_are_named_are_drawn_for_what_follows_them():
    net = _net()
    drawn = break_symmetry(net, ["0", "2"], AROUND, seed=3)
    assert list(drawn) == ["0", "2"]
    assert net[0].weight.var().item() == pytest.approx(2 / 16, rel=0.3)  # He et al. 2015
    torch.testing.assert_close(net[2].weight @ net[2].weight.T, torch.eye(24), atol=1e-5, rtol=0)
    assert (net[4].weight == 0.1).all()


def test_the_same_seed_gives_the_same_weights():
    nets = [_net() for _ in range(3)]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        break_symmetry(net, ["0", "2"], AROUND, seed)
    assert torch.equal(nets[0][2].weight, nets[1][2].weight)
    assert not torch.equal(nets[0][2].weight, nets[2][2].weight)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_a_recurrence_is_drawn_as_one(kind):
    part = kind(4, 8)
    for parameter in part.parameters():
        nn.init.constant_(parameter, 0.1)
    assert list(break_symmetry(nn.ModuleDict({"rnn": part}), ["rnn"], {}, seed=0)) == ["rnn"]
    assert all(p.std() > 0 for p in part.parameters() if p.ndim > 1)


def test_what_is_frozen_or_shared_or_unknown_is_left_as_it_is():
    net = _net()
    net[0].bias.requires_grad_(False)
    net[4].weight = nn.Parameter(torch.full((2, 24), 0.1))
    net.append(nn.Linear(24, 2))
    net[5].weight = net[4].weight
    assert break_symmetry(net, ["0", "4", "of another model"], AROUND, seed=0) == {}
    assert all((p == 0.1).all() for p in net[:5].parameters())


def test_of_a_module_of_ones_own_the_matrices_of_copies_are_drawn():
    module = nn.ParameterDict({"a": torch.full((160, 64), 0.1), "b": torch.randn(8, 8), "c": torch.ones(3, 3)})
    before = {key: p.detach().clone() for key, p in module.items()}
    assert list(break_symmetry(module, ["(root)"], {}, seed=0)) == [""]
    assert module["a"].std().item() == pytest.approx((2 / 224) ** 0.5, rel=0.05)  # Glorot and Bengio 2010
    assert all(torch.equal(module[key], before[key]) for key in "bc")
    assert break_symmetry(nn.ParameterList([before["b"]]), ["(root)"], {}, seed=0) == {}
