"""Learning rates are tried out, and the one that goes on fast and surely is found."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.remedies.rate_test import fitting_factor


def _parabola(curvature, rate, scale=1.0, calls=None):
    def pace(factor, steps):
        weight, losses = 1.0, []
        if calls is not None:
            calls.append(factor)
        for _ in range(steps):
            losses.append(scale * curvature * weight**2 / 2)
            weight -= factor * rate * curvature * weight
        return losses

    return pace


@pytest.mark.parametrize(("curvature", "rate"), [(0.1, 100.0), (1.0, 3.0), (1.0, 1e4), (100.0, 10.0), (3.0, 1e4)])
def test_on_a_parabola_it_is_below_the_inverse_of_the_curvature_and_no_more_than_ten_times(curvature, rate):
    best = 1 / (curvature * rate)
    assert best / 10 < fitting_factor(_parabola(curvature, rate)) <= best


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(scale):
    assert fitting_factor(_parabola(3.0, 50.0, scale)) == fitting_factor(_parabola(3.0, 50.0))


@pytest.mark.parametrize("offset", [-5.0, 5.0])
def test_the_loss_may_have_any_sign(offset):
    bare = _parabola(3.0, 50.0)
    found = fitting_factor(lambda factor, steps: [loss + offset for loss in bare(factor, steps)])
    assert found == fitting_factor(bare)


def test_a_rate_that_does_best_as_it_is_stays():
    assert fitting_factor(_parabola(1.0, 1.0)) == 1.0


def test_a_rate_with_which_nothing_is_learnt_tells_nothing():
    assert fitting_factor(lambda factor, steps: [1.0] * steps) is None


@pytest.mark.parametrize("level", [[3.9, 3.0, 0.8], [0.8, 3.0, 3.9], [5.0, 1.0]])
def test_batches_of_unlike_losses_are_not_mistaken_for_a_gain(level):
    """Where larger steps do harm and none does good, the smallest is no better rate."""

    def pace(factor, steps):
        return [level[step % len(level)] * (1 + factor * step) for step in range(steps)]

    assert fitting_factor(pace) is None


@pytest.mark.parametrize("losses", [[], [math.nan], [1.0, math.inf]])
def test_where_no_rate_stays_finite_none_is_named(losses):
    assert fitting_factor(lambda factor, steps: losses) is None


def test_rates_far_below_the_best_are_not_tried():
    calls = []
    fitting_factor(_parabola(1.0, 10.0, calls=calls))
    assert min(calls) > 1e-3
    assert calls == sorted(calls, reverse=True)


def test_what_wavers_at_the_end_counts_by_its_mean():
    """One lucky last step is no better rate."""

    def pace(factor, steps):
        losses = np.full(steps, 1.0 if factor > 0.2 else 0.5)
        losses[0] = 2.0
        losses[-1] = 0.1 if factor > 0.2 else 0.5
        return losses

    assert fitting_factor(pace) < 0.1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "rate", "settings"),
    [(torch.optim.SGD, 20.0, {"momentum": 0.9}), (torch.optim.SGD, 50.0, {}), (torch.optim.Adam, 3.0, {})],
    ids=["momentum", "sgd", "adam"],
)
def test_a_network_learns_with_it_as_fast_as_with_nearly_the_best_of_all_rates(kind, rate, settings, seed):
    """The whole run on new batches at each rate of a grid is the second way to find it."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(8, 1, generator=generator) / math.sqrt(8)

    def batch():
        x = torch.randn(32, 8, generator=generator)
        return x, torch.sin(x @ teacher)

    few = [batch() for _ in range(3)]

    def train(factor, steps, batches=None):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))
        optimizer = kind(net.parameters(), lr=factor * rate, **settings)
        losses = []
        for step in range(steps):
            x, y = batches[step % len(batches)] if batches else batch()
            loss = nn.functional.mse_loss(net(x), y)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    found = fitting_factor(lambda factor, steps: train(factor, steps, few))
    ends = {f: float(np.mean(train(f, 150)[-30:])) for f in [found, *np.logspace(0, -4, 9)]}
    start = train(1e-9, 1)[0]
    best = min(end for end in ends.values() if math.isfinite(end))
    assert ends[found] <= best + 0.25 * (start - best)
