"""How the cost of a sample, and what is kept of it, grow with the network.

`python -m tests.benchmarks.scale` makes networks of 100 to 10,000 parameter tensors, and of 1 to 200 million
parameters. In each it samples every second step, and holds a sampled step against its two neighbours.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_gradflow import GradFlow, GradNormLogger
from lightning_gradflow.callbacks.base import Monitor

from .detection import environment
from .overhead_fits import Clock, Stream, kept_quiet
from .report import write
from .scale_memory import extra_memory
from .scale_models import KINDS, Grown, batch_for, grown
from .scale_report import markdown

RESULTS = Path(__file__).with_name("results") / "scale.json"
DENSE = 4
"""Steps before which `every_n_steps=2` samples more often than every second step."""
INTERVAL = 50
RUN = 1_000_000
"""Steps of a long run, and how far apart its samples are."""

WATCHES: dict[str, Callable[[], Monitor]] = {
    "everything": lambda: GradFlow(every_n_steps=2, report=False, console=False),
    "gradients": lambda: GradNormLogger(every_n_steps=2),
}

# -- statistics -------------------------------------------------------------------------------------------------------


def sample_cost(steps: Sequence[float]) -> float:
    """What a sampled step takes more than its two neighbours, as a median; every second step is sampled.

    Example: with steps of 1 s, and 3 s where one is sampled, it is 2 s.
    """
    taken = np.array(steps)
    sampled = np.arange(DENSE, len(taken) - 1, 2)
    return float(np.median(taken[sampled] - (taken[sampled - 1] + taken[sampled + 1]) / 2))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power of the size with which a cost grows: the slope of its logarithm against that of the size.

    1 is linear; a constant part makes it smaller. NaN where a cost is not above 0, or there is but one size.
    """
    if len(sizes) < 2 or min(costs) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# -- measuring --------------------------------------------------------------------------------------------------------


def steps_of(
    module: Grown, monitor: Monitor, steps: int, now: Callable[[], float] = time.perf_counter
) -> tuple[float, ...]:
    """Seconds of each step of a fit."""
    clock, batch = Clock(now), batch_for(module)
    with tempfile.TemporaryDirectory() as folder, kept_quiet(Path(folder)):
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            max_steps=RUN,
            logger=False,
            callbacks=[clock, monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Stream([batch] * steps), batch_size=None))
    return clock.steps


class _Counter(io.RawIOBase):
    """Counts what is written, and keeps none of it."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def state_size(monitor: Monitor) -> int:
    """Bytes that a monitor adds to a checkpoint."""
    counter = _Counter()
    torch.save(monitor.state_dict(), counter)
    return counter.size


def lengthen(monitor: Monitor, steps: int) -> None:
    """Goes on with copies of the newest row up to a step, at the usual interval, as if there had been that many."""
    newest = monitor.history.rows[-1]
    losses = np.random.default_rng(0).random(INTERVAL)
    for step in range(newest.step + INTERVAL, steps, INTERVAL):
        monitor.history.append(replace(newest, step=step, losses=losses))


def measure(
    kind: str, size: int, pairs: int, with_memory: bool, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """All of one size."""
    module = grown(kind, size)
    found: dict[str, Any] = {
        "tensors": sum(1 for _ in module.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    for name, make in WATCHES.items():
        monitor = make()
        steps = steps_of(module, monitor, DENSE + 2 * pairs + 1, now)
        found[name] = {"sample_ms": 1e3 * sample_cost(steps)}
        found["step_ms"] = 1e3 * float(np.median(steps[DENSE + 1 :: 2]))
        if name == "everything":
            found["findings"] = [f"{finding.kind}: {finding.cause}" for finding in monitor.findings]
            found["rows"] = len(monitor.history)
            found["state_bytes"] = state_size(monitor)
            for reached in (RUN // 10, RUN):
                lengthen(monitor, reached)
                found[f"rows_after_{reached}"] = len(monitor.history)
            found[f"state_bytes_after_{RUN}"] = state_size(monitor)
    if with_memory:
        found["extra_bytes"] = extra_memory(kind, size)
    return found


def exponents(kind: str, sizes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By watch: over all sizes, and between the two largest, where a constant part counts least."""
    of: dict[str, dict[str, float]] = {}
    for name in WATCHES:
        at, costs = [one[kind] for one in sizes], [one[name]["sample_ms"] for one in sizes]
        of[name] = {"all": exponent(at, costs), "last": exponent(at[-2:], costs[-2:])}
    return of


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    for kind, sizes in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=list(sizes), help="sizes; none to leave them out")
    parser.add_argument("--pairs", type=int, default=9, help="samples that the median is taken of")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak of the memory")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of the CPU, to try it where others use the machine too"
    )
    parser.add_argument("--out", type=Path, help=f"where the results are written, such as {RESULTS.name}")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the benchmark, prints its tables, and writes the results."""
    arguments = parse(argv)
    began = time.perf_counter()
    steps_of(grown("tensors", 4), WATCHES["everything"](), DENSE)  # imports, and what torch does once
    now = time.process_time if arguments.cpu_time else time.perf_counter
    grows: dict[str, Any] = {}
    for kind in KINDS:
        sizes = []
        for size in getattr(arguments, kind):
            sizes.append(measure(kind, size, arguments.pairs, not arguments.no_memory, now))
            print(f"{size} {kind}: {json.dumps(sizes[-1])}", flush=True)
        if sizes:
            grows[kind] = {"sizes": sizes, "exponents": exponents(kind, sizes)}
    found = {
        "environment": environment() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "pairs": arguments.pairs,
        "clock": "CPU" if arguments.cpu_time else "wall",
        "run": {"steps": RUN, "interval": INTERVAL},
        "grows": grows,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    print("\n" + markdown(found))
    if arguments.out:
        write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
