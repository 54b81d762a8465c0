"""What is lost where targets are dealt anew, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradflow.metrics import PAIRING
from lightning_gradflow.probes.pairing import agreement, pairing


def pairs_of(net, batches, loss=F.mse_loss, scale=1.0):
    def make(x, y):
        return lambda: scale * loss(net(x), y)

    return [(make(x, y), make(x, y.roll(len(y) // 2, 0))) for x, y in batches]


def batches(count=16, size=32, *, r2=0.5, inputs=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x, noise = torch.randn(size, inputs, generator=generator), torch.randn(size, 1, generator=generator)
        made.append((x, math.sqrt(r2) * x[:, :1] + math.sqrt(1 - r2) * noise))
    return made


def measured(net, made, **how):
    return pairing(pairs_of(net, made, **how), list(net.parameters()))


@pytest.mark.parametrize("r2", [0.1, 0.5, 0.9])
def test_the_gap_of_the_best_linear_model_is_twice_what_it_explains(r2):
    net = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        net.weight.zero_()[0, 0] = math.sqrt(r2)
    found = measured(net, batches(64, 512, r2=r2))
    # with the targets dealt anew the error is r2 of the prediction and 1 of the targets, instead of 1 - r2
    assert found["line_shuffled"] == pytest.approx(2 * r2 / (1 - r2), rel=0.05)
    assert found["line_shuffled_z"] > 10


def test_a_network_that_knows_only_the_mean_has_no_gap_but_could_learn():
    net = nn.Linear(8, 1)
    with torch.no_grad():
        net.weight.mul_(1e-6)
    found = measured(net, batches())
    assert abs(found["line_shuffled"]) < 1e-4
    assert found["pairing_agreement"] > 5


@pytest.mark.parametrize("seed", range(3))
def test_what_is_known_by_heart_is_a_gap_and_no_agreement(seed):
    torch.manual_seed(seed)
    made = batches(r2=0.0, seed=seed)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        for x, y in made:
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
    found = measured(net, made)
    assert found["line_shuffled"] > 0.3
    assert found["line_shuffled_z"] > 5
    assert found["pairing_agreement"] < 3  # three standard deviations


def test_without_a_relation_the_agreement_is_near_standard_normal():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    scores = [measured(net, batches(r2=0.0, seed=seed))["pairing_agreement"] for seed in range(60)]
    assert abs(np.mean(scores)) < 0.4
    assert np.std(scores) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_loss_changes_nothing(scale):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    plain, scaled = measured(net, batches()), measured(net, batches(), scale=scale)
    assert scaled == pytest.approx(plain, rel=1e-3)
    with_scaler = pairing(pairs_of(net, batches()), list(net.parameters()), 1024.0)
    assert with_scaler == pytest.approx(plain, rel=1e-3)


def test_the_weights_are_put_back_to_the_bit():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    before, state = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    measured(net, batches())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_targets_that_have_no_part_in_the_loss_tell_nothing():
    assert measured(nn.Linear(8, 1), batches(), loss=lambda output, _: output.square().mean()) == {}


def test_few_batches_tell_nothing():
    assert measured(nn.Linear(8, 1), batches(3)) == {}


def test_a_sparse_gradient_and_a_parameter_without_one_are_no_hindrance():
    table, unused = nn.Embedding(10, 4, sparse=True), nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    made = [(x, F.one_hot(x % 4).float()) for x in torch.randint(0, 10, (16, 32), generator=generator)]
    found = pairing(pairs_of(table, made), [*table.parameters(), unused])
    assert set(found) == set(PAIRING)
    assert found["pairing_agreement"] > 5


def test_the_agreement_is_the_sum_of_products_by_its_deviation():
    rows = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]])
    assert agreement(rows) == pytest.approx((2 + 0 - 1) / math.sqrt(4 + 0 + 1))
