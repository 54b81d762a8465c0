import torch
from torch import nn

from lightning_gradflow.remedies.norm_gains import reset_gains


def _net():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    return net


def test_gains_are_one_and_all_else_stays():
    net = _net()
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = reset_gains(net, ["0", "1", "2", "3"])
    assert {name: len(own) for name, own in found.items()} == {"1": 2, "2": 2}
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"1.weight", "2.weight"}
    assert bool((net[1].weight == 1).all())
    assert bool((net[2].weight == 1).all())


def test_shared_and_frozen_gains_stay():
    net = _net()
    net[2].weight = net[1].weight
    assert reset_gains(net, ["1", "2"]) == {}
    net = _net()
    net[1].weight.requires_grad_(False)
    assert list(reset_gains(net, ["1", "2"])) == ["2"]
