"""What two ranks run: ``python -m tests.remedies.snapshot_program``, started twice by the launcher."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_gradflow.remedies.snapshot import Snapshot, is_finite, size


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that this rank holds: odd sizes leave it with other parts than the other one."""
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _averaged(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values / dist.get_world_size()


def main() -> Any:
    """Trains, goes back, trains again."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(2):
        _step(model, optimizer, seed)
    with CommDebugMode() as counted:
        snapshot = Snapshot.take(model, [optimizer])
        said = size(model, [optimizer])
    before = _parts(model, optimizer)
    for seed in range(2, 5):
        _step(model, optimizer, seed)
    after = _parts(model, optimizer)
    del optimizer.state[model[0].weight]  # type: ignore[arg-type]
    with CommDebugMode() as counted_back:
        lost = snapshot.restore(model, [optimizer])
    back = _parts(model, optimizer)
    # in the order of the state: what was removed has been made anew in its old place
    same = not lost and all(map(torch.equal, back, before)) and len(back) == len(before)
    anew = optimizer.state[model[0].weight]["exp_avg"]  # type: ignore[index]
    for seed in range(2, 5):
        _step(model, optimizer, seed)
    goes_on = all(map(torch.equal, _parts(model, optimizer), after))

    finite = [is_finite(model, _averaged)]
    if dist.get_rank() == 1:
        model[0].weight.to_local().data.fill_(float("nan"))  # type: ignore[operator]
    finite.append(is_finite(model, _averaged))
    return {
        "collectives": counted.get_total_counts() + counted_back.get_total_counts(),
        "same": same,
        "goes_on": goes_on,
        "removed": isinstance(anew, DTensor) and anew.shape == model[0].weight.shape,
        "bytes": snapshot.nbytes == said == sum(p.numel() * p.element_size() for p in before),
        "finite": finite,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    answer = main()
    print(json.dumps(answer), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while the other one's are still at work
