"""Weights as they are drawn, and as training leaves them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import init

from lightning_gradflow.remedies.fresh import looks_fresh

SHAPES = [
    (1, 8),
    (8, 1),
    (4, 4),
    (4, 64),
    (16, 16),
    (10, 64),
    (64, 64),
    (256, 64),
    (128, 784),
    (8, 3, 3, 3),
    (64, 1, 3, 3),
    (64, 32, 3),
    (16, 8, 3, 3, 3),
    (32, 32, 1, 1),
]
INITIALISATIONS = {
    "uniform": lambda w: init.uniform_(w, -0.1, 0.1),
    "positive": init.uniform_,
    "normal": init.normal_,
    "far from 0": lambda w: init.normal_(w, 5.0, 0.01),
    "cut off": init.trunc_normal_,
    "constant": lambda w: init.constant_(w, 0.3),
    "zeros": init.zeros_,
    "Glorot uniform": init.xavier_uniform_,
    "Glorot normal": init.xavier_normal_,
    "He uniform": init.kaiming_uniform_,
    "He normal": init.kaiming_normal_,
    "torch's own": lambda w: init.kaiming_uniform_(w, math.sqrt(5)),
    "orthogonal": init.orthogonal_,
    "signs": lambda w: w.bernoulli_().mul_(2).sub_(1),
}
OF_MATRICES = {
    "eye": init.eye_,
    "sparse": lambda w: init.sparse_(w, 0.9),
    "half sparse": lambda w: init.sparse_(w, 0.5),
}


def _fresh_in(draw, shape, seeds=20):
    found = 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        weight = torch.empty(shape)
        draw(weight)
        found += looks_fresh(weight)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INITIALISATIONS)
def test_what_is_drawn_looks_fresh(name, shape):
    assert _fresh_in(INITIALISATIONS[name], shape) == 20


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
@pytest.mark.parametrize("name", OF_MATRICES)
def test_so_does_a_matrix_that_is_mostly_zero(name, shape):
    assert _fresh_in(OF_MATRICES[name], shape) == 20


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
def test_so_does_a_convolution_that_passes_its_input_on(shape):
    assert _fresh_in(init.dirac_, shape, seeds=1) == 1


@pytest.mark.parametrize("name", ["normal", "orthogonal", "torch's own"])
def test_so_does_a_large_matrix(name):
    assert _fresh_in(INITIALISATIONS[name], (512, 2048), seeds=1) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_holds_nothing_that_could_be_lost(value):
    torch.manual_seed(0)
    weight = torch.randn(32, 32)
    weight += 4 * torch.outer(weight[0], weight[1]) / 6
    assert not looks_fresh(weight)
    weight[0, 0] = value
    assert looks_fresh(weight)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6])
def test_the_scale_of_the_weights_makes_no_difference(scale):
    torch.manual_seed(0)
    drawn = torch.randn(32, 32)
    learnt = drawn + 4 * torch.outer(drawn[0], drawn[1]) / 6
    assert looks_fresh(scale * drawn)
    assert not looks_fresh(scale * learnt)


@pytest.mark.parametrize(("size", "expected"), [(1.0, True), (2.0, False)])
def test_a_direction_is_seen_that_stands_out_of_what_was_drawn(size, expected):
    """The largest singular value of 200 x 200 draws is 2 sqrt(200); a direction of twice that stands out."""
    torch.manual_seed(0)
    drawn = torch.randn(200, 200)
    left, right = F.normalize(torch.randn(200), dim=0), F.normalize(torch.randn(200), dim=0)
    assert looks_fresh(drawn + size * math.sqrt(200) * torch.outer(left, right)) is expected


def test_half_precision_and_gradients_make_no_difference():
    torch.manual_seed(0)
    assert looks_fresh(nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("activation", "optimizer"),
    [
        (nn.ReLU, lambda p: torch.optim.Adam(p, 1e-3)),
        (nn.Tanh, lambda p: torch.optim.SGD(p, 0.1)),
    ],
)
def test_hidden_layers_look_trained_after_a_few_hundred_steps(activation, optimizer):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))
    steps = optimizer(net.parameters())
    assert looks_fresh(net[0].weight)
    assert looks_fresh(net[2].weight)
    for _ in range(300):
        at = torch.randint(len(x), (64,))
        steps.zero_grad()
        F.cross_entropy(net(x[at]), y[at]).backward()
        steps.step()
    assert not looks_fresh(net[0].weight)
    assert not looks_fresh(net[2].weight)
