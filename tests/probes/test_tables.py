"""What the loss says of the size of tables: against a finite difference, and as long as it is asked."""

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.tables import table_cosine, table_rms, tables
from lightning_gradflow.probes.transfer import Transfer

IDS = torch.arange(24).view(8, 3) % 10


class Factors(nn.Module):
    """A table of one's own beside a weight that is none."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(4))
        self.factors = nn.Parameter(torch.randn(10, 4))

    def forward(self, ids):
        rows = self.factors[ids]
        return (rows[:, 0] * rows[:, 1] + self.offset).sum(1)


def _size(parameters):
    return torch.stack([p.detach().double().norm() for p in parameters]).norm()


@pytest.mark.parametrize("make", [Factors, lambda: nn.Embedding(10, 4), lambda: nn.EmbeddingBag(10, 4)])
def test_cosine_times_the_norms_is_how_the_loss_goes_with_the_size(make):
    torch.manual_seed(0)
    module = make().double()

    def loss(factor=1.0):
        table = tables(module)[0]
        kept = table.detach().clone()
        table.data *= factor
        value = module(IDS).square().sum()
        if factor == 1.0:
            value.backward()
        table.data = kept
        return float(value.detach())

    loss()
    parameters = [p for p in module.parameters() if p.grad is not None]
    found = float(table_cosine(module) * _size(parameters) * _size([p.grad for p in parameters]))
    assert found == pytest.approx((loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5, rel=1e-5)


def _embedding(sign=1.0, **options):
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, **options)
    (sign * table(IDS).float().square().sum()).backward()
    return table


def test_a_gradient_that_asks_for_larger_tables_counts_as_nothing():
    assert float(table_cosine(_embedding(-1.0))) == 0
    assert float(table_cosine(_embedding())) > 0.5


def test_the_form_and_the_scale_of_the_gradient_make_no_difference():
    table = _embedding()
    expected = float(table_cosine(table))
    assert table_cosine(_embedding(sparse=True)) is None
    table.weight.grad *= 1e-6
    assert float(table_cosine(table)) == pytest.approx(expected)
    assert float(table_cosine(_embedding(dtype=torch.bfloat16))) == pytest.approx(expected, rel=0.02)


def test_a_table_is_that_of_an_embedding_or_ones_own():
    assert table_cosine(nn.Embedding(3, 2)) is None  # no gradient
    assert table_cosine(nn.Linear(3, 2)) is None
    assert table_rms(nn.Linear(3, 2)) is None
    assert table_rms(nn.LSTM(3, 2)) is None
    own = Factors()
    assert [table is own.factors for table in tables(own)] == [True]
    assert float(table_rms(own)) == pytest.approx(float(own.factors.detach().double().square().mean().sqrt()))


def test_of_several_tables_the_largest_is_told():
    own = nn.ParameterList([torch.ones(2, 2), torch.full((2, 2), 7.0)])
    assert float(table_rms(own)) == 7


def test_it_is_asked_as_long_as_the_loss_wants_smaller_tables():
    net = nn.Sequential(nn.Embedding(10, 4))
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    net.append(nn.Linear(4, 2))
    probe = SpectralProbe(LayerMap(net), transfer)
    seen = []
    for sign in (1.0, 1.0, -1.0, 1.0):
        net.zero_grad()
        (sign * net[0](IDS).square().sum()).backward()
        probe.measure()
        found = probe.collect(transfer.fetch())
        seen.append(found.get("0", {}).get("table_cosine"))
        again = SpectralProbe(LayerMap(net), transfer)
        again.load_state_dict(probe.state_dict())
        probe = again
    assert [None if x is None else x > 0 for x in seen] == [True, True, False, None]
