"""Scores of a softmax that are too large, and what they are made by."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.remedies.scores import calm_scores

WIDTH, LENGTH = 64, 9


def _seeded(weight, seed, gain=1.0):
    fresh = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.data.copy_(gain * fresh / math.sqrt(WIDTH))


class Attention(nn.Module):
    """By hand, without the division by the square root of the width, unless it is asked for."""

    def __init__(self, softmax=lambda scores: scores.softmax(-1), scale=1.0, gain=1.0):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        for seed, layer in enumerate((self.q, self.k, self.v)):
            _seeded(layer.weight, seed, gain)
        self.softmax, self.scale = softmax, scale
        self.scores = None

    def forward(self, x):
        self.scores = self.q(x) @ self.k(x).mT * self.scale
        return self.softmax(self.scores) @ self.v(x)


def _input(seed=9):
    return torch.randn(16, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def _spread(scores):
    return float(scores.detach().std(-1, correction=0).square().mean().sqrt())


def _weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


SOFTMAXES = {
    "method": lambda scores: scores.softmax(-1),
    "function": lambda scores: torch.softmax(scores, dim=-1),
    "functional": lambda scores: F.softmax(scores, dim=2),
    "by name": lambda scores: F.softmax(input=scores, dim=-1),
    "module": nn.Softmax(dim=-1),
    "other axis": lambda scores: scores.mT.softmax(dim=1).mT,
    "masked": lambda scores: scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf).softmax(-1),
}


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_queries_and_keys_get_scores_of_deviation_one(softmax):
    net, x = Attention(softmax), _input()
    before = _weights(net)
    changed = calm_scores(net, lambda: net(x))
    assert [*changed] == ["q", "k"]
    assert changed["q"] == [net.q.weight]
    net(x)
    assert _spread(net.scores) == pytest.approx(1, rel=0.2)  # masked ones count in none but the other
    assert torch.equal(net.v.weight, before["v.weight"])
    factors = [float(getattr(net, one).weight.detach().norm() / before[f"{one}.weight"].norm()) for one in "qk"]
    assert factors[0] == pytest.approx(factors[1])


@pytest.mark.parametrize(("scale", "gain", "changes"), [(None, 1.0, False), (1.0, 1.0, True), (None, 2.0, True)])
def test_the_fused_function_is_seen_with_its_own_scale(scale, gain, changes):
    class Fused(Attention):
        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=scale)

    net, x = Fused(gain=gain), _input()
    assert bool(calm_scores(net, lambda: net(x))) == changes
    scores = net.q(x) @ net.k(x).mT * (scale or WIDTH**-0.5)
    assert _spread(scores) == pytest.approx(1, rel=0.2)


def test_keys_that_several_queries_share_are_left():
    class Grouped(Attention):
        def forward(self, x):
            heads = [layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            key, value = (one[:, :2] for one in heads[1:])
            return F.scaled_dot_product_attention(heads[0], key, value, scale=1.0, enable_gqa=True)

    net, x = Grouped(), _input()
    assert calm_scores(net, lambda: net(x)) == {}


@pytest.mark.parametrize(("scale", "changes"), [(1.8 / 8, False), (2.3 / 8, True)])
def test_scores_of_a_usual_size_are_left(scale, changes):
    net, x = Attention(scale=scale), _input()
    assert bool(calm_scores(net, lambda: net(x))) == changes


def test_bare_parameters_are_scaled_too():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(3))
            for seed, weight in enumerate((self.q, self.k, self.v)):
                _seeded(weight, seed, 8.0)

        def forward(self, x):
            return torch.einsum("bid,bjd->bij", x @ self.q, x @ self.k).softmax(-1) @ (x @ self.v)

    net, x = Bare(), _input()
    before = _weights(net)
    assert [*calm_scores(net, lambda: net(x))] == [""]
    assert _spread((x @ net.q) @ (x @ net.k).mT) == pytest.approx(1, rel=0.1)
    assert torch.equal(net.v, before["v"])


class Packed(nn.Module):
    """Queries, keys and values by one layer."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        _seeded(self.qkv.weight, 0)
        self.scores = None

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        self.scores = q @ k.mT
        return self.scores.softmax(-1) @ v


def test_of_a_layer_that_makes_values_too_the_rows_of_queries_and_keys_are_scaled():
    net, x = Packed(), _input()
    before = _weights(net)["qkv.weight"]
    assert [*calm_scores(net, lambda: net(x))] == ["qkv"]
    net(x)
    assert _spread(net.scores) == pytest.approx(1, rel=0.01)
    after = net.qkv.weight.detach()
    assert torch.equal(after[2 * WIDTH :], before[2 * WIDTH :])
    factors = after[: 2 * WIDTH] / before[: 2 * WIDTH]
    torch.testing.assert_close(factors, factors[0, 0].expand_as(factors))


@pytest.mark.parametrize("need_weights", [True, False])
def test_so_are_those_of_attention_whose_inputs_are_large(need_weights):
    torch.manual_seed(0)
    net, x = nn.MultiheadAttention(WIDTH, 4, batch_first=True), 9 * _input()
    before = net.in_proj_weight.detach().clone()

    def forward():
        return net(x, x, x, need_weights=need_weights, average_attn_weights=False)

    def chosen():
        return float(net(x, x, x, average_attn_weights=False)[1].detach().max(-1).values.mean())

    was = chosen()
    assert [*calm_scores(net, forward)] == [""]
    assert was > 0.9
    assert chosen() < 0.5
    assert torch.equal(net.in_proj_weight[2 * WIDTH :], before[2 * WIDTH :])


def test_what_comes_later_is_measured_again():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(gain=3.0), Attention(gain=3.0)

        def forward(self, x):
            return self.second(self.first(x))

    net, x = Two(), _input()
    assert {"first.q", "first.k", "second.q", "second.k"} == {*calm_scores(net, lambda: net(x))}
    net(x)
    for part in (net.first, net.second):
        assert _spread(part.scores) == pytest.approx(1, rel=0.1)


def _frozen(net):
    net.requires_grad_(False)
    net.v.requires_grad_(True)


def _tied(net):
    net.k.weight = net.q.weight


def _trained(net):
    with torch.no_grad():
        for layer in (net.q, net.k):
            layer.weight.add_(torch.outer(layer.weight[0], layer.weight[1]) * 20)


@pytest.mark.parametrize("change", [_frozen, _tied, _trained])
def test_weights_that_are_frozen_tied_or_look_trained_are_left(change):
    net, x = Attention(), _input()
    change(net)
    before = _weights(net)
    assert calm_scores(net, lambda: net(x)) == {}
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(("size", "is_calmed"), [(10.0, True), (1.0, False)])
def test_of_a_choice_of_experts_or_classes_the_one_layer_that_makes_it_is_scaled(size, is_calmed):
    net, x = nn.Sequential(nn.Linear(WIDTH, 4, bias=False), nn.Softmax(-1)), _input()[:, 0]
    _seeded(net[0].weight, 0, size)
    before = net[0].weight.clone()
    assert [*calm_scores(net, lambda: net(x))] == (["0"] if is_calmed else [])
    scores = net[0](x).detach()
    if is_calmed:
        assert float((scores - scores.mean(-1, keepdim=True)).square().mean().sqrt()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(net[0].weight / net[0].weight.norm(), before / before.norm())


def test_weights_before_a_normalisation_are_left():
    class Normed(Attention):
        def forward(self, x):
            q, k = (F.layer_norm(layer(x), [WIDTH]) for layer in (self.q, self.k))
            return (q @ k.mT).softmax(-1) @ self.v(x)

    net, x = Normed(), _input()
    assert calm_scores(net, lambda: net(x)) == {}
