"""The networks that the cost of watching is measured on, and one as large as GPT-2 small for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 128
Batch = tuple[Tensor, Tensor]


class Network(L.LightningModule):
    """A classifier of tokens or images.

    It calls itself in its training step, for `wandb.watch(log="all")` takes parameters in a hook of `forward`.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs).flatten(0, -2), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class LoggingNorms(Network):
    """Logs the norm of each gradient at every step, as Lightning's documentation writes it."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.net, norm_type=2))


class Transformer(nn.Module):
    """Layers of attention over tokens; if `tied`, the head has the weights of the embedding, as GPT-2's has."""

    def __init__(
        self, layers: int = 12, width: int = 256, heads: int = 4, vocabulary: int = VOCABULARY, tied: bool = False
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for images of 32 x 32, with `width` channels in its first stage instead of 64."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        blocks, channels = [], width
        for stage in range(4):
            for first in (True, False):
                out = width * 2**stage
                blocks.append(Block(channels, out, 2 if first and stage else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM of two layers over tokens."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


def tokens(sequences: int, length: int = 64, vocabulary: int = VOCABULARY) -> Batch:
    shape = (sequences, length)
    return torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)


def images(number: int) -> Batch:
    return torch.randn(number, 3, 32, 32), torch.randint(10, (number,))


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        title: what people read.
        net: makes the network.
        batch: makes a batch.
    """

    title: str
    net: Callable[[], nn.Module]
    batch: Callable[[], Batch]

    def build(self, kind: type[Network] = Network) -> Network:
        """The same weights every time."""
        torch.manual_seed(0)
        return kind(self.net())

    def batches(self, number: int) -> list[Batch]:
        """The same batches every time: a few of them, in turn, so that the network has something to learn."""
        torch.manual_seed(1)
        made = [self.batch() for _ in range(4)]
        return [made[i % 4] for i in range(number)]


MODELS = {
    "transformer": Model("transformer, 12 layers of 256", Transformer, partial(tokens, 16)),
    "resnet": Model("ResNet-18, half as wide", ResNet, partial(images, 32)),
    "lstm": Model("LSTM, 2 layers of 256", Recurrent, partial(tokens, 32)),
}
"""The networks by name."""

SMALL = Model("transformer, 2 layers of 16", partial(Transformer, 2, 16), partial(tokens, 2, 8))
"""One to try things with."""
