import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.norm_gains import reset_biases, reset_far_biases, reset_gains, reset_shutting


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


@pytest.mark.parametrize(
    ("bias", "gain", "found"),
    [
        ([-10.0, -10.0, -10.0, -10.0], 1.0, True),
        ([5.0, -5.0, 5.0, 0.0], 1.0, True),
        ([-10.0, -10.0, 0.0, 0.0], 1.0, False),  # half of the units are open
        ([-3.9, -3.9, -3.9, -3.9], 1.0, False),
        ([-10.0, -10.0, -10.0, -10.0], 3.0, False),  # what comes in is as large
        ([-1.0, -1.0, -1.0, -1.0], 0.1, False),  # no activation is shut by that
    ],
)
def test_biases_that_shut_most_units_are_zero(bias, gain, found):
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sigmoid())
    with torch.no_grad():
        net[0].bias.fill_(-10.0)
        net[1].bias.copy_(torch.tensor(bias))
        net[1].weight.fill_(gain)
    assert list(reset_biases(net)) == (["1"] if found else [])
    assert net[1].bias.tolist() == pytest.approx([0.0] * 4 if found else bias)
    assert net[0].bias.tolist() == [-10.0] * 4
    assert net[1].weight.tolist() == pytest.approx([gain] * 4)


def test_biases_of_gates_and_shared_and_frozen_ones_stay():
    net = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.RMSNorm(4))
    for part in net[:3]:
        nn.init.constant_(part.bias, -10.0)
    assert reset_biases(net, {"0", "1", "2"}) == {}
    net[1].bias.requires_grad_(False)
    net[2].bias = net[0].bias
    assert reset_biases(net) == {}


def _far(bias, kind=lambda: nn.Linear(4, 4)):
    net = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4))
    nn.init.zeros_(net[0].bias)
    net[1].bias.data.copy_(torch.tensor(bias))
    return net


@pytest.mark.parametrize(
    ("bias", "is_found"),
    [
        ([8.1] * 4, True),
        ([-8.1] * 4, True),
        ([7.9] * 4, False),
        ([12.0, 12.0, 12.0, 0.0], True),
        ([12.0, 12.0, 0.0, 0.0], False),
    ],
)
@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)], ids=["linear", "conv"])
def test_biases_that_are_far_from_zero_in_most_units_are_set_to_it(bias, is_found, kind):
    net = _far(bias, kind)
    weight = net[1].weight.clone()
    assert list(reset_far_biases(net)) == (["1"] if is_found else [])
    assert net[1].bias.tolist() == ([0.0] * 4 if is_found else pytest.approx(bias))
    assert torch.equal(net[1].weight, weight)


@pytest.mark.parametrize(
    ("bias", "layers", "kept", "is_found"),
    [
        (-2.1, ["1"], [], True),
        (-1.9, ["1"], [], False),
        (2.1, ["1"], [], False),  # nothing is shut by it
        (-2.1, ["0"], [], False),
        (-2.1, ["1"], ["1"], False),
    ],
)
def test_biases_that_shut_what_follows_are_set_to_zero_where_that_is_asked(bias, layers, kept, is_found):
    assert list(reset_shutting(_far([bias] * 4), layers, kept)) == (["1"] if is_found else [])


def test_biases_that_are_kept_frozen_shared_or_of_a_norm_stay_far():
    assert reset_far_biases(_far([12.0] * 4), {"1"}) == {}
    frozen = _far([12.0] * 4)
    frozen[1].bias.requires_grad_(False)
    assert reset_far_biases(frozen) == {}
    shared = _far([12.0] * 4)
    shared[2].bias = shared[1].bias
    assert reset_far_biases(shared) == {}
    assert reset_far_biases(_far([12.0] * 4, lambda: nn.LayerNorm(4))) == {}
