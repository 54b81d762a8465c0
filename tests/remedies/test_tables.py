"""Tables drawn anew by the length of their rows, and those that are left."""

import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.tables import draw_tables


class Own(nn.Module):
    """Tables of one's own, a position that is added, and a matrix that multiplies."""

    def __init__(self, std=3.0):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Parameter(std * torch.randn(60, 32))
        self.place = nn.Parameter(std * torch.randn(1, 40, 32))
        self.weight = nn.Parameter(std * torch.randn(32, 32))
        self.offset = nn.Parameter(torch.full((32,), 50.0))


def _length(table):
    return float(table.detach().square().sum(-1).mean().sqrt())


def test_the_rows_have_length_one_and_their_products_a_deviation_of_one_over_the_root_of_the_width():
    net = nn.ModuleDict({"a": nn.Embedding(400, 64), "b": nn.Embedding(400, 64)})
    assert [*draw_tables(net, ["b", "a"], (), seed=0)] == ["b", "a"]
    assert [_length(net[name].weight) for name in "ab"] == pytest.approx([1, 1], rel=0.02)
    assert float((net["a"].weight @ net["b"].weight.T).detach().std()) == pytest.approx(1 / 8, rel=0.02)


def test_of_ones_own_what_is_multiplied_with_is_left():
    own = Own()
    weight, offset = own.weight.clone(), own.offset.clone()
    drawn = draw_tables(own, ["(root)"], {("", "weight")}, seed=0)
    assert drawn.keys() == {""}
    assert len(drawn[""]) == 4
    assert [_length(own.rows), _length(own.place)] == pytest.approx([1, 1], rel=0.05)
    assert torch.equal(own.weight, weight)
    assert torch.equal(own.offset, offset)


def _transformer(width, place=1.0):
    """Tokens, a bare position that is added, and another embedding."""
    net = nn.ModuleDict({"tokens": nn.Embedding(400, 64), "kind": nn.Embedding(300, width)})
    torch.manual_seed(0)
    net.place = nn.Parameter(place * torch.randn(1, 200, 64))
    return net


def test_tables_that_are_added_to_those_drawn_are_drawn_with_them():
    net = _transformer(64)
    assert [*draw_tables(net, ["tokens"], (), seed=0)] == ["tokens", "", "kind"]
    tables = (net["tokens"].weight, net["kind"].weight, net.place)
    assert [_length(table) for table in tables] == pytest.approx([1, 1, 1], rel=0.03)
    assert not torch.equal(net["tokens"].weight[:200], net.place[0])


def test_beside_tables_that_are_drawn_those_of_another_width_small_ones_and_matrices_are_left():
    assert [*draw_tables(_transformer(32, place=0.4), ["tokens"], (), seed=0)] == ["tokens"]
    assert [*draw_tables(_transformer(32), ["tokens"], {("", "place")}, seed=0)] == ["tokens"]
    assert draw_tables(_transformer(64), [], (), seed=0) == {}


def test_a_seed_gives_the_same_rows():
    nets = [Own(), Own(), Own()]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        draw_tables(net, ["(root)"], (), seed)
    assert torch.equal(nets[0].rows, nets[1].rows)
    assert not torch.equal(nets[0].rows, nets[2].rows)


def _trained(shape):
    torch.manual_seed(0)
    return torch.randn(shape) + 5 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))


@pytest.mark.parametrize(
    "spare",
    [
        lambda: nn.Embedding(50, 3),  # rows of 1.7
        lambda: nn.Embedding.from_pretrained(3 * torch.randn(50, 32)),
        lambda: nn.Embedding.from_pretrained(_trained((50, 32)), freeze=False),
        lambda: nn.Linear(50, 32),
    ],
    ids=["short", "frozen", "trained", "no table"],
)
def test_what_is_left(spare):
    net = nn.Sequential(spare())
    before = net[0].weight.clone()
    assert draw_tables(net, ["0"], (), seed=0) == {}
    assert torch.equal(net[0].weight, before)


def test_positions_that_look_trained_are_left_whatever_their_shape():
    own = Own()
    own.place.data = _trained((40, 32))[None]
    place = own.place.clone()
    draw_tables(own, ["(root)"], (), seed=0)
    assert torch.equal(own.place, place)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_stays_zero(kind):
    net = nn.Sequential(kind(50, 32, padding_idx=2))
    draw_tables(net, ["0"], (), seed=0)
    assert not net[0].weight[2].any()
    assert _length(net[0].weight[3:]) == pytest.approx(1, rel=0.1)


def test_the_output_layer_that_shares_the_table_has_it_too():
    net = nn.ModuleDict({"embed": nn.Embedding(50, 32), "out": nn.Linear(32, 50, bias=False)})
    net["out"].weight = net["embed"].weight
    assert [*draw_tables(net, ["embed"], (), seed=0)] == ["embed"]
    assert net["out"].weight is net["embed"].weight
    assert _length(net["out"].weight) == pytest.approx(1, rel=0.1)
