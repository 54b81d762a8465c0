"""What it costs to watch a network as large as GPT-2 small on a GPU, in bf16 and compiled, and how often it waits.

`python -m tests.benchmarks.gpu` needs CUDA, and says so where there is none. Batches lie on the device already, so that
what waits for it is the training or the callback. It counts the warnings of `torch.cuda.set_sync_debug_mode`, step by
step: those of a plain training are what Lightning itself does, and are taken off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_gradflow import GradFlow

from .cost_models import Model, Network, Transformer, tokens
from .detection import environment
from .overhead_fits import Stream, kept_quiet

NO_GPU = "tests.benchmarks.gpu: skipped, for there is no CUDA device here"
SYNC = "called a synchronizing CUDA operation"
VOCABULARY = 50257
GPT2 = Model(
    "as large as GPT-2 small",
    partial(Transformer, 12, 768, 12, VOCABULARY, tied=True),
    partial(tokens, 8, 512, VOCABULARY),
)
ARMS = {"plain": None, "default": 50, "every step": 1}
"""Arm -> `every_n_steps`."""
SKIPPED = 70
"""Steps that are not timed: those that compile, and the dense samples at the beginning of the default cadence."""


class Meter(L.Callback):
    """Counts what waits for the device in each step, or times the steps behind the first `skipped` ones.

    Args:
        caught: the list that warnings are put into.
        skipped: steps before the clock starts; None where waits are counted, and nothing is timed.
        total: steps of the fit.
    """

    def __init__(self, caught: list[Any], skipped: int | None, total: int) -> None:
        self.caught, self.skipped, self.total = caught, skipped, total
        self.counts: list[int] = []
        self.times: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(count(self.caught))
        if batch_idx == self.skipped:
            self._note()

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(count(self.caught))
        if self.skipped is not None:
            self._note()

    def _note(self) -> None:
        """Waits for the device: so the time is that of its work, and not of the queue."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Seconds of a step, as a mean."""
        return (self.times[-1] - self.times[0]) / (self.total - (self.skipped or 0))

    @property
    def waits(self) -> list[int]:
        """In each step."""
        return np.diff(self.counts).tolist()


def count(caught: Sequence[Any]) -> int:
    """How many of the warnings tell that the host waited for the device."""
    return sum(SYNC in str(one.message) for one in caught)


def per_step(watched: Sequence[int], plain: Sequence[int], sampled: Sequence[int]) -> dict[str, int]:
    """The most that the callback waited in a step that it sampled, and in any other.

    Args:
        watched: (S,) waits in each step of a watched fit.
        plain: (S,) the same of a plain one.
        sampled: the steps that were sampled.
    """
    extra = [one - other for one, other in zip(watched, plain, strict=True)]
    at = set(sampled)
    return {
        "sampled": max((extra[i] for i in at), default=0),
        "between": max((one for i, one in enumerate(extra) if i not in at), default=0),
    }


def train(model: Model, every_n_steps: int | None, steps: int, *, counts: bool, device: str = "cuda") -> Any:
    """One fit: its meter, and the steps that were sampled."""
    torch.manual_seed(0)
    module = Network(torch.compile(model.net()) if device == "cuda" else model.net())
    batches = [tuple(part.to(device) for part in batch) for batch in model.batches(4)]
    flow = GradFlow(every_n_steps=every_n_steps, report=False, console=False) if every_n_steps else None
    with tempfile.TemporaryDirectory() as name, kept_quiet(Path(name)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meter = Meter(caught, None if counts else min(SKIPPED, steps // 2), steps)
        trainer = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=1,
            max_steps=100 * steps,
            logger=False,
            callbacks=[meter, *([flow] if flow is not None else [])],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DataLoader(Stream([batches[i % 4] for i in range(steps)]), batch_size=None)
        if counts and device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.fit(module, data)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return meter, tuple(flow.history.steps.tolist()) if flow is not None else ()


def measure(model: Model, rounds: int, steps: int, device: str = "cuda") -> dict[str, Any]:
    """Waits, and the ratio of a step to one of the plain fit of the same round."""
    plain, _ = train(model, None, steps, counts=True, device=device)
    found: dict[str, Any] = {"plain": {"waits_per_step": float(np.median(plain.waits))}}
    for name, every in ARMS.items():
        if every is not None:
            meter, sampled = train(model, every, steps, counts=True, device=device)
            # the same steps compile in each fit but those that run eagerly, and compiling waits: it is left out
            skip = steps // 3
            of = [step - skip for step in sampled if step >= skip]
            found[name] = {"waits": per_step(meter.waits[skip:], plain.waits[skip:], of), "samples": len(of)}
    ratios: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(rounds):
        took = {name: train(model, every, steps, counts=False, device=device)[0].step for name, every in ARMS.items()}
        for name, seconds in took.items():
            ratios[name].append(seconds / took["plain"])
        found["plain"].setdefault("step_ms", []).append(1e3 * took["plain"])
    for name, of_it in ratios.items():
        found[name]["step"] = dict(zip(("low", "median", "high"), np.percentile(of_it, [25, 50, 75]), strict=True))
    return found


def main(argv: list[str]) -> int:
    """Runs the benchmark and prints its numbers as JSON; without a GPU it does nothing, and that is no error."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed fits of each arm")
    parser.add_argument(
        "--steps", type=int, default=270, help="steps of a fit: 70 that are not timed, and four samples"
    )
    parser.add_argument("--out", type=Path, help="where the results are written")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    torch.set_float32_matmul_precision("high")
    found = {
        "environment": environment() | {"gpu": torch.cuda.get_device_name()},
        "parameters": sum(p.numel() for p in GPT2.net().parameters()),
        **measure(GPT2, arguments.rounds, arguments.steps),
    }
    text = json.dumps(found, indent=1)
    print(text)
    waits = [found[name]["waits"] for name in ("default", "every step")]
    is_good = all(one["between"] <= 0 and one["sampled"] <= 1 for one in waits)
    print(f"waits: 0 between samples and at most 1 in one: {'met' if is_good else 'NOT MET'}")
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
