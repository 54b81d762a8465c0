"""Which columns are data, against what a change of the parameters changes."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.probes.raw_columns import raw_columns


def made(width, *shape):
    """Columns that something trainable has made."""
    return torch.ones(*shape, width, requires_grad=True) * 2


def data(width, *shape):
    return torch.ones(*shape, width)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (data(2, 4), [True, True]),
        (data(2, 4).requires_grad_(), [True, True]),  # an input whose own gradient is wanted
        (nn.Parameter(data(2, 4)), [False, False]),
        (made(2, 4), [False, False]),
        (torch.cat([made(2, 4), data(1, 4)], 1), [False, False, True]),
        (torch.cat([data(1, 4), made(2, 4)], -1), [True, False, False]),
        (torch.cat([made(1, 4), data(1, 4), data(2, 4), made(1, 4)], 1), [False, True, True, True, False]),
        (torch.hstack([made(1, 4), data(1, 4)]), [False, True]),
        (torch.cat([made(1, 4, 7), data(1, 4, 7)], 2), [False, True]),
        (torch.cat([torch.cat([made(1, 4), made(1, 4)], 1), data(1, 4)], 1), [False, False, True]),
        (torch.cat([nn.Parameter(data(1, 4)), data(1, 4)], 1), [False, True]),
        (torch.cat([made(2, 4), made(2, 4)], 1), [False] * 4),
        (torch.cat([made(2, 4), data(2, 4)], 0), [False, False]),  # in rows: each column has both
        (torch.cat([made(2, 4), data(2, 4)], 1).relu(), [False] * 4),
    ],
)
def test_the_table(values, expected):
    assert raw_columns(values, -1).tolist() == expected
    assert raw_columns(values, values.dim() - 1).tolist() == expected


def test_channels_are_told_apart_along_their_own_dimension():
    pictures = torch.cat([data(5, 4, 1), made(5, 4, 2)], 1)
    assert raw_columns(pictures, 1).tolist() == [True, False, False]
    assert raw_columns(pictures, 2).tolist() == [False] * 5


def test_data_in_two_places_among_other_pieces_cannot_be_told():
    assert raw_columns(torch.cat([data(1, 4), made(2, 4), data(3, 4)], 1), 1) is None


def test_columns_that_are_data_are_those_that_no_parameter_changes():
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(7, width) for width in (3, 5))
    keys, numbers = torch.randint(7, (16, 2)), torch.randn(16, 4)

    def put_together():
        return torch.cat([*(table(keys[:, i]) for i, table in enumerate(tables)), numbers], 1)

    before = put_together()
    with torch.no_grad():
        for table in tables:
            table.weight += 1
    stays = (before == put_together()).all(0)
    np.testing.assert_array_equal(raw_columns(before, 1), stays.numpy())
    assert stays.sum() == 4
