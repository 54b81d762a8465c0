"""Trials of learning rates on copies of a model, on batches of its run."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow.callbacks.rehearsal import pace

FACTOR = 0.01


class Two(L.LightningModule):
    """Two weights that do not meet: each goes down a parabola of its own."""

    def __init__(self, rates):
        super().__init__()
        self.rates = rates
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in rates])

    def training_step(self, batch, _):
        return sum(weight.square() for weight in self.weights) / 2 + 0 * batch[0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(self.weights, self.rates, strict=True)])


class Try(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.losses = pace(trainer, pl_module, [(batch, batch_idx)])(FACTOR, 5)


@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.4), (0.5, 0.05), (0.5, 1e-3)])
def test_of_groups_that_are_far_apart_the_largest_is_lowered(rates):
    module, trial = Two(rates), Try()
    L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[trial],
    ).fit(module, DataLoader(TensorDataset(torch.zeros(1, 1))))
    is_apart = max(rates) >= 10 * min(rates)
    used = [min(rate, FACTOR * max(rates)) if is_apart else rate * FACTOR for rate in rates]
    expected = [sum((1 - rate) ** (2 * step) for rate in used) / 2 for step in range(5)]
    assert trial.losses == pytest.approx(expected, rel=1e-5)
    assert [float(w.detach()) for w in module.weights] == pytest.approx([1 - rate for rate in rates])
    assert all(math.isfinite(loss) for loss in trial.losses)
