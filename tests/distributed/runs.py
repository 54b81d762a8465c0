"""The runs whose numbers are compared with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from .launcher import RANKS
from .nets import BATCH, Alike, Branching, Loop, Mixed, Sequences, Traced

WINDOW = 3  # samples in a row in which a dead unit is silent
_PATIENCE = timedelta(seconds=20)  # after which a rank that waits in vain for another one gives up

Prepare = Callable[[nn.Module, DeviceMesh], None]


@dataclass(frozen=True)
class Run:
    """One way to train on two ranks.

    Args:
        make: Builds the network.
        strategy: Builds Lightning's strategy.
        prepare: Shards the network, in ``configure_model``.
        accumulated: Batches in a step.
        batches: Batches of each rank; the last window is short where ``accumulated`` does not divide them.
        replicas: Ranks with different batches; the ranks of a tensor parallel run see the same ones.
        dtype: Of weights and data.
        ranks: How many there are.
        input_is_cut: Whether the features that go into the first layer are spread over the ranks.
        kwargs: What the run asks of its Trainer besides.
    """

    make: Callable[[], Traced]
    strategy: Callable[[], Strategy]
    prepare: Prepare | None = None
    accumulated: int = 1
    batches: int = 5
    replicas: int = RANKS
    dtype: torch.dtype = torch.float32
    ranks: int = RANKS
    input_is_cut: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bar(self) -> float:
        """The largest relative error that is allowed: in float64 it is about what is summed and not about rounding."""
        return 1e-6 if self.dtype is torch.float64 else 1e-5

    @property
    def rows(self) -> int:
        """The rows of the data."""
        return self.replicas * BATCH * self.batches

    @property
    def windows(self) -> list[range]:
        """The batches of each step."""
        starts = range(0, self.batches, self.accumulated)
        return [range(start, min(start + self.accumulated, self.batches)) for start in starts]


def ddp(**kwargs: Any) -> DDPStrategy:
    """Data parallel training on gloo."""
    return DDPStrategy(process_group_backend="gloo", timeout=_PATIENCE, **kwargs)


def sharded() -> ModelParallelStrategy:
    """Each rank with its own batches and a shard of the weights."""
    return _model_parallel(RANKS, 1)


def tensor_parallel() -> ModelParallelStrategy:
    """Both ranks with the same batches, and each with its own units of some layers."""
    return _model_parallel(1, RANKS)


def both() -> ModelParallelStrategy:
    """Four ranks: two with batches of their own, each of them two with units of their own."""
    return _model_parallel(2, 2)


def _model_parallel(data: int, tensor: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo", timeout=_PATIENCE
    )


def whole(net: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 around the whole network."""
    fully_shard(net, mesh=mesh["data_parallel"])


def inner(net: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 around one layer; no one reduces the gradients of the others, so that they differ from rank to rank."""
    fully_shard(net.get_submodule("b"), mesh=mesh["data_parallel"])


def each(net: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 around each layer, and around the rest."""
    for layer in net.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def _parallel(plan: Callable[[], dict[str, ParallelStyle]]) -> Prepare:
    def prepare(net: nn.Module, mesh: DeviceMesh) -> None:
        parallelize_module(net, mesh["tensor_parallel"], plan())

    return prepare


def _parallel_and_whole(net: nn.Module, mesh: DeviceMesh) -> None:
    _parallel(_local)(net, mesh)
    whole(net, mesh)


def _local() -> dict[str, ParallelStyle]:
    return {"a": ColwiseParallel(), "b": RowwiseParallel()}


def _as_dtensors() -> dict[str, ParallelStyle]:
    return {
        "a": ColwiseParallel(use_local_output=False),
        "b": RowwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        "c": RowwiseParallel(),
    }


def _sequences() -> dict[str, ParallelStyle]:
    return {
        "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "a": ColwiseParallel(input_layouts=Shard(1)),
        "b": RowwiseParallel(),
    }


_FSDP: dict[str, Any] = {"strategy": sharded, "dtype": torch.float64}
_TP: dict[str, Any] = {"strategy": tensor_parallel, "dtype": torch.float64, "replicas": 1}

REPLICATED = {
    "DDP": Run(Mixed, ddp),
    "DDP, static graph": Run(Mixed, partial(ddp, static_graph=True)),
    "DDP, unused parameters": Run(Branching, partial(ddp, find_unused_parameters=True)),
    "DDP, a cell in a loop": Run(Loop, ddp),
    "DDP, sequences of two lengths": Run(partial(Loop, uneven=True), ddp),
    "DDP, accumulated": Run(Mixed, ddp, accumulated=2),
    "DDP, clipped": Run(Mixed, ddp, kwargs={"gradient_clip_val": 0.05}),
}
"""Runs in which each rank holds all weights."""

SHARDED = {
    "FSDP2": Run(Mixed, prepare=whole, **_FSDP),
    "FSDP2, each layer": Run(Mixed, prepare=each, **_FSDP),
    "FSDP2, float32": Run(Mixed, sharded, whole),
    "FSDP2, accumulated": Run(Mixed, prepare=whole, accumulated=2, **_FSDP),
    "FSDP2, clipped": Run(Mixed, prepare=whole, kwargs={"gradient_clip_val": 0.05}, **_FSDP),
    # a validation leaves the outermost module with whole parameters in the place of their shards
    "FSDP2, validated": Run(Mixed, prepare=whole, kwargs={"num_sanity_val_steps": 1, "val_check_interval": 1}, **_FSDP),
    "tensor parallel": Run(partial(Mixed, width=8), prepare=_parallel(_local), **_TP),
    "tensor parallel, DTensors throughout": Run(Mixed, prepare=_parallel(_as_dtensors), **_TP),
    "tensor parallel, float32": Run(partial(Mixed, width=8), tensor_parallel, _parallel(_local), replicas=1),
    "tensor parallel, equal parts": Run(partial(Alike, width=8), prepare=_parallel(_local), **_TP),
    "sequence parallel": Run(Sequences, prepare=_parallel(_sequences), input_is_cut=True, **_TP),
}
"""Runs in which weights are spread over the ranks."""

CROSSED = {
    "FSDP2 and tensor parallel": Run(
        partial(Mixed, width=8), both, _parallel_and_whole, dtype=torch.float64, ranks=2 * RANKS
    ),
}
"""Both at once, which takes four ranks: for the table, the tests have no time for it."""

RUNS = REPLICATED | SHARDED | CROSSED
