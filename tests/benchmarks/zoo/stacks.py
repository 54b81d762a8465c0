"""Fully connected networks: plain, functional, registered backwards, residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    depth: int,
    activation: Callable[[], nn.Module],
    *,
    width: int = 64,
    inputs: int = 64,
    outputs: int = 10,
    norm: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """``depth`` hidden layers and a linear output, with PyTorch's default initialisation."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(width if index else inputs, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, outputs))


def he(net: nn.Module) -> nn.Module:
    """Give every linear layer He's initialisation and a zero bias."""
    return _initialised(net, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))


def normal(net: nn.Module, std: float) -> nn.Module:
    """Draw every linear and convolution weight from N(0, std^2), with a zero bias."""
    return _initialised(net, lambda weight: nn.init.normal_(weight, std=std))


def orthogonal(net: nn.Module) -> nn.Module:
    """Give every linear layer an orthogonal weight and a zero bias."""
    return _initialised(net, nn.init.orthogonal_)


def _initialised(net: nn.Module, draw: Callable[[Tensor], Tensor]) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


class FunctionalSigmoid(nn.Module):
    """A sigmoid network without a single activation module."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(64 if index == 0 else width, width) for index in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Use the three spellings of the same function in turn."""
        for index, layer in enumerate(self.hidden):
            x = layer(x)
            x = (torch.sigmoid(x), F.sigmoid(x), x.sigmoid())[index % 3]
        return F.linear(x, self.head.weight, self.head.bias)


class ReversedSigmoid(nn.Module):
    """A sigmoid network whose modules are registered from the last to the first."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.head = nn.Linear(width, 10)
        self.depth = depth
        for index in reversed(range(depth)):
            self.add_module(f"act{index}", nn.Sigmoid())
            self.add_module(f"fc{index}", nn.Linear(64 if index == 0 else width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Run from the first to the last."""
        for index in range(self.depth):
            x = self.get_submodule(f"act{index}")(self.get_submodule(f"fc{index}")(x))
        output: Tensor = self.head(x)
        return output


class ResidualBlock(nn.Module):
    """``x + gamma * f(norm(x))``; LayerScale starts gamma near zero."""

    def __init__(self, width: int, gamma: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), gamma))

    def forward(self, x: Tensor) -> Tensor:
        """Add the scaled branch to the input."""
        branch: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + self.gamma * branch


def residual_mlp(depth: int, *, gamma: float, width: int = 64) -> nn.Sequential:
    """``depth`` residual blocks between a linear input and a normalised linear output."""
    blocks = [ResidualBlock(width, gamma) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


class Highway(nn.Module):
    """``t * f(x) + (1 - t) * x`` with gates that start almost shut (Srivastava et al. 2015)."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.candidate = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the candidate with the input."""
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.relu(self.candidate(x)) + (1 - gate) * x


def highway(depth: int, width: int = 64) -> nn.Sequential:
    """``depth`` highway layers below a linear output."""
    return nn.Sequential(*(Highway(width, -2.0) for _ in range(depth)), nn.Linear(width, 10))


class UnusedHead(nn.Module):
    """A network with a second head that no loss ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(2, nn.ReLU, outputs=64)
        self.head = nn.Linear(64, 10)
        self.spare = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Use one head of the two."""
        output: Tensor = self.head(torch.relu(self.trunk(x)))
        return output


class TwoHeads(nn.Module):
    """A network with an auxiliary network beside it, which is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = mlp(2, nn.ReLU)
        self.main = mlp(3, nn.ReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The auxiliary scores, then those that count."""
        return self.auxiliary(x), self.main(x)
