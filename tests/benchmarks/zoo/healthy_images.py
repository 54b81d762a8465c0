"""Networks on images that learn: residual without normalisation, very deep, gated, mixing, with skips."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from .case import Case, seeded
from .data import digits, noisy_images
from .stacks import mlp
from .task import ADAM, Task
from .vision import BasicBlock

FASTER = partial(ADAM, lr=3e-3)
IMAGES = partial(digits, image=True)
ONE_CYCLE = partial(OneCycleLR, max_lr=1e-2, total_steps=100)


class Fixup(nn.Module):
    """A residual branch without normalisation whose last convolution starts as zero (Zhang et al. 2019)."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bias1, self.bias2, self.bias3 = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        with torch.no_grad():
            self.conv1.weight *= depth**-0.5
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv2(torch.relu(self.conv1(x + self.bias1)) + self.bias2)
        return torch.relu(x + self.scale * branch + self.bias3)


class Pooled(nn.Module):
    """A convolutional stem, a body, the mean over space and a linear head."""

    def __init__(self, body: nn.Module, channels: int = 8, *, zero_head: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU())
        self.body = body
        self.head = nn.Linear(channels, 10)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return output


class SqueezeExcite(nn.Module):
    """A convolution whose channels pass through sigmoid gates that start open (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, channels)
        self.gate = nn.Sigmoid()
        nn.init.constant_(self.excite.bias, 6.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        gate = self.gate(self.excite(torch.relu(self.squeeze(y.mean((2, 3))))))
        return x + y * gate[..., None, None]


class MixerBlock(nn.Module):
    """Mix tokens, then channels, each behind a LayerNorm (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = mlp(1, nn.GELU, width=2 * tokens, inputs=tokens, outputs=tokens)
        self.channels = mlp(1, nn.GELU, width=2 * width, inputs=width, outputs=width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        output: Tensor = x + self.channels(self.norm2(x))
        return output


class Mixer(nn.Module):
    """MLP-Mixer over the sixteen 2x2 patches of a digit."""

    def __init__(self, depth: int = 4, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.blocks = nn.Sequential(*(MixerBlock(16, width) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))
        return output


class UNet(nn.Module):
    """Two levels down and up; what goes down is concatenated on the way up (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def pair(inputs: int, outputs: int) -> nn.Sequential:
            first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

        self.down1, self.down2, self.bottom = pair(1, width), pair(width, 2 * width), pair(2 * width, 2 * width)
        self.up2, self.up1 = pair(4 * width, width), pair(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        low = self.bottom(F.max_pool2d(second, 2))
        low = self.up2(torch.cat([F.interpolate(low, scale_factor=2), second], 1))
        low = self.up1(torch.cat([F.interpolate(low, scale_factor=2), first], 1))
        output: Tensor = self.head(low)
        return output


def _fixup(depth: int = 8) -> Pooled:
    return Pooled(nn.Sequential(*(Fixup(8, depth) for _ in range(depth))), zero_head=True)


def _resnet(depth: int = 18) -> Pooled:
    return Pooled(nn.Sequential(*(BasicBlock(8, 8, 1) for _ in range(depth))))


def _gated(depth: int = 4) -> Pooled:
    return Pooled(nn.Sequential(*(SqueezeExcite(8) for _ in range(depth))))


CASES = [
    Case("fixup", seeded(lambda: Task(_fixup(), FASTER)), IMAGES, 100, family="zero_branch"),
    Case(
        "resnet_36_convolutions",
        seeded(lambda: Task(_resnet(), FASTER)),
        partial(IMAGES, batch_size=32),
        60,
        family="residual",
    ),
    Case("mixer_one_cycle", seeded(lambda: Task(Mixer(), schedule=ONE_CYCLE)), IMAGES, 100, family="mixer"),
    Case("u_net_with_skips", seeded(lambda: Task(UNet(), FASTER, loss=F.mse_loss)), noisy_images, 80, family="u_net"),
    Case("squeeze_excite", seeded(lambda: Task(_gated(), FASTER)), IMAGES, 200, family="gates"),
]
