"""Fine-tuning: a small pretrained base, LoRA on top of it, a new head on a frozen trunk, idle experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digits
from .stacks import mlp


def pretrained(steps: int = 120, *, width: int = 64) -> nn.Sequential:
    """A ReLU network that already reads upright digits; the cases adapt it to transposed ones."""
    net = mlp(3, nn.ReLU, width=width)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    batches = digits(int(torch.randint(2**31, ())))
    with torch.enable_grad():
        step = 0
        while step < steps:
            for x, y in batches:
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(net(x), y))
                optimizer.step()
                step += 1
    net.zero_grad()
    return net


class LoRA(nn.Module):
    """``W x + (alpha / r) B A x`` with W frozen and B = 0, so that A gets no gradient at first (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        self.factor = alpha / rank
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank branch to the frozen layer."""
        output: Tensor = self.base(x) + self.factor * self.lora_b(self.lora_a(x))
        return output


def with_lora(net: nn.Sequential) -> nn.Sequential:
    """Wrap every linear layer of ``net``."""
    return nn.Sequential(*(LoRA(layer) if isinstance(layer, nn.Linear) else layer for layer in net))


class FrozenTrunk(nn.Module):
    """A pretrained trunk that stays as it is, below a new head."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.trunk = net[:-1].requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Classify from the trunk's features."""
        output: Tensor = self.head(self.trunk(x))
        return output


class Experts(nn.Module):
    """Top-1 routing over experts, two of which the router never picks: their gradient is None or zero."""

    def __init__(self, experts: int = 4, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(1, nn.ReLU, inputs=width, outputs=width) for _ in range(experts))
        self.head = nn.Linear(width, 10)
        with torch.no_grad():
            self.router.bias[-2:] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        """Send each sample through the expert of its highest score."""
        x = torch.relu(self.embed(x))
        weights = torch.softmax(self.router(x), 1)
        chosen = weights.argmax(1)
        mixed = x
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                mixed = mixed.index_add(0, rows, expert(x[rows]) * weights[rows, index, None])
        output: Tensor = self.head(mixed)
        return output
