"""Attention of torch's with weights that shut its softmax is drawn anew; any other is left as it is."""

import math

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.attention import draw_attention

DIM, HEADS = 32, 4


def _attention(std=None, which=("in_proj_weight", "out_proj.weight"), **kwargs):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **kwargs)
    if std is not None:
        for name in which:
            nn.init.normal_(attention.get_parameter(name), std=std)
    return attention


def _state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def _entropy(attention):
    """Of the positions that are looked at, over that of all alike."""
    x = torch.randn(16, 10, DIM, generator=torch.Generator().manual_seed(1))
    shares = attention(x, x, x, average_attn_weights=False)[1]
    return float(-(shares * shares.clamp(min=1e-30).log()).sum(-1).mean() / math.log(10))


def _assert_left(module, seed=0):
    before = _state(module)
    assert draw_attention(module, seed) == {}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_that_shut_the_softmax_are_drawn_so_that_it_looks_at_all_positions():
    attention = _attention(1.0)
    assert _entropy(attention) < 0.2
    assert [*draw_attention(attention, 0)] == ["", "out_proj"]
    assert _entropy(attention) > 0.7


def test_they_have_the_variance_of_glorot_by_block():
    attention = _attention(1.0)
    draw_attention(attention, 0)
    for block in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        assert block.std().item() == pytest.approx(1 / math.sqrt(DIM), rel=0.1)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()


@pytest.mark.parametrize("which", ["in_proj_weight", "out_proj.weight"])
def test_one_weight_that_is_far_too_large_is_enough(which):
    assert draw_attention(_attention(1.0, [which]), 0)


def test_so_it_is_where_keys_and_values_have_sizes_of_their_own():
    assert draw_attention(_attention(2.0, ["k_proj_weight"], kdim=16, vdim=8), 0)


@pytest.mark.parametrize("std", [None, 0.02, 0.01, 0.5])
def test_usual_weights_are_left_to_the_bit(std):
    _assert_left(_attention(std))


def test_weights_that_were_learnt_are_left():
    attention = _attention(1.0)
    direction = torch.randn(DIM)
    attention.in_proj_weight.data += 2 * torch.outer(torch.randn(3 * DIM), direction)
    _assert_left(attention)


def test_weights_that_another_module_has_too_are_left():
    attention = _attention(1.0)
    head = nn.Linear(DIM, DIM)
    head.weight = attention.out_proj.weight
    _assert_left(nn.ModuleList([attention, head]))


def test_frozen_weights_are_left():
    _assert_left(_attention(1.0).requires_grad_(requires_grad=False))


def test_each_is_named_by_where_it_is():
    layer = nn.TransformerEncoderLayer(DIM, HEADS)
    nn.init.normal_(layer.self_attn.in_proj_weight)
    drawn = draw_attention(layer, 0)
    assert [*drawn] == ["self_attn", "self_attn.out_proj"]
    assert drawn["self_attn.out_proj"] == [*layer.self_attn.out_proj.parameters()]


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    nets = [_attention(1.0) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        draw_attention(net, seed)
    assert torch.equal(nets[0].in_proj_weight, nets[1].in_proj_weight)
    assert not torch.equal(nets[0].in_proj_weight, nets[2].in_proj_weight)


def test_the_global_random_state_is_not_touched():
    attention, before = _attention(1.0), torch.get_rng_state()
    draw_attention(attention, 0)
    assert torch.equal(torch.get_rng_state(), before)


UNUSUAL = {
    "copies": lambda weight: nn.init.constant_(weight, 0.05),
    "positive": lambda weight: nn.init.uniform_(weight, 0, 2 / math.sqrt(DIM)),
    "small": lambda weight: nn.init.normal_(weight, std=0.039 / math.sqrt(DIM)),
}
USUAL = {
    "small on purpose": lambda weight: nn.init.normal_(weight, std=0.02 / math.sqrt(2 * 12)),
    "zeros": nn.init.zeros_,
    "diagonal": lambda weight: weight.data.copy_(torch.eye(len(weight), DIM)),
}


@pytest.mark.parametrize(
    ("draw", "which"),
    [
        *((draw, which) for draw in ("copies", "positive") for which in ("in_proj_weight", "out_proj.weight")),
        ("small", "in_proj_weight"),
    ],
)
def test_weights_that_are_copies_or_far_too_small_are_drawn(draw, which):
    attention = _attention()
    UNUSUAL[draw](attention.get_parameter(which))
    assert [*draw_attention(attention, 0)] == ["", "out_proj"]
    assert 0.5 / math.sqrt(DIM) < attention.get_parameter(which).std() < 2 / math.sqrt(DIM)


@pytest.mark.parametrize("draw", USUAL)
def test_weights_that_are_small_or_regular_on_purpose_stay(draw):
    attention = _attention()
    USUAL[draw](attention.out_proj.weight)
    _assert_left(attention)
