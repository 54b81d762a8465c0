"""What two ranks run: ``python -m tests.probes.ranks_program``, started twice by the launcher."""

from __future__ import annotations

import datetime
import json
import os
import random
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.packing import pack
from lightning_gradflow.probes.ranks import RankFailedError, Topology
from lightning_gradflow.probes.shards import complete, copies, is_sharded, local
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer
from lightning_gradflow.probes.unpacking import unpack
from tests.probes.gradient_values import by_layer
from tests.probes.naive_signals import drawn

Answer = Any
RANK = int(os.environ.get("RANK", "0"))
PARALLEL, SPLIT = Topology(data=2), Topology(model=2, model_rank=RANK)


class Collectives:
    """Counts the collectives that are asked for."""

    def __init__(self) -> None:
        self.made: list[str] = []
        for name in ("all_reduce", "all_gather_object"):
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.append(name)
            return function(*args, **kwargs)

        return call

    def of(self, action: Any) -> list[str]:
        """Those of an action."""
        before = len(self.made)
        action()
        return self.made[before:]


def fetched(transfer: Transfer, pieces: dict[str, list[float]], failed: bool = False) -> Answer:
    """What comes back of shared pieces, with its names in order, or the error."""
    for name, values in pieces.items():
        transfer.share(name, torch.tensor(values))
    try:
        return [[name, array.tolist()] for name, array in transfer.fetch(failed).items()]
    except (RankFailedError, ValueError) as error:
        return [type(error).__name__, str(error)]


# -- sums -------------------------------------------------------------------------------------------------------------


def sums() -> Answer:
    """Two pieces, and numbers that are on the host already."""
    transfer = Transfer(PARALLEL)
    transfer.put("own", torch.tensor([RANK]))
    transfer.share("pieces", torch.tensor([1.0, 10.0]) * (RANK + 1))
    transfer.share("counts", torch.tensor([RANK + 2]))
    transfer.share_numbers("numbers", [0.5, RANK])
    return {name: array.tolist() for name, array in transfer.fetch().items()}


def names() -> Answer:
    """Names that only one rank has, in the first sample and in a later one."""
    transfer = Transfer(PARALLEL)
    first = fetched(transfer, {"a": [1], "c": [1]} if RANK == 0 else {"a": [1], "b": [5], "c": [1]})
    again = fetched(transfer, {"a": [1], "b": [2]} if RANK == 0 else {"c": [3]})
    late = fetched(transfer, {"a": [1], "late": [7], "b": [2]} if RANK == 0 else {"a": [1]})
    return {"first": first, "again": again, "late": late, "nothing": fetched(transfer, {})}


def collectives(count: Collectives) -> Answer:
    """Samples with the same names, with a new one on one rank, and with the old ones once more."""
    transfer = Transfer(PARALLEL)
    old, new = {"a": [1.0]}, {"a": [1.0], "b": [1.0]}
    samples = [old, old, {}, new if RANK == 0 else old, old, new]
    return [count.of(lambda sample=sample: fetched(transfer, sample)) for sample in samples]


def lengths() -> Answer:
    """A name with two lengths, and what is summed afterwards."""
    transfer = Transfer(PARALLEL)
    bad = fetched(transfer, {"a": [1.0] * (RANK + 1)})
    return {"bad": bad, "after": fetched(transfer, {"b": [1.0]})}


def failure(count: Collectives) -> Answer:
    """A rank that failed, once with names that are agreed on and once in the first sample of all."""
    answer = {}
    for case in ("agreed", "first"):
        transfer = Transfer(PARALLEL)
        if case == "agreed":
            fetched(transfer, {"a": [1.0]})
        errors: list[Answer] = []
        made = count.of(lambda t=transfer, e=errors: e.append(fetched(t, {"a": [1.0]} if RANK else {}, RANK == 0)))
        answer[case] = {"error": errors[0][0], "made": made, "after": fetched(transfer, {"a": [2.0]})}
    return answer


# -- signals ----------------------------------------------------------------------------------------------------------


def sampled(probe: SignalProbe, transfer: Transfer, model: nn.Module, x: Tensor) -> Answer:
    """The signals of one step."""
    probe.start_batch()
    loss = model(x).mean()
    probe.before_backward()
    loss.backward()
    probe.after_backward()
    probe.finish()
    signals = probe.collect(transfer.fetch())
    return {
        "points": {point.name: dict(values) for point, values in signals.points.items()},
        "calls": {name: calls.tolist() for name, calls in signals.calls.items()},
    }


def relus(weight: list[list[float]]) -> nn.Sequential:
    """A layer of these weights with ReLUs behind."""
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False), nn.ReLU())
    model[0].weight.data = torch.tensor(weight)
    return model


def halves_of_a_batch(count: Collectives) -> Answer:
    """Each rank sees one half of a batch of two; unit 0 fires for the one, unit 1 for the other, unit 2 for none."""
    model, transfer = relus([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]), Transfer(PARALLEL)
    probe = SignalProbe(LayerMap(model), transfer, window=1)
    x = torch.tensor([[1.0, 0.0]]) if RANK == 0 else torch.tensor([[0.0, 3.0]])
    answer = sampled(probe, transfer, model, x)
    answer["made"] = count.of(lambda: sampled(probe, transfer, model, x))
    return answer


def loops_of_two_lengths() -> Answer:
    """One turn on rank 0, which so has no calls of its own, and three on rank 1."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.cell(x) for _ in range(1 + 2 * RANK)]).sum(0)

    model, transfer = Loop(), Transfer(PARALLEL)
    return sampled(SignalProbe(LayerMap(model), transfer), transfer, model, torch.ones(1, 1))


def a_branch_of_one_rank() -> Answer:
    """A layer that only rank 1 runs."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rare, self.last = (nn.Linear(1, 1) for _ in range(3))
            for parameter in self.parameters():
                nn.init.ones_(parameter)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.rare(x) if RANK else x)

    model, transfer = Branch(), Transfer(PARALLEL)
    answer = sampled(SignalProbe(LayerMap(model), transfer), transfer, model, torch.ones(1, 1))
    return answer | {"order": list(answer["points"])}


def an_empty_batch_of_one_rank() -> Answer:
    """Rank 0 has nothing to see."""
    model, transfer = relus([[3.0]]), Transfer(PARALLEL)
    probe = SignalProbe(LayerMap(model), transfer, window=1)
    probe.start_batch()
    loss = model(torch.ones(RANK, 1)).sum()
    probe.before_backward()
    loss.backward()
    probe.finish()
    return {point.name: dict(values) for point, values in probe.collect(transfer.fetch()).points.items()}


def an_error_of_one_rank() -> Answer:
    """Rank 0 fails in the forward pass; who fails says so, as the sampler does."""
    model, transfer = relus([[1.0]]), Transfer(PARALLEL)
    probe = SignalProbe(LayerMap(model), transfer)
    if RANK == 0:
        probe._take = None  # type: ignore[method-assign, assignment]
    error = ""
    try:
        sampled(probe, transfer, model, torch.ones(1, 1))
    except RankFailedError as told:
        error = type(told).__name__
    except Exception as own:
        error = type(own).__name__
        transfer.drop()
        fetched(transfer, {}, failed=True)
    return {"error": error, "after": fetched(transfer, {"a": [1.0]})}


def drawn_samples() -> Answer:
    """Samples drawn at random, other ones on each rank, three of them in a row."""
    answer = []
    for seed in range(6):
        transfer, silent, draw = Transfer(PARALLEL), SilentUnits(2), random.Random(2 * seed + RANK)
        for i in range(3):
            same = random.Random(100 * seed + i)
            pack(drawn(draw, same), {}, transfer)
            signals = unpack(transfer.fetch(), PARALLEL, silent, 1.0)
            points = {point.name: values for point, values in signals.points.items()}
            answer.append({"points": points, "calls": {name: norms.tolist() for name, norms in signals.calls.items()}})
    return answer


WHOLE = [[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [1.0, 1.0]]


def a_split_layer() -> Answer:
    """Each rank has half of the units of one layer, and both see the same batch."""
    model, transfer = relus(WHOLE[2 * RANK : 2 * RANK + 2]), Transfer(SPLIT)
    probe = SignalProbe(LayerMap(model), transfer, window=1)
    probe.start_batch()
    loss = model(torch.tensor([[1.0, 2.0], [3.0, 1.0]])).square().sum()
    probe.before_backward()
    loss.backward()
    probe.finish()
    return {point.name: dict(values) for point, values in probe.collect(transfer.fetch()).points.items()}


def an_unevenly_split_layer() -> Answer:
    """Rank 0 has three of the units and rank 1 the last one; two samples, for a window of two."""
    model, transfer = relus(WHOLE[:3] if RANK == 0 else WHOLE[3:]), Transfer(SPLIT)
    probe = SignalProbe(LayerMap(model), transfer, window=2)
    samples = [sampled(probe, transfer, model, torch.ones(2, 2)) for _ in range(2)]
    return [sample["points"]["1"]["dead_fraction"] for sample in samples]


def a_layer_on_all_parts() -> Answer:
    """Both ranks have the same layer and see the same batch."""
    model, transfer = relus(WHOLE), Transfer(SPLIT)
    return sampled(SignalProbe(LayerMap(model), transfer, window=1), transfer, model, torch.ones(2, 2))["points"]


# -- shards -----------------------------------------------------------------------------------------------------------


def shards(mesh: DeviceMesh, grid: DeviceMesh) -> Answer:
    """What is here of tensors that are spread in every way."""
    five, one = torch.arange(5.0), torch.ones(1)
    partial = DTensor.from_local(torch.tensor([1.0, 2.0]) * (RANK + 1), mesh, [Partial()])
    spread = {
        "shard": distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]),
        "uneven": distribute_tensor(five, mesh, [Shard(0)]),
        "empty": distribute_tensor(one, mesh, [Shard(0)]),
        "replicate": distribute_tensor(five, mesh, [Replicate()]),
        "partial": partial,
        "replicate and shard": distribute_tensor(torch.arange(4.0), grid, [Replicate(), Shard(0)]),
        "plain": five,
    }
    answer = {}
    for name, tensor in spread.items():
        here, whole = local(tensor), local(complete(tensor))
        answer[name] = {
            "is_sharded": is_sharded(tensor),
            "local": None if here is None else here.tolist(),
            "complete": None if whole is None else whole.tolist(),
            "copies": copies(tensor, 2),
        }
    return answer


class Spread(nn.Module):
    """Layers whose parameters are spread in every way, and a plain one; all of it the same on each number of ranks."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, rows in {
            "even": 4,
            "uneven": 5,
            "empty": 1,
            "replicated": 3,
            "partial": 2,
            "frozen": 2,
            "plain": 2,
        }.items():
            weight = torch.randn(rows, 3, generator=generator)
            gradient = torch.randn(rows, 3, generator=generator)
            gradient[0, 0] = 0
            if mesh is not None and name != "plain":
                placements = [Replicate()] if name in ("replicated", "partial") else [Shard(0)]
                weight = distribute_tensor(weight, mesh, placements)
                if name == "partial":
                    gradient = DTensor.from_local(gradient * (0.25 + 0.5 * RANK), mesh, [Partial()])
                else:
                    gradient = distribute_tensor(gradient, mesh, placements)
            layer = nn.Module()
            layer.weight = nn.Parameter(weight)
            if name != "frozen":
                layer.weight.grad = gradient
            self.add_module(name, layer)


def stepped(model: nn.Module, topology: Topology, optimizer: Any, transfer: Transfer | None = None) -> Answer:
    """The statistics of a step; before it, all gradients are halved."""
    transfer = transfer or Transfer(topology)
    layers = LayerMap(model)
    probe = GradientProbe(layers, transfer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    probe.measure(0, parameters, 2.0)
    for parameter in parameters:
        if parameter.grad is not None:
            # torch 2.6 leaves a gradient whose parts must be added up as it is
            (parameter.grad.to_local() if is_sharded(parameter.grad) else parameter.grad).mul_(0.5)
    optimizer.step()
    probe.after_step(0)
    probe.finish()
    columns = probe.collect(transfer.fetch())
    return {
        "found": by_layer(columns),
        "clip_factor": columns.clip_factor(2.0),
        "histograms": {name: row.tolist() for name, row in columns.histograms(layers.names).items()},
        "spread": list(layers.spread),
    }


def gradients(mesh: DeviceMesh) -> Answer:
    """The same step with spread parameters and, on each rank for itself, with whole ones."""
    answer = {}
    for name, model, topology in (
        ("spread", Spread(mesh), PARALLEL),
        ("whole", Spread(None), Topology()),
    ):
        answer[name] = stepped(model, topology, torch.optim.SGD(model.parameters(), lr=0.1, foreach=False))
    answer["later"] = {}
    model, transfer = Spread(mesh), Transfer(PARALLEL)
    for part in ("even", "uneven"):  # another optimizer has its turn, or a layer is unfrozen
        optimizer = torch.optim.SGD(model.get_submodule(part).parameters(), lr=0.1, foreach=False)
        if part == "uneven":
            optimizer.add_param_group({"params": model.get_submodule("empty").parameters()})
        answer["later"][part] = list(stepped(model, PARALLEL, optimizer, transfer)["found"])
    return answer


def nonfinite(mesh: DeviceMesh) -> Answer:
    """One entry on rank 1 alone is no number."""
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    model.weight.grad = distribute_tensor(torch.tensor([1.0, 1.0, 1.0, float("nan")]), mesh, [Shard(0)])
    transfer = Transfer(PARALLEL)
    probe = GradientProbe(LayerMap(model), transfer)
    probe.measure(0, model.parameters())
    probe.after_step(0)
    probe.finish()
    return by_layer(probe.collect(transfer.fetch()), scaled=True)["(root)"]


def main() -> None:
    """Answers everything in one line of JSON."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")  # torch 2.6
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    mesh = DeviceMesh("cpu", [0, 1])
    grid = DeviceMesh("cpu", [[0, 1]])
    count = Collectives()
    answer = {
        "sums": sums(),
        "names": names(),
        "collectives": collectives(count),
        "lengths": lengths(),
        "failure": failure(count),
        "halves of a batch": halves_of_a_batch(count),
        "loops of two lengths": loops_of_two_lengths(),
        "a branch of one rank": a_branch_of_one_rank(),
        "an empty batch of one rank": an_empty_batch_of_one_rank(),
        "drawn samples": drawn_samples(),
        "an error of one rank": an_error_of_one_rank(),
        "a split layer": a_split_layer(),
        "an unevenly split layer": an_unevenly_split_layer(),
        "a layer on all parts": a_layer_on_all_parts(),
        "shards": shards(mesh, grid),
        "gradients": gradients(mesh),
        "nonfinite": nonfinite(mesh),
    }
    print(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
