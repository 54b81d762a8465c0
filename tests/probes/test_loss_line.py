"""The loss along an update, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradflow.metrics import LOSS_LINE
from lightning_gradflow.probes.loss_line import FACTORS, loss_line, pack, unpack


def quadratic(curvatures, start=1.0):
    """The weights, and the loss sum(c w^2) / 2 with Hessian diag(c)."""
    w = torch.full((len(curvatures),), start, requires_grad=True)
    c = torch.tensor(curvatures)
    return w, lambda: (c * w.square()).sum() / 2


def along_quadratic(rate, curvature=1.0):
    w, loss = quadratic([curvature])
    return loss_line([loss] * 4, torch.optim.SGD([w], lr=rate))


@pytest.mark.parametrize("rate", [1e-7, 1e-5, 0.02, 0.5])
def test_the_gains_are_those_of_a_parabola(rate):
    found = along_quadratic(rate)
    gains = {factor: 1 - (1 - rate * factor) ** 2 for factor in FACTORS}
    assert found["line_gain_tenth"] == pytest.approx(gains[0.1], abs=1e-6)
    assert found["line_gain_1x"] == pytest.approx(gains[1.0], abs=1e-6)
    assert found["line_gain_other"] == pytest.approx(max(gains.values()), abs=1e-4)
    assert gains[found["line_best_factor"]] == pytest.approx(max(gains.values()))


def test_a_step_that_the_weights_swallow_is_measured_all_the_same():
    found = along_quadratic(1e-10)
    assert found["line_gain_far"] == pytest.approx(1 - (1 - 1e-3) ** 2, rel=1e-2)


def test_an_optimizer_that_does_not_move_has_no_line():
    found = along_quadratic(0.0)
    assert all(math.isnan(found[name]) for name in LOSS_LINE if name.startswith("line_"))


@pytest.mark.parametrize("rate", [2.5, 3.0])
def test_the_sharpness_is_the_rate_times_the_largest_eigenvalue(rate):
    w, loss = quadratic([1.0, 0.3, -0.2])
    found = loss_line([loss] * 4, torch.optim.SGD([w], lr=rate))
    assert found["line_gain_1x"] < 0
    assert found["sharpness"] == pytest.approx(rate, rel=1e-3)


def test_of_a_normalised_update_it_is_the_curvature_along_the_step():
    w, loss = quadratic([1.0, 1.0])
    found = loss_line([loss] * 4, torch.optim.Adam([w], lr=3.0), normalised=True)
    # d = -3 in both entries, g = 1: d.Hd / -g.d = 18 / 6
    assert found["sharpness"] == pytest.approx(3.0, rel=1e-3)


class OnlyOnce(torch.autograd.Function):
    """A square whose backward has no backward, as fused kernels have it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_without_a_second_backward_the_curvature_comes_from_differences():
    w = torch.ones(3, requires_grad=True)
    found = loss_line([lambda: OnlyOnce.apply(w).sum()] * 2, torch.optim.SGD([w], lr=1.5))
    assert found["sharpness"] == pytest.approx(3.0, rel=1e-2)


def naive(gradients):
    half = len(gradients) // 2
    own, other = gradients[:half].mean(0), gradients[half:].mean(0)
    pairs = [g @ h for i, g in enumerate(gradients) for h in gradients[i + 1 :]]
    cosine = own @ other / np.linalg.norm(own) / np.linalg.norm(other)
    return cosine, sum(pairs) / math.sqrt(sum(p * p for p in pairs))


def test_the_agreement_is_that_of_all_pairs_of_batches():
    rows = np.random.default_rng(0).standard_normal((6, 5))
    w = torch.zeros(5, requires_grad=True)
    losses = [lambda row=row: 1 + (torch.tensor(row, dtype=torch.float32) * w).sum() for row in rows]
    found = loss_line(losses, torch.optim.SGD([w], lr=0.01))
    cosine, agreement = naive(rows)
    assert found["gradient_cosine"] == pytest.approx(cosine, rel=1e-5)
    assert found["gradient_agreement"] == pytest.approx(agreement, rel=1e-5)


def test_without_a_common_direction_the_agreement_is_near_standard_normal():
    rng = np.random.default_rng(1)
    scores = np.array([naive(rng.standard_normal((16, 200)))[1] for _ in range(200)])
    assert abs(scores.mean()) < 0.3
    assert (scores > 3).mean() < 0.02


def batches_of(targets, size=32):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    made = []
    for _ in range(16):
        x = torch.randn(size, 8, generator=generator)
        made.append((x, targets(x, generator)))
    return net, [lambda x=x, y=y: F.mse_loss(net(x)[:, 0], y) for x, y in made]


@pytest.mark.parametrize("seed", range(3))
def test_batches_agree_where_the_targets_follow_from_the_inputs(seed):
    torch.manual_seed(seed)
    net, losses = batches_of(lambda x, _: x[:, 0])
    assert loss_line(losses, torch.optim.SGD(net.parameters(), lr=1e-6))["gradient_agreement"] > 5


def test_the_loss_scale_changes_nothing():
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        net, losses = batches_of(lambda x, _: x[:, 0])
        found.append(loss_line(losses, torch.optim.SGD(net.parameters(), lr=1e-4), loss_scale=scale))
    assert found[0] == pytest.approx(found[1], nan_ok=True)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_multiplying_loss_and_dividing_rate_changes_nothing(factor):
    found = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        net, losses = batches_of(lambda x, _: x[:, 0])
        scaled = [lambda loss=loss, scale=scale: scale * loss() for loss in losses]
        found.append(loss_line(scaled, torch.optim.SGD(net.parameters(), lr=1e-4 / scale)))
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-6, nan_ok=True)


def test_the_gradients_are_clipped_as_before_a_real_step():
    w, loss = quadratic([1.0])
    found = loss_line(
        [loss] * 2, torch.optim.SGD([w], lr=0.5), clip=lambda: nn.utils.clip_grad_norm_([w], 0.1) and None
    )
    assert found["line_gain_1x"] == pytest.approx(1 - 0.95**2, abs=1e-5)


def test_a_parameter_without_a_gradient_and_a_sparse_one_are_no_hindrance():
    table, unused = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*table.parameters(), unused], lr=0.1)
    found = loss_line([lambda: table(torch.tensor([1, 2])).square().sum()] * 2, optimizer)
    assert found["line_gain_1x"] == pytest.approx(1 - 0.8**2, abs=1e-5)


def test_ranks_that_cannot_tell_leave_the_mean_to_the_others():
    packed = np.add(pack({"line_gain_1x": 0.5}), pack({}))
    found = unpack(packed)
    assert found["line_gain_1x"] == 0.5
    assert math.isnan(found["sharpness"])
    assert found["loss_line"] == 1.0


def test_what_nobody_measured_in_a_sample_is_not_there():
    assert unpack(np.zeros_like(pack({}))) == {}
    assert unpack(np.array(pack({})))["loss_line"] == 1.0
