"""Networks of any number of parameter tensors, or of parameters, that train as one of a usual size does."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .cost_models import Network

TENSORS = (100, 300, 1_000, 3_000, 10_000)
PARAMETERS = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 200_000_000)
KINDS = {"tensors": TENSORS, "parameters": PARAMETERS}
"""What grows, and the sizes it has."""
LARGE_LAYERS = 8


class Layer(nn.Module):
    """A step beside the identity, small enough that the signal keeps its size through as many as there are."""

    def __init__(self, width: int, layers: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)
        self.act = nn.Tanh()
        self.scale = 1 / math.sqrt(layers)

    def forward(self, x):
        return x + self.scale * self.act(self.linear(x))


class Grown(Network):
    """A stack of layers with nothing in the step but themselves: no logging, and SGD without a state."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return F.mse_loss(self(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def grown(kind: str, size: int) -> Grown:
    """A network of `size` tensors (weights and biases of small layers), or of about `size` parameters in 8 matrices."""
    torch.manual_seed(0)
    if kind == "tensors":
        width, layers, bias = 8, size // 2, True
    else:
        width, layers, bias = round(math.sqrt(size / LARGE_LAYERS)), LARGE_LAYERS, False
    return Grown(nn.Sequential(*(Layer(width, layers, bias) for _ in range(layers))))


def batch_for(module: Grown) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight random inputs, and targets that can be learnt from them."""
    torch.manual_seed(1)
    inputs = torch.randn(8, module.net[0].linear.in_features)
    return inputs, inputs.flip(-1)
