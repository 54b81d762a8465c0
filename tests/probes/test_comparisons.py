"""Outputs that a loss compares with targets: what counts, and what is left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradflow.probes.comparisons import COMPARING, Comparisons

TARGETS = 100 + 20 * torch.arange(8)[:, None].float()


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.pairs = []
        self.comparisons = Comparisons(lambda *pair: self.pairs.append(pair))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in COMPARING:
            with torch._C.DisableTorchFunction():
                self.comparisons.see(func, result, args, kwargs or {})
        return result


def outputs():
    return nn.Linear(3, 1)(torch.randn(8, 3))


def seen(loss):
    y, watch = outputs(), Watch()
    with watch:
        loss(y, TARGETS)
    assert all(output is y and target is TARGETS for output, target in watch.pairs)
    return len(watch.pairs)


def itself_times(values):
    return values * values


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        lambda y, t: F.mse_loss(input=y, target=t),
        lambda y, t: F.mse_loss(y, t, reduction="sum"),
        lambda y, t: F.mse_loss(y, t, reduction="none").mean(),
        lambda y, t: F.mse_loss(y, t).sqrt(),
        lambda y, t: nn.L1Loss()(y, t),
        F.smooth_l1_loss,
        lambda y, t: F.huber_loss(t, y),
        lambda y, t: ((y - t) ** 2).mean(),
        lambda y, t: (t - y).pow(2).sum(),
        lambda y, t: torch.mean(torch.square(torch.sub(t, y))),
        lambda y, t: 0.1 * (t - y).abs().sum(1).mean(),
        lambda y, t: itself_times(y - t).mean(),
        lambda y, t: F.mse_loss(y, t) + 1e-3 * y.square().mean(),
    ],
)
def test_errors_are_seen_once(loss):
    assert seen(loss) == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: (F.mse_loss(y, t, reduction="none") * (t > 110)).mean(),  # a mask
        lambda y, t: F.mse_loss(y, t, reduction="none")[t > 110].mean(),
        lambda y, t: ((y - t).square() / t).mean(),
        lambda y, t: ((y - t) ** 4).mean(),
        lambda y, t: ((y - t) * y).mean(),
        lambda y, t: y.square().mean(),
        lambda y, t: ((y - 3) ** 2).mean(),
        lambda y, t: (y - t.T).abs().mean(),
        lambda y, t: (y - y.detach().requires_grad_()).abs().mean(),
        lambda y, t: F.mse_loss(y.detach(), t),
        lambda y, t: F.poisson_nll_loss(y, t),
    ],
)
def test_what_is_no_plain_error_is_not(loss):
    assert seen(loss) == 0


def test_nothing_is_kept_once_it_is_over():
    y = outputs()
    comparisons = Comparisons(lambda *_: None)
    comparisons.see(torch.Tensor.sub, y - TARGETS, (y, TARGETS), {})
    assert comparisons._differences
    comparisons.clear()
    assert not comparisons._differences
