"""Convolutional networks whose gradient is lost on the way down: VGG-like without norm, U-Net without skips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .data import digit_pairs
from .fault import IMAGES, fault
from .stacks import normal
from .task import ADAM, Task, reconstruction_loss


def vgg(depth: int, activation: Callable[[], nn.Module], *, norm: bool = False, channels: int = 12) -> nn.Sequential:
    """``depth`` 3x3 convolutions, max-pooling after a third and after two thirds of them, one linear layer."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Conv2d(channels if index else 1, channels, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(activation())
        if index in (depth // 3, 2 * depth // 3):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


class UNet(nn.Module):
    """Three levels down to 2x2 pixels and back up, with or without the shortcuts across (Ronneberger et al. 2015)."""

    def __init__(self, activation: Callable[[], nn.Module], *, skips: bool, width: int = 8) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.skips = skips
        self.down = nn.ModuleList(
            _double(before, after, activation) for before, after in zip((1, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _double(below + (level if skips else 0), level, activation)
            for below, level in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, 1, 1)
        # The digits' mean brightness of 0.3, so that learning it does not count as progress.
        nn.init.constant_(self.head.bias, -0.85)

    def forward(self, x: Tensor) -> Tensor:
        """Map flattened images (B, 64) to pixels in [0, 1]."""
        x = x.view(-1, 1, 8, 8)
        kept = []
        for level, block in enumerate(self.down):
            x = block(torch.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, across in zip(self.up, kept[-2::-1], strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, across], 1) if self.skips else x)
        return torch.sigmoid(self.head(x)).flatten(1)


def _double(inputs: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        activation(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        activation(),
    )


_FIRST = {"kinds": "vanishing_gradient", "layers": ("net.0",)}
_vgg = partial(fault, family="vgg", twin=lambda: vgg(9, nn.ReLU, norm=True), data=IMAGES)
_CODE = {"task": partial(Task, optimize=partial(ADAM, lr=3e-3), loss=reconstruction_loss)}

CASES = [
    _vgg("vgg_12_default_init", sick=lambda: vgg(15, nn.ReLU), causes="depth weight_scale", **_FIRST),
    _vgg("vgg_9_sigmoid", sick=lambda: vgg(9, nn.Sigmoid), causes="saturation", **_FIRST),
    _vgg(
        "vgg_9_sigmoid_loss_1e-7",
        sick=lambda: vgg(9, nn.Sigmoid),
        causes="saturation",
        task=partial(Task, optimize=partial(ADAM, eps=1e-18), scale=1e-7),
        **_FIRST,
    ),
    fault(
        "unet_sigmoid_no_skips",
        "unet",
        sick=lambda: UNet(nn.Sigmoid, skips=False),
        twin=lambda: UNet(nn.ReLU, skips=True),
        data=digit_pairs,
        kinds="vanishing_gradient",
        causes="saturation",
        **_CODE,
    ),
    fault(
        "unet_tanh_small_init",
        "unet",
        sick=lambda: normal(UNet(nn.Tanh, skips=False), 0.01),
        twin=lambda: UNet(nn.Tanh, skips=True),
        data=digit_pairs,
        kinds="vanishing_gradient",
        causes="weight_scale",
        **_CODE,
    ),
]
