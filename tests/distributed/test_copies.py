"""How often a part of a sharded parameter is there, on a mesh that is too large for a test with processes."""

import warnings

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore  # ranks that are not there and say nothing

from lightning_gradflow.probes.shards import copies

NAMES = [f"{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def net():
    """FSDP2 over tensor parallelism, on four ranks."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield _over_four_ranks()
    finally:
        dist.destroy_process_group()


def _over_four_ranks():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")  # torch 2.6
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(net, mesh=mesh["data"])
    return net


@pytest.mark.parametrize("name", NAMES)
def test_over_all_ranks_each_entry_is_counted_once(net, name):
    parameter = net.get_parameter(name)
    assert 4 * parameter.to_local().numel() / copies(parameter, 4) == parameter.numel()
