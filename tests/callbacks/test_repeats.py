"""Batches that a sampler with replacement deals, in which no sample is to count twice."""

from collections import namedtuple

import pytest
import torch

from lightning_gradflow.callbacks.repeats import without_repeats
from lightning_gradflow.probes.pairing import pairing

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "made",
    [lambda x, y: (x, y), lambda x, y: [x, y], Pair, lambda x, y: {"x": x, "y": y, "name": "a"}],
    ids=["tuple", "list", "named", "dict"],
)
def test_what_came_before_is_left_out_and_the_kind_of_batch_stays(made):
    first, second = without_repeats([(made(X[:4], Y[:4]), 7), (made(X[2:], Y[2:]), 8)])
    assert type(second[0]) is type(made(X, Y))
    assert (first[1], second[1]) == (7, 8)
    parts = list(second[0].values()) if isinstance(second[0], dict) else list(second[0])
    assert torch.equal(parts[0], X[4:])
    assert torch.equal(parts[1], Y[4:])


def test_the_same_inputs_with_other_targets_are_another_sample():
    again = [((X, Y), 0), ((X, 1 - Y), 1)]
    assert without_repeats(again) == again


@pytest.mark.parametrize(
    "batches",
    [
        [((X, Y), 0)] * 3,  # a third would be left
        [(X, 0), (X, 1)],
        [((X, Y[:3]), 0)] * 2,
        [((X, torch.tensor(1.0)), 0)] * 2,
        [("text", 0)] * 2,
        [((X.to_sparse(), Y), 0)] * 2,
    ],
)
def test_what_cannot_be_compared_or_is_always_the_same_stays(batches):
    assert without_repeats(batches) == batches


@pytest.mark.parametrize("seed", range(4))
def test_targets_of_other_inputs_look_paired_only_because_samples_come_twice(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(200, 10, generator=generator), torch.randn(200, 1, generator=generator)
    drawn = [torch.randint(200, (32,), generator=generator) for _ in range(32)]
    batches = [((x[chosen], y[chosen]), at) for at, chosen in enumerate(drawn)]
    weight = torch.full((1, 10), 0.1, requires_grad=True)

    def loss(x, y):
        return lambda: ((x @ weight.T - y) ** 2).mean()

    def agreement(batches):
        pairs = [(loss(x, y), loss(x, y.roll(len(y) // 2, 0))) for (x, y), _ in batches]
        return pairing(pairs, [weight])["pairing_agreement"]

    assert agreement(batches) > 3
    assert agreement(without_repeats(batches)) < 2.5
