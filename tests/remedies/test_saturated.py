"""Layers that a bias holds at a bound: drawn by the book, in front of the activations that are named."""

import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.saturated import draw_saturated
from lightning_gradflow.remedies.training import Training

MODULES = [Point("0", "0"), Point("1", "1", "tanh"), Point("2", "2"), Point("3", "3", "sigmoid")]
CALLS = [Point("0", "0"), Point("0/tanh", "0", "tanh"), Point("2", "2"), Point("2/sigmoid", "2", "sigmoid")]


def held():
    """A net whose output stands at 1, whatever comes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Sigmoid())
    nn.init.constant_(net[2].bias, 25.0)
    return net


@pytest.mark.parametrize(("points", "name"), [(MODULES, "3"), (CALLS, "2")], ids=["modules", "calls"])
def test_the_layer_before_the_activation_is_drawn_and_no_other(points, name):
    net = held()
    first = net[0].weight.clone()
    drawn = draw_saturated(net, [name], points, seed=0)
    assert {key: [*map(id, own)] for key, own in drawn.items()} == {"2": [*map(id, net[2].parameters())]}
    assert not net[2].bias.any()
    assert torch.equal(net[0].weight, first)


def test_the_seed_says_what_is_drawn_and_no_random_state_is_touched():
    state = torch.get_rng_state()
    nets = [held(), held()]
    torch.set_rng_state(state)
    for net in nets:
        draw_saturated(net, ["3"], MODULES, seed=5)
    assert torch.equal(nets[0][2].weight, nets[1][2].weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("why", ["trained", "frozen", "shared", "no layer", "a rectifier"])
def test_what_may_not_be_drawn_stays(why):
    net, points = held(), list(MODULES)
    if why == "trained":
        with torch.no_grad():
            net[2].weight += 3 * torch.outer(net[2].weight[0], net[2].weight[1])
            net[2].weight += torch.ones(32, 1) @ torch.linspace(-2, 2, 32)[None]
    elif why == "frozen":
        net[2].bias.requires_grad_(requires_grad=False)
    elif why == "shared":
        net[0].bias = net[2].bias
    elif why == "no layer":
        points[2] = Point("gone", "gone")
    else:
        points[3] = Point("3", "3", "relu")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert draw_saturated(net, ["3"], points, seed=0) == {}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_remedy_draws_it_where_nothing_else_is_wrong():
    net, history = held(), History()
    history.add_points(MODULES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    from contextlib import contextmanager
    from copy import deepcopy

    @contextmanager
    def rehearse():
        twin = deepcopy(net)
        yield twin, lambda: twin(x)

    found = Finding(FindingKind.SATURATED_ACTIVATION, Severity.WARNING, 70, ("3",), "weight_scale")
    done = reinitialise(Training(net, [optimizer], history, rehearse), found)
    assert done is not None
    assert "2" in done.layers
    assert net(x).std() > 0.05
