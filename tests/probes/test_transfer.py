"""One copy from the device to the host."""

import numpy as np
import pytest
import torch

from lightning_gradflow.probes.transfer import Transfer, wide_dtype


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1e-300, 1.0], dtype=torch.float64),
        torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([2**40 + 1], dtype=torch.int64),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("inf")]),
        torch.tensor([]),
    ],
    ids=["float64", "bfloat16", "int64", "bool", "nonfinite", "empty"],
)
def test_every_real_type_arrives_without_loss(tensor):
    transfer = Transfer()
    transfer.put("before", torch.tensor([7.0]))
    transfer.put("it", tensor)
    transfer.put("behind", torch.tensor([8.0]))
    arrays = transfer.fetch()
    np.testing.assert_array_equal(arrays["it"], np.array(tensor.tolist(), dtype=np.float64))
    assert (arrays["before"].tolist(), arrays["behind"].tolist()) == ([7.0], [8.0])


def test_arrays_are_float64():
    transfer = Transfer()
    transfer.put("counts", torch.tensor([1]))
    assert transfer.fetch()["counts"].dtype == np.float64


def test_a_fetch_empties_the_collection():
    transfer = Transfer()
    transfer.put("norms", torch.ones(2))
    transfer.fetch()
    assert transfer.fetch() == {}


def test_a_graph_is_not_kept():
    transfer = Transfer()
    transfer.put("norms", torch.ones(2, requires_grad=True) * 2)
    assert transfer.fetch()["norms"].tolist() == [2.0, 2.0]


def test_squares_of_a_dying_gradient_do_not_underflow():
    assert torch.tensor(1e-30, dtype=wide_dtype(torch.device("cpu"))).square() > 0


def test_a_device_without_float64_gets_float32():
    assert wide_dtype(torch.device("mps")) == torch.float32
