"""The layers of a stacked recurrence hand on as much as the first one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradflow.remedies.recurrent import reinitialise_recurrence
from lightning_gradflow.remedies.stacked import level

SIZE, STEPS = 24, 30


def _drawn(kind, layers=6, **kwargs):
    torch.manual_seed(0)
    module = kind(3, SIZE, layers, **kwargs)
    reinitialise_recurrence(module, torch.Generator().manual_seed(0), STEPS)
    return module


def _sequence():
    return torch.randn(STEPS, 16, 3, generator=torch.Generator().manual_seed(1))


def _sizes(module, x):
    """Of each layer by itself: a recurrence of one layer, with its weights."""
    ends = ("", "_reverse") if module.bidirectional else ("",)
    sizes = []
    for layer in range(module.num_layers):
        one = copy.deepcopy(module)
        one = type(module)(x.shape[-1], SIZE, 1, bidirectional=module.bidirectional)
        if isinstance(module, nn.RNN):
            one.nonlinearity, one.mode = module.nonlinearity, module.mode
        for end in ends:
            for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(one, f"{key}_l0{end}").data = getattr(module, f"{key}_l{layer}{end}").data
        with torch.no_grad():
            x = one(x)[0]
        sizes.append(x.square().mean().sqrt().item())
    return sizes


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
        (nn.LSTM, {}),
        (nn.GRU, {}),
        (nn.GRU, {"bidirectional": True}),
    ],
)
def test_each_layer_is_as_large_as_the_first_and_so_is_the_gradient(kind, kwargs):
    module, x = _drawn(kind, **kwargs), _sequence()
    before = _sizes(module, x)
    assert not 0.2 < before[-1] / before[0] < 5
    assert level(module, x)
    after = _sizes(module, x)
    assert after[0] == before[0]
    assert after == pytest.approx([before[0]] * 6, rel=0.15)
    module(x)[0].mean(0).square().sum().backward()
    assert 0.1 < (module.bias_ih_l0.grad.norm() / module.bias_ih_l5.grad.norm()).item() < 10


def test_nothing_but_the_weights_between_the_layers_is_scaled_and_of_gates_nothing():
    module, x = _drawn(nn.LSTM, layers=2), _sequence()
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    level(module, x)
    changed = {key for key, p in module.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {"weight_ih_l1"}
    blocks = zip(module.weight_ih_l1.split(SIZE), before["weight_ih_l1"].split(SIZE), strict=True)
    assert [torch.equal(new, old) for new, old in blocks] == [True, True, False, True]


@pytest.mark.parametrize("module", [nn.RNN(3, SIZE, 4), nn.RNN(3, SIZE, 1, nonlinearity="relu"), nn.LSTM(3, SIZE)])
def test_tanh_units_and_single_layers_stay_as_they_are(module):
    before = copy.deepcopy(module.state_dict())
    assert not level(module, _sequence())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_frozen_weights_stay_as_they_are():
    module = _drawn(nn.GRU)
    module.weight_ih_l2.requires_grad_(False)
    before = module.weight_ih_l2.clone()
    level(module, _sequence())
    assert torch.equal(module.weight_ih_l2, before)


def test_packed_sequences_count_without_their_padding():
    plain, packed, x = _drawn(nn.LSTM), _drawn(nn.LSTM), _sequence()
    level(plain, x[:20])
    padded = torch.cat([x[:20], torch.zeros(10, 16, 3)])
    level(packed, pack_padded_sequence(padded, torch.full((16,), 20)))
    for one, other in zip(plain.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_ranks_scale_by_what_they_measure_together():
    alone, together, x = _drawn(nn.GRU), _drawn(nn.GRU), _sequence()
    level(alone, x)
    calls = []
    level(together, x, lambda square: calls.append(square) or 7 * square)  # a factor that all sizes share
    assert calls
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), together.parameters(), strict=True))


def test_what_is_not_finite_or_zero_ends_it():
    for value in (float("nan"), 0.0):
        module = _drawn(nn.GRU)
        before = module.weight_ih_l1.clone()
        assert not level(module, torch.full((STEPS, 2, 3), value))
        assert torch.equal(module.weight_ih_l1, before)
