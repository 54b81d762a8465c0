"""What a labelled training is, and a Trainer that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

Build = Callable[[int], L.LightningModule]
Data = Callable[[int], "DataLoader[Any]"]


@dataclass(frozen=True)
class Case:
    """One small training on real data whose label (sick or healthy) was settled by its outcome.

    Args:
        name: Key of the case in its registry.
        build: Seed to module. The same seed gives the same initial weights whatever the state of the global generator,
            and the global generator is left as it was.
        data: Seed to a shuffled training loader; the seed fixes the order of the batches.
        max_steps: Optimizer steps within which the label shows; Lightning counts those of every optimizer together.
        val: Seed to a validation loader, for the cases that have one.
        trainer_kwargs: What the case asks of its Trainer besides ``max_steps``.
        twin: For a sick case, the same training without the fault; it learns within ``max_steps``.
        score: Lower is better. Only for a training whose loss does not say whether it learns.
    """

    name: str
    build: Build
    data: Data
    max_steps: int
    val: Data | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    twin: Build | None = None
    score: Callable[[L.LightningModule], float] | None = None

    def fit(self, seed: int, *, build: Build | None = None, **kwargs: Any) -> L.LightningModule:
        """Train the case once from ``seed`` and return the trained module.

        Args:
            seed: Seed of the global generators, the initial weights and the order of the data.
            build: Builds another module in the place of the case's own, for example its twin.
            kwargs: Arguments of the Trainer, such as ``callbacks``; they win over those of the case.
        """
        L.seed_everything(seed, verbose=False)
        module = (build or self.build)(seed)
        trainer = quiet_trainer(**{"max_steps": self.max_steps, **self.trainer_kwargs, **kwargs})
        trainer.fit(module, self.data(seed), self.val(seed) if self.val else None)
        return module


def seeded(make: Callable[[], L.LightningModule]) -> Build:
    """A ``build(seed)`` from a constructor that draws from the global generator."""

    def build(seed: int) -> L.LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return build


def quiet_trainer(**kwargs: Any) -> L.Trainer:
    """A CPU Trainer without logger, checkpoints, progress bar, model summary and sanity check."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **kwargs})
