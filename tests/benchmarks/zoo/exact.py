"""Tiny trainings in which every weight must come out the same to the last bit, whoever watches.

Each uses another part of PyTorch that a watcher could disturb: the random generator, running statistics, tensors that
are overwritten in place, weights that are shared or computed, a forward that runs twice.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from .case import Build, Data, seeded
from .data import characters, digits
from .stacks import mlp
from .task import Task, sequence_loss
from .text import GPT
from .vision import GAN, ResNet, RowLSTM, RowTransformer

STEPS = 40


class FunctionalDropout(nn.Module):
    """Activations and dropout by function call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Draw a new mask at every call."""
        x = F.dropout(torch.tanh(self.first(x)), 0.2, self.training)
        x = F.dropout(F.leaky_relu(self.second(x)), 0.2, self.training)
        output: Tensor = self.head(x)
        return output


class Checkpointed(nn.Module):
    """Two blocks with dropout whose forward runs once more during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2))
        self.second = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Dropout(0.2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Keep only the inputs of the blocks."""
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False)
        output: Tensor = self.head(x)
        return output


def _group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _weight_norm() -> nn.Module:
    net = mlp(3, nn.ReLU, width=32)
    for module in list(net):
        if isinstance(module, nn.Linear):
            weight_norm(module)
    return net


_DIGITS = partial(digits, batch_size=16)
_IMAGES = partial(digits, batch_size=16, image=True)
_TEXT = partial(characters, batch_size=8, length=16)

_TRAININGS: dict[str, tuple[Build, Data]] = {
    "dropout": (seeded(lambda: Task(mlp(3, nn.Tanh, width=32, dropout=0.3), log=True)), _DIGITS),
    "batch_norm": (seeded(lambda: Task(mlp(3, nn.Sigmoid, width=32, norm=True))), _DIGITS),
    "relu_in_place": (seeded(lambda: Task(mlp(3, partial(nn.ReLU, inplace=True), width=32), log=True)), _DIGITS),
    "lstm": (seeded(lambda: Task(RowLSTM(nn.LSTM, 16))), _DIGITS),
    "gru": (seeded(lambda: Task(RowLSTM(nn.GRU, 16))), _DIGITS),
    "transformer_encoder": (seeded(lambda: Task(RowTransformer(depth=1, width=16), log=True)), _DIGITS),
    "conv_resnet": (seeded(lambda: Task(ResNet())), _IMAGES),
    "tied_embedding": (seeded(lambda: Task(GPT(1, 16, 2, 16), loss=sequence_loss)), _TEXT),
    "functional_dropout": (seeded(lambda: Task(FunctionalDropout())), _DIGITS),
    "group_norm_gelu": (seeded(lambda: Task(_group_norm())), _IMAGES),
    "weight_norm": (seeded(lambda: Task(_weight_norm(), log=True)), _DIGITS),
    "checkpointing": (seeded(lambda: Task(Checkpointed())), _DIGITS),
    "manual_gan": (seeded(lambda: GAN(8, 32, dropout=0.2)), _DIGITS),
}

EXACT: dict[str, Build] = {name: build for name, (build, _) in _TRAININGS.items()}
EXACT_DATA: dict[str, Data] = {name: data for name, (_, data) in _TRAININGS.items()}
