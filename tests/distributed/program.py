"""What the ranks run: ``python -m tests.distributed.program GROUP FOLDER``, started by the launcher."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from packaging.version import Version  # Lightning brings it along
from torch import Tensor, nn

from lightning_gradflow import GradNormLogger
from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.callbacks.steps import Steps
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.recorder import Recorder

from .launcher import RANKS
from .nets import BATCH, Branching, Mixed, Sigmoids
from .rank import (
    RANK,
    Answer,
    Breaks,
    Collectives,
    LocalLosses,
    Saves,
    Task,
    Validated,
    Witness,
    fit,
    loader,
    numbers,
    seen,
    watch,
)
from .runs import CROSSED, REPLICATED, SHARDED, Prepare, Run, ddp, inner, sharded, whole
from .treated import treated, treated_shards

PLACES = {
    "start of a batch": (Steps, "batch_start"),
    "forward pass": (SignalProbe, "_take"),
    "gradients": (GradientProbe, "measure"),
    "end of a batch": (Sampler, "end_batch"),
    "row": (Recorder, "add"),
}
"""Where something of ours can raise: in the user's forward pass, before the ranks meet, and after it (the last one)."""
JUDGEMENT = {"row": (Recorder, "add"), "detector": (VanishingGradient, "judge")}
"""Where something of ours can raise between the numbers, which all ranks have, and what is done about them."""
HAS_FSDP2 = Version(torch.__version__) >= Version("2.7")
"""Whether FSDP2 runs on the CPU."""
_LIMIT = 220.0  # seconds, a little less than the launcher waits: only here can the hanging line be told


def measured(run: Run, name: str, folder: Path) -> Answer:
    """One run of the table, with its weights in a file."""
    L.seed_everything(1, verbose=False)
    kind = Validated if "val_check_interval" in run.kwargs else Task
    witness, flow = Witness(), watch()
    _, told = fit(
        kind(run.make().to(run.dtype), run.prepare),
        run.strategy(),
        loader(run.rows, run.replicas),
        [witness, flow],
        accumulate_grad_batches=run.accumulated,
        **run.kwargs,
    )
    if RANK == 0:
        torch.save(witness.kept, folder / f"{name}.pt")
    return {**seen(flow), "told": told}


def collectives(make: Callable[[], nn.Module], strategy: Callable[[], Strategy], prepare: Prepare | None) -> Answer:
    """How many collectives each step has with us, less those that it has without us."""
    found, flow = [], watch(every_n_steps=4)
    for callbacks in ([flow], []):
        L.seed_everything(1, verbose=False)
        counter = Collectives()
        fit(Task(make(), prepare), strategy(), loader(2 * BATCH * 12), [counter, *callbacks], max_steps=12)
        found.append(counter.by_step)
    return {"steps": flow.history.steps.tolist(), "ours": [a - b for a, b in zip(*found, strict=True)]}


def gradients_alone(make: Callable[[], nn.Module], strategy: Callable[[], Strategy], prepare: Prepare | None) -> Answer:
    """The gradients at every step, and the same where everything is measured at every step."""
    found: Answer = {}
    for name, monitor in (("alone", GradNormLogger(1)), ("everything", watch())):
        L.seed_everything(1, verbose=False)
        fit(Task(make(), prepare), strategy(), loader(2 * BATCH * 12), [monitor], max_steps=12)
        history = monitor.history
        found[name] = {
            "norms": history["grad_norm"].tolist(),
            "losses": history.losses.tolist(),
            "whole": [row.step for row in history.rows if not row.gradients_only],
            "measured": [sorted(row.values) for row in history.rows if row.gradients_only],
            "clipped": history.scalar("clip_factor").tolist(),
        }
    return found


def sick(strategy: Strategy, folder: Path, prepare: Prepare | None = None, **kwargs: Any) -> Answer:
    """Sigmoids that learn nothing, with all that a person gets to see; each rank has a folder of its own."""
    L.seed_everything(1, verbose=False)
    root = folder / f"rank {RANK}"
    module = Task(Sigmoids(), prepare)
    flow = watch(8, saturation=None, report=True, **kwargs)
    local = LocalLosses()
    _, told = fit(module, strategy, loader(2 * BATCH * 96), [local, flow], default_root_dir=root)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return {**seen(flow), "told": told, "files": files, "local": local.kept, "weights": numbers(module)}


def validated() -> Answer:
    """A run with a validation in each epoch, whose losses differ between the ranks."""
    L.seed_everything(1, verbose=False)
    module, flow = Validated(Mixed()), watch()
    _, told = fit(module, ddp(), loader(2 * BATCH * 3), [flow], max_epochs=2)
    module.eval()
    with torch.no_grad():
        mine = [module.training_step(batch, 0).item() for batch in loader(8 * BATCH, seed=4)]
    return {**seen(flow), "told": told, "mine": mine}


def resumed(strategy: Callable[[], Strategy], folder: Path, prepare: Prepare | None = None) -> Answer:
    """Two epochs in one go, and the second of them once more from a checkpoint."""
    path = str(folder / f"{type(strategy()).__name__}.ckpt")
    answers = []
    for extra, start in (([Saves(path)], None), ([], path)):
        L.seed_everything(1, verbose=False)
        flow = watch(4)
        train = loader(2 * BATCH * 6)
        fit(Task(Mixed(), prepare), strategy(), train, [*extra, flow], max_epochs=2, ckpt_path=start)
        answers.append(seen(flow))
    return dict(zip(("in one go", "resumed"), answers, strict=True))


class OneIsNotANumber(Task):
    """The loss of rank 1 breaks in the fourth step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of this rank's batch."""
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if RANK == 1 and batch_idx == 3 else loss


class Late(Branching):
    """The branch is taken on one rank, from the fifth batch on."""

    batches = 0

    def takes_branch(self, x: Tensor) -> bool:
        """Whether these rows are those of rank 0, and late."""
        self.batches += 1
        return self.batches > 4 and super().takes_branch(x)


def plain(module: L.LightningModule, strategy: Strategy) -> Answer:
    """A run of which only the agreement of the ranks is asked."""
    flow = watch()
    _, told = fit(module, strategy, loader(2 * BATCH * 8), [flow])
    return {**seen(flow), "told": told, "weights": numbers(module)}


def broken(place: str | None, rank: int = 0) -> Answer:
    """A run in which something of ours raises on one rank, or one without us."""
    L.seed_everything(1, verbose=False)
    module, flow = Task(Mixed()), watch(2)
    breaks = [Breaks(*PLACES[place], batch=4)] if place is not None and rank == RANK else []
    callbacks = [*breaks, flow] if place is not None else []
    try:
        trainer, told = fit(module, ddp(), loader(2 * BATCH * 12), callbacks)
    except RuntimeError as error:  # a rank waited in vain; the other runs are to be seen all the same
        mock.patch.stopall()
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        return {"failed": str(error)}
    return {**seen(flow), "told": told, "done": trainer.global_step, "weights": numbers(module)}


def decided(place: str) -> Answer:
    """A run that treats what it finds, in which something of ours raises on rank 1 before it has found anything."""
    L.seed_everything(1, verbose=False)
    module, flow = Task(Sigmoids()), watch(2, saturation=None, mitigate="apply")
    breaks = [Breaks(*JUDGEMENT[place], batch=0)] if RANK == 1 else []
    fit(module, ddp(), loader(2 * BATCH * 8), [*breaks, flow])
    return {"weights": numbers(module)}


def replicated(folder: Path) -> Answer:
    """Every rank holds all weights."""
    return {
        **{name: measured(run, name, folder) for name, run in REPLICATED.items()},
        "sick": sick(ddp(), folder),
        "validated": validated(),
        "collectives": {"DDP": collectives(Mixed, ddp, None)},
        "gradients alone": {"DDP": gradients_alone(Mixed, ddp, None)},
        "resumed": resumed(ddp, folder),
        "a loss is not a number": plain(OneIsNotANumber(Mixed()), ddp()),
        "a branch that is taken late": plain(Task(Late()), ddp(find_unused_parameters=True)),
    }


def spread(folder: Path) -> Answer:
    """Weights are spread over the ranks."""
    fsdp2 = SHARDED["FSDP2"]
    counted = {name: SHARDED[name] for name in ("FSDP2", "tensor parallel", "tensor parallel, DTensors throughout")}
    return {
        **{name: measured(run, name, folder) for name, run in SHARDED.items()},
        "collectives": {name: collectives(run.make, run.strategy, run.prepare) for name, run in counted.items()},
        "gradients alone": {"FSDP2": gradients_alone(fsdp2.make, fsdp2.strategy, fsdp2.prepare)},
        "resumed": resumed(sharded, folder, whole),
        "sharded in part": plain(Task(Mixed(), inner), sharded()),
    }


def crossed(folder: Path) -> Answer:
    """Weights are spread over the ranks in two ways at once."""
    return {name: measured(run, name, folder) for name, run in CROSSED.items()}


def troubled(folder: Path) -> Answer:
    """What must neither stop a run nor let the ranks drift apart."""
    del os.environ["LIGHTNING_GRADFLOW_RAISE"]
    return {
        "without us": broken(None),
        "errors": {f"{place} on rank {rank}": broken(place, rank) for place in PLACES for rank in range(RANKS)},
        "decided": {place: decided(place) for place in JUDGEMENT},
        "applied": sick(ddp(), folder / "applied", mitigate="apply"),
    }


GROUPS: dict[str, Callable[[Path], Answer]] = {
    "replicated": replicated,
    "spread": spread,
    "crossed": crossed,
    "troubled": troubled,
    "treated": lambda _: treated(),
    "treated shards": lambda _: treated_shards(),
}


def main(group: str, folder: str) -> None:
    """Runs a group and prints what this rank saw."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_LIMIT, exit=True)
    answer = GROUPS[group](Path(folder))
    dist.destroy_process_group()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
