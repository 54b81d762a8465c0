"""How much memory a sample takes at its peak; `python -m tests.benchmarks.scale_memory KIND SIZE` is its own process.

The peak of the resident memory is that of everything: tensors, hooks, arrays and rows. It never falls, so the process
trains plainly until it does not rise any more, and then with each step sampled; what it rises by then is the answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from lightning_gradflow import GradFlow

from .overhead_fits import Stream, kept_quiet
from .scale_models import Grown, batch_for, grown

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
STEPS = 3


def extra_memory(kind: str, size: int) -> int | None:
    """Bytes by which samples raise the peak; None where the system does not tell (it is Linux that does)."""
    if not STATUS.exists():
        return None
    # large blocks go back to the system as soon as they are free, so that the peak is of what is held
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.benchmarks.scale_memory", kind, str(size)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **tidy}, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak() -> int:
    """Bytes of resident memory at most, so far.

    `resource.getrusage` is not asked: a process takes over there what its parent had.
    """
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main(kind: str, size: int) -> int:
    """Prints the bytes."""
    train(grown("tensors", 4), monitor())  # what is imported once, and caches that are filled once
    module = grown(kind, size)
    train(module)
    train(module)
    before = peak()
    train(module, monitor())
    print(peak() - before)
    return 0


def monitor() -> GradFlow:
    return GradFlow(every_n_steps=1, report=False, console=False)


def train(module: Grown, *callbacks: L.Callback) -> None:
    batch = batch_for(module)
    with tempfile.TemporaryDirectory() as folder, kept_quiet(Path(folder)):
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            max_steps=STEPS,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Stream([batch] * STEPS), batch_size=None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
