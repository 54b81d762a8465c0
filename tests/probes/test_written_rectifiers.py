"""ReLUs that are written as something else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.observer import ForwardObserver

ZERO = torch.tensor(0.0)


class Calls(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.fc, self.call = nn.Linear(4, 4), call

    def forward(self, x):
        return self.call(self.fc(x))


def _seen(call):
    net, seen = Calls(call), []
    observer = ForwardObserver(LayerMap(net), lambda *_: None, lambda name, op, out, _: seen.append((op, out.detach())))
    observer.open()
    try:
        result = net(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))
    finally:
        observer.close()
    assert all(torch.equal(out, result) for _, out in seen)
    return [op for op, _ in seen]


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.clamp(0), "relu"),
        (lambda x: torch.clip(x, 0.0), "relu"),
        (lambda x: x.clone().clamp_(min=0), "relu"),
        (lambda x: x.clamp_min(0), "relu"),
        (lambda x: torch.clamp_min(x, 0.0), "relu"),
        (lambda x: x.clamp(0, 6), "relu6"),
        (lambda x: torch.clamp(x, min=ZERO), "relu"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "relu"),
        (lambda x: torch.maximum(ZERO, x), "relu"),
        (lambda x: torch.max(x, other=ZERO), "relu"),
        (lambda x: F.threshold(x, 0, 0), "relu"),
        (nn.Threshold(0.0, 0.0), "relu"),
    ],
)
def test_a_relu_is_seen_once_however_it_is_written(call, op):
    assert _seen(call) == [op]
    x = torch.linspace(-9, 9, 20)
    assert torch.equal(call(x), F.relu6(x) if op == "relu6" else F.relu(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.clamp(max=0),
        lambda x: x.clamp(1e-6),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(0, 1),
        lambda x: x.detach().clamp(min=0),
        lambda x: x.clamp(min=torch.full((4,), 0.1)),
        lambda x: torch.maximum(x, 2 * x),
        lambda x: torch.maximum(x, torch.ones(4)),
        lambda x: x.max(0).values,
        lambda x: x.max(),
        lambda x: F.threshold(x, 0.5, 0),
    ],
)
def test_other_limits_are_no_rectifiers(call):
    assert _seen(call) == []
