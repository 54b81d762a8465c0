"""Train every case over some seeds and check its label by the outcome.

``python -m tests.benchmarks.zoo.outcomes [name ...]``
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import lightning as L
import torch

from . import HEALTHY, SICK, Case

MAX_HEALTHY_RATIO = 0.8
MAX_TWIN_RATIO = 0.6  # what the twin may keep of its loss at the start
MIN_SICK_RATIO = 0.5  # what the sick training must keep of the same loss
MAX_TWIN_SHARE = 0.5  # the twin's loss at the end, as a share of the sick training's


class Losses(L.Callback):
    """Keeps the loss that each training step returned."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self.values.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


@dataclass(frozen=True)
class Outcome:
    """Loss (or score) at the start and at the end of one training, and what it took."""

    start: float
    end: float
    seconds: float

    @property
    def ratio(self) -> float:
        """What is left of the loss."""
        return self.end / self.start


def outcome(case: Case, seed: int) -> Outcome:
    """Train once; the loss at either end is a mean over 3 batches at the start and 20 at the end."""
    losses = Losses()
    began = time.perf_counter()
    module = case.fit(seed, callbacks=[losses])
    seconds = time.perf_counter() - began
    if case.score is not None:
        return Outcome(case.score(case.build(seed)), case.score(module), seconds)
    return Outcome(fmean(losses.values[:3]), fmean(losses.values[-20:]), seconds)


def is_sick(own: Outcome, twin: Outcome) -> bool:
    """Whether a training failed where its fault-free twin learnt.

    A sick training is measured by its twin: what the fault does to the loss at the start must not count as progress.
    """
    # Turned round, because a loss that ended as NaN is the worst of all.
    learned = own.end < MIN_SICK_RATIO * twin.start or twin.end > MAX_TWIN_SHARE * own.end
    return twin.ratio <= MAX_TWIN_RATIO and not learned


def holds(case: Case, seed: int) -> tuple[bool, str]:
    """Whether the label of ``case`` is what ``seed`` shows, and the figures in words."""
    own = outcome(case, seed)
    words = f"{own.start:.3g} -> {own.end:.3g}"
    if case.twin is None:
        return own.ratio <= MAX_HEALTHY_RATIO, f"{words} ({own.seconds:.1f} s)"
    twin = outcome(case.without_fault, seed)
    return is_sick(own, twin), f"{words}, twin {twin.start:.3g} -> {twin.end:.3g} ({own.seconds:.1f} s)"


def main() -> int:
    """Print one line per case; the exit status is 1 if a label does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases to train; all of them where none is named")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for label, cases in (("sick", SICK), ("healthy", HEALTHY)):
        for case in cases.values():
            if arguments.names and case.name not in arguments.names:
                continue
            results = [holds(case, seed) for seed in range(arguments.seeds)]
            wrong += sum(not right for right, _ in results)
            verdict = "holds" if all(right for right, _ in results) else "WRONG"
            print(f"{label:8}{case.name:26}{verdict}  " + " | ".join(words for _, words in results), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
