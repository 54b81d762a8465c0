"""One copy from the device to the host."""

import numpy as np
import pytest
import torch

from lightning_gradflow.probes.ranks import Topology
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


def test_alone_what_is_shared_is_what_was_given():
    transfer = Transfer()
    transfer.put("own", torch.tensor([1.0]))
    transfer.share("shared", torch.tensor([2.0, 3.0]))
    transfer.share_numbers("numbers", [4.0])
    arrays = transfer.fetch()
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "own": [1.0],
        "shared": [2.0, 3.0],
        "numbers": [4.0],
    }


def test_numbers_of_the_host_are_float64_arrays():
    transfer = Transfer()
    transfer.share_numbers("numbers", [1])
    assert transfer.fetch()["numbers"].dtype == np.float64


def test_numbers_that_change_after_they_were_given_arrive_as_they_were():
    transfer, numbers = Transfer(), [1.0]
    transfer.share_numbers("numbers", numbers)
    numbers[0] = 2.0
    assert transfer.fetch()["numbers"].tolist() == [1.0]


def test_what_is_dropped_does_not_arrive():
    transfer = Transfer()
    transfer.put("own", torch.ones(1))
    transfer.share("shared", torch.ones(1))
    transfer.share_numbers("numbers", [1.0])
    transfer.drop()
    assert transfer.fetch() == {}


def test_a_fetch_of_ones_own_leaves_out_what_is_shared_and_empties_the_collection():
    transfer = Transfer()
    transfer.put("own", torch.ones(1))
    transfer.share("shared", torch.ones(1))
    assert (list(transfer.fetch_own()), transfer.fetch()) == (["own"], {})


def test_outside_of_distributed_training_there_is_one_rank():
    assert Transfer().is_alone


@pytest.mark.parametrize("topology", [Topology(data=2), Topology(model=2)])
def test_among_several_ranks_none_is_alone(topology):
    assert not Transfer(topology).is_alone
