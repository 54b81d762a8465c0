"""The networks and data of the distributed runs. Each network writes its forward pass down a second time, by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES, BATCH = 6, 4, 4

Trace = tuple[Tensor, dict[str, list[Tensor]]]


def data(rows: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """So many rows, with their classes.

    Even rows are for rank 0, odd rows for rank 1. The first feature tells them apart, and their distributions differ,
    so that no mean over one rank's batch is that of both.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    x[:, 0] = x[:, 0].abs() + 0.1
    x[1::2, 0] *= -1
    x[1::2, 1:] *= 1.5
    return x, y


class Traced(nn.Module):
    """A network that can be asked for all its outputs."""

    def trace(self, x: Tensor) -> Trace:
        """Logits, and the outputs by the names of their points, in order of calls."""
        raise NotImplementedError


class Mixed(Traced):
    """Activations as modules and as functions, a parameter of its own, and rows that two ranks can't share evenly.

    Of `one` and `scale` there is one row: where they are cut up, one rank holds nothing.

    Unit 0 behind the first layer fires for rank 0 only, unit 1 for rank 1 only, unit 2 for none.
    """

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.a, self.relu = nn.Linear(FEATURES, width), nn.ReLU()
        self.b, self.tanh = nn.Linear(width, 10), nn.Tanh()
        self.c, self.head, self.one = nn.Linear(10, CLASSES), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, 1)
        self.scale = nn.Parameter(torch.full((1, CLASSES), 2.0))
        with torch.no_grad():
            self.a.weight[:3] = 0.0
            self.a.weight[0, 0], self.a.weight[1, 0] = 1.0, -1.0
            self.a.bias[:3] = torch.tensor([0.0, 0.0, -1.0])

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.tanh(self.b(self.relu(self.a(x))) * 3)
        x = torch.sigmoid(self.c(x) * 4)
        out: Tensor = self.head(x) * self.one(x) * self.scale
        return out

    def trace(self, x: Tensor) -> Trace:
        """Logits, and the outputs by the names of their points."""
        a = F.linear(x, self.a.weight, self.a.bias)
        relu = a.clamp(min=0)
        b = F.linear(relu, self.b.weight, self.b.bias)
        tanh = (b * 3).tanh()
        c = F.linear(tanh, self.c.weight, self.c.bias)
        sigmoid = 1 / (1 + (-4 * c).exp())
        head = F.linear(sigmoid, self.head.weight, self.head.bias)
        one = F.linear(sigmoid, self.one.weight, self.one.bias)
        out = head * one * self.scale
        seen = {"a": a, "relu": relu, "b": b, "tanh": tanh, "c": c, "c/sigmoid": sigmoid, "head": head, "one": one}
        return out, {name: [tensor] for name, tensor in seen.items()} | {"": [out]}


class Alike(Mixed):
    """All units of the first layers are the same: a part of them looks like a copy of another part."""

    def __init__(self, width: int = 7) -> None:
        super().__init__(width)
        for layer, value in ((self.a, 0.1), (self.b, 0.05)):
            nn.init.constant_(layer.weight, value)
            nn.init.constant_(layer.bias, value)


class Branching(Traced):
    """A branch that only rank 0 takes, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch, self.never = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def takes_branch(self, x: Tensor) -> bool:
        """Whether these rows are those of rank 0."""
        return bool(x[0, 0] > 0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        taken = self.takes_branch(x)
        x = torch.relu(self.trunk(x))
        if taken:
            x = x + torch.tanh(self.branch(x) * 3)
        out: Tensor = self.head(x)
        return out

    def trace(self, x: Tensor) -> Trace:
        """Logits, and the outputs by the names of their points."""
        trunk = F.linear(x, self.trunk.weight, self.trunk.bias)
        relu = trunk.clamp(min=0)
        seen = {"trunk": [trunk], "trunk/relu": [relu]}
        before = relu
        if x[0, 0] > 0:
            branch = F.linear(relu, self.branch.weight, self.branch.bias)
            tanh = (branch * 3).tanh()
            seen |= {"branch": [branch], "branch/tanh": [tanh]}
            before = relu + tanh
        seen["head"] = [F.linear(before, self.head.weight, self.head.bias)]
        return seen["head"][0], seen


class Loop(Traced):
    """A cell in a loop: of three turns, or of two on rank 0 and four on rank 1."""

    def __init__(self, uneven: bool = False) -> None:
        super().__init__()
        self.cell, self.act, self.head = nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES)
        self.uneven = uneven

    def _turns(self, x: Tensor) -> int:
        if not self.uneven:
            return 3
        return 2 if x[0, 0] > 0 else 4

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for _ in range(self._turns(x)):
            x = self.act(self.cell(x) * 2)
        out: Tensor = self.head(x)
        return out

    def trace(self, x: Tensor) -> Trace:
        """Logits, and the outputs by the names of their points, one for each turn."""
        seen: dict[str, list[Tensor]] = {"cell": [], "act": []}
        for _ in range(self._turns(x)):
            seen["cell"].append(F.linear(x, self.cell.weight, self.cell.bias))
            seen["act"].append((seen["cell"][-1] * 2).tanh())
            x = seen["act"][-1]
        seen["head"] = [F.linear(x, self.head.weight, self.head.bias)]
        return seen["head"][0], seen


class Sequences(Traced):
    """Rows as short sequences, with a norm between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.a = nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.b, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        steps = torch.stack([x, x.flip(1)], dim=1)
        out: Tensor = self.head(self.b(torch.tanh(self.a(self.norm(self.up(steps))) * 3)).mean(dim=1))
        return out

    def trace(self, x: Tensor) -> Trace:
        """Logits, and the outputs by the names of their points."""
        up = F.linear(torch.stack([x, x.flip(1)], dim=1), self.up.weight, self.up.bias)
        centred = up - up.mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.norm.weight + self.norm.bias
        a = F.linear(norm, self.a.weight, self.a.bias)
        tanh = (a * 3).tanh()
        b = F.linear(tanh, self.b.weight, self.b.bias)
        head = F.linear(b.mean(dim=1), self.head.weight, self.head.bias)
        seen = {"up": up, "norm": norm, "a": a, "a/tanh": tanh, "b": b, "head": head}
        return head, {name: [tensor] for name, tensor in seen.items()}


class Sigmoids(nn.Sequential):
    """Thirty layers through which no gradient comes."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Linear(FEATURES, 12), nn.Sigmoid()]
        for _ in range(29):
            layers += [nn.Linear(12, 12), nn.Sigmoid()]
        super().__init__(*layers, nn.Linear(12, CLASSES))
