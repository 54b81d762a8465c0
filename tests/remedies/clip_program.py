"""What two ranks run: ``python -m tests.remedies.clip_program``, started twice by the launcher."""

from __future__ import annotations

import copy
import json
import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.training import Training

RANK = int(os.environ.get("RANK", "0"))


def net() -> nn.Sequential:
    """A network with an odd number of rows, so that the shards are not of one size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def past() -> History:
    """Norms of 3 that were usual."""
    history = History()
    history.layer_axis.merge(["0", "2"])
    for step in range(5):
        history.append(Row(step, {"grad_norm": np.array([3.0, 0.0])}))
    return history


def norm(model: nn.Module) -> float:
    """The norm of all gradients, put together from the shards."""
    gradients: list[Any] = [p.grad for p in model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in whole])))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, clipper: Clipper) -> list[float]:
    """Gradient norms after clipping, over some steps whose loss grows."""
    found = []
    for step in range(40):
        x: Tensor = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x).square().mean() * 1.2**step).backward()
        clipper.before_step(optimizer)
        found.append(norm(model))
        optimizer.step()
    return found


def answer() -> dict[str, Any]:
    """The same training sharded and whole, under plain descent; then what only some ranks have."""
    whole = net()
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    found: dict[str, Any] = {}
    for name, model in (("", sharded), ("_of_whole", whole)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        clipper = Clipper(Training(model, [optimizer], History()))
        found["whole" if name else "sharded"] = trained(model, optimizer, clipper)
        found["limits" + name] = list(clipper.limits())
        found["clipped_share" + name] = clipper.clipped_share()

    adam = torch.optim.Adam(sharded.parameters())
    clipper = Clipper(Training(sharded, [adam], past()))
    weight: Any = sharded[0].weight
    weight.grad.to_local().fill_(torch.nan if RANK else 1.0)
    clipper.before_step(adam)
    gradients: list[Any] = [p.grad for p in sharded.parameters()]
    found["dropped"] = sum(float(g.to_local().abs().sum()) for g in gradients)

    adam.zero_grad()
    if RANK == 0:
        weight.grad = torch.zeros_like(weight)
        weight.grad.to_local().fill_(1e9)
    clipper.before_step(adam)
    found["lonely"] = float(torch.linalg.vector_norm(weight.grad.to_local())) if RANK == 0 else None
    return found


def main() -> None:
    """Answers with a line of JSON."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found = answer()
    print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while the other one's are still at work


if __name__ == "__main__":
    main()
