"""What a labelled training is, and a Trainer that says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

Build = Callable[[int], L.LightningModule]
Data = Callable[[int], "DataLoader[Any]"]
Half = Literal["fit", "report"]


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
        twin_data: Training loader of the twin, where the fault is in the data.
        twin_kwargs: ``trainer_kwargs`` of the twin, where the fault is in those.
        score: Lower is better. Only for a training whose loss does not say whether it learns.
        kinds: For a sick case, the kinds of finding that name its fault; any one of them is right.
        causes: For a sick case, the causes that are right.
        onset: Optimizer steps made before the fault sets in; 0 for a fault that is there at initialisation.
        layers: Fully qualified names of the layers that are right to name; empty where the layer is not judged.
        family: What the case is a variant of; its own name where nothing is said. Leaving one family out leaves out
            every case that resembles another.
        half: Whether limits may be fitted on the case or only reported on it; settled by the family alone.
    """

    name: str
    build: Build
    data: Data
    max_steps: int
    val: Data | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    twin: Build | None = None
    score: Callable[[L.LightningModule], float] | None = None
    kinds: frozenset[str] = frozenset()
    causes: frozenset[str] = frozenset()
    onset: int = 0
    layers: tuple[str, ...] = ()
    family: str = ""
    half: Half = "fit"
    twin_data: Data | None = None
    twin_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.name)

    @property
    def without_fault(self) -> Case:
        """The training of the twin as a healthy case of its own."""
        if self.twin is None:
            raise ValueError(f"{self.name} has no twin")
        kwargs = self.trainer_kwargs if self.twin_kwargs is None else self.twin_kwargs
        return Case(
            f"{self.name}_twin",
            self.twin,
            self.twin_data or self.data,
            self.max_steps,
            val=self.val,
            trainer_kwargs=kwargs,
            score=self.score,
            family=self.family,
            half=self.half,
        )

    def fit(self, seed: int, *, build: Build | None = None, **kwargs: Any) -> L.LightningModule:
        """Train the case once from ``seed`` and return the trained module.

        Args:
            seed: Seed of the global generators, the initial weights and the order of the data.
            build: Builds another module in the place of the case's own.
            kwargs: Arguments of the Trainer, such as ``callbacks``; they win over those of the case.
        """
        L.seed_everything(seed, verbose=False)
        module = (build or self.build)(seed)
        trainer = quiet_trainer(**{"max_steps": self.max_steps, **self.trainer_kwargs, **kwargs})
        trainer.fit(module, self.data(seed), self.val(seed) if self.val else None)
        return module


def halved(*registries: Mapping[str, Case]) -> list[dict[str, Case]]:
    """The same registries with whole families dealt in turn to the two halves, in alphabetical order.

    Each registry deals the families that none before it has, so that every one of them is balanced and a family that
    two of them share is in one half.
    """
    halves: dict[str, Half] = {}
    for cases in registries:
        new = sorted({case.family for case in cases.values()} - halves.keys())
        for index, family in enumerate(new):
            halves[family] = "report" if index % 2 else "fit"
    return [{name: replace(case, half=halves[case.family]) for name, case in cases.items()} for cases in registries]


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
