"""Statistics of outputs and deltas against analytic values and a naive second implementation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gradflow.history import Point
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer


class Calls(nn.Module):
    """A model whose forward is the function that it is given."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class Sampled:
    """A probe on a model, with a sampled step in one line."""

    def __init__(self, model, **kwargs):
        self.transfer = Transfer()
        self.probe = SignalProbe(LayerMap(model), self.transfer, **kwargs)

    def step(self, *losses):
        for loss in losses:
            self.probe.start_batch()
            value = loss()
            self.probe.before_backward()
            value.backward()
        return self.finish()

    def finish(self):
        self.probe.finish()
        return {point.name: values for point, values in self.probe.collect(self.transfer.fetch()).items()}


def _norm(*gradients):
    return math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))


def test_the_delta_is_the_gradient_at_the_output():
    model = nn.Linear(2, 2, bias=False)
    found = Sampled(model).step(lambda: (model(torch.ones(1, 2)) * torch.tensor([3.0, 4.0])).sum())
    assert found["(root)"]["delta_norm"] == 5.0


def test_output_rms_is_the_root_mean_square():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[3.0], [4.0]])
    found = Sampled(model).step(lambda: model(torch.ones(5, 1)).sum())
    assert found["(root)"]["output_rms"] == pytest.approx(math.sqrt(12.5))


def test_deltas_are_those_of_retained_outputs():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 3)
    model = Calls(lambda self, x: self.second(torch.tanh(self.first(x))), first=first, second=second)
    x = torch.randn(7, 6)
    a = first(x)
    b = torch.tanh(a)
    c = second(b)
    naive = dict(
        zip(
            ("first", "first/tanh", "second"),
            map(_norm, torch.autograd.grad(c.square().mean(), (a, b, c))),
            strict=True,
        )
    )
    found = Sampled(model).step(lambda: model(x).square().mean())
    assert {name: values["delta_norm"] for name, values in found.items()} == pytest.approx(naive, rel=1e-6)


def test_points_stand_in_order_of_execution():
    model = Calls(lambda self, x: self.a(F.relu(self.b(x))), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    assert list(Sampled(model).step(lambda: model(torch.ones(1, 2)).sum())) == ["b", "b/relu", "a"]


def test_an_activation_in_place_leaves_both_deltas_right():
    def deltas(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace), nn.Linear(6, 3))
        found = Sampled(model).step(lambda: model(torch.ones(4, 6)).square().sum())
        return {name: values["delta_norm"] for name, values in found.items()}

    assert deltas(True) == deltas(False)


def test_a_module_that_runs_twice_gives_the_norm_over_both():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    once = layer(x)
    twice = layer(once)
    naive = _norm(*torch.autograd.grad(twice.square().sum(), (once, twice)))
    found = Sampled(layer).step(lambda: layer(layer(x)).square().sum())
    assert found["(root)"]["delta_norm"] == pytest.approx(naive, rel=1e-6)


def test_accumulated_batches_are_taken_together():
    model = nn.Linear(1, 1, bias=False)
    batches = [lambda size=size: (model(torch.ones(1, 1)) * size).sum() for size in (3.0, 4.0)]
    assert Sampled(model).step(*batches)["(root)"]["delta_norm"] == 5.0


def test_a_delta_of_1e_30_is_not_zero():
    model = nn.Linear(1, 1)
    found = Sampled(model).step(lambda: (model(torch.ones(1, 1)) * 1e-30).sum())
    assert found["(root)"]["delta_norm"] == pytest.approx(1e-30)


def test_a_delta_that_is_no_number_is_infinite_and_not_missing():
    model = nn.Linear(1, 1)
    found = Sampled(model).step(lambda: (model(torch.ones(1, 1)) * math.nan).sum())
    assert found["(root)"]["delta_norm"] == math.inf


def test_a_layer_under_no_grad_has_an_output_and_no_delta():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def loss():
        with torch.no_grad():
            hidden = model[0](torch.ones(1, 2))
        return model[1](hidden).sum()

    found = Sampled(model).step(loss)
    assert "output_rms" in found["0"]
    assert "delta_norm" not in found["0"]


def test_an_output_of_which_only_its_sibling_is_used_has_no_delta():
    class Split(nn.Linear):
        def forward(self, x):
            return super().forward(x).unbind(1)

    model = Split(2, 2)
    found = Sampled(model).step(lambda: model(torch.ones(3, 2))[1].sum())
    assert "delta_norm" not in found["(root)"]


def test_a_gradient_penalty_does_not_count_as_the_loss():
    model = nn.Linear(2, 1, bias=False)

    def loss():
        x = torch.ones(1, 2, requires_grad=True)
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum() * 100, x, create_graph=True)
        return output.sum() * 7 + slope.square().sum() * 0

    assert Sampled(model).step(loss)["(root)"]["delta_norm"] == 7.0


def test_backward_passes_of_a_step_are_not_mixed():
    """As in a GAN: the pass through the most points comes first, the others fill in what it lacks."""
    model = Calls(None, shared=nn.Linear(1, 1), front=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.probe.start_batch()
    loss = 3 * model.shared(torch.ones(1, 1)).sum()
    sampled.probe.before_backward()
    loss.backward()
    sampled.probe.next_forward()
    loss = 5 * model.shared(model.front(torch.ones(1, 1))).sum()
    sampled.probe.before_backward()
    loss.backward()
    found = sampled.finish()
    assert {name: values["backward_pass"] for name, values in found.items()} == {"shared": 1.0, "front": 1.0}
    assert found["shared"]["delta_norm"] == 5.0


@pytest.mark.parametrize(
    ("function", "values", "share"),
    [
        (torch.sigmoid, [-9.0, 0.0, 0.0, 9.0], 0.5),
        (torch.tanh, [-9.0, 9.0, 9.0, 0.0], 0.75),
        (lambda x: F.hardtanh(x, -5.0, 5.0), [-9.0, 1.0, 1.0, 1.0], 0.25),
    ],
)
def test_the_saturated_share_is_that_of_the_outputs(function, values, share):
    model = Calls(lambda self, x: self.lin(function(x)), lin=nn.Linear(4, 1))
    found = Sampled(model).step(lambda: model(torch.tensor([values])).sum())
    assert next(iter(found.values()))["saturated_fraction"] == share


def test_dead_units_are_silent_for_every_sample_of_the_window():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    model[0].weight.data.zero_()
    model[0].bias.data = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    sampled = Sampled(model, window=2)
    shares = [sampled.step(lambda: model(torch.ones(3, 1)).sum())["1"]["dead_fraction"] for _ in range(2)]
    assert math.isnan(shares[0])
    assert shares[1] == 0.75


def test_a_unit_that_fires_in_one_batch_of_an_accumulated_step_is_alive():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    batches = [lambda x=x: model(torch.tensor([[x]])).sum() for x in (1.0, -1.0)]
    assert Sampled(model, window=1).step(*batches)["1"]["dead_fraction"] == 0.0


def test_activations_can_be_left_out():
    model = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid())
    found = Sampled(model, activations=False).step(lambda: model(torch.ones(1, 1)).sum())
    assert "saturated_fraction" not in found["1"]


@pytest.mark.parametrize("shape", [(0, 2), (2,)])
def test_empty_and_unbatched_inputs_are_taken(shape):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sigmoid())
    found = Sampled(model, window=1).step(lambda: model(torch.ones(shape)).sum())
    assert len(found) == (3 if 0 not in shape else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_measured(dtype):
    model = nn.Linear(2, 2, bias=False).to(dtype)
    weights = torch.tensor([3.0, 4.0], dtype=dtype)
    found = Sampled(model).step(lambda: (model(torch.ones(1, 2, dtype=dtype)) * weights).sum())
    assert found["(root)"]["delta_norm"] == 5.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_seen_once(reentrant):
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    model = Calls(lambda self, x: checkpoint(self.block, x, use_reentrant=reentrant).sum(), block=block)
    sampled = Sampled(model)
    found = sampled.step(lambda: model(torch.ones(3, 2, requires_grad=True)))
    assert list(found) == ["block.0", "block.1"]
    assert found["block.1"]["saturated_fraction"] == 0.0


def test_the_delta_of_a_checkpointed_block_is_that_without_checkpoint():
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    x = torch.ones(3, 2)
    plain = Sampled(block).step(lambda: block(x).sum())
    saved = Sampled(block).step(lambda: checkpoint(block, x, use_reentrant=False).sum())
    assert saved["0"]["delta_norm"] == plain["0"]["delta_norm"]


def test_a_graph_that_outlives_its_sample_writes_nothing_into_a_later_one():
    model = nn.Linear(1, 1)
    sampled = Sampled(model)
    kept = []

    def loss():
        kept.append(model(torch.ones(1, 1)).sum())
        return kept[-1] * 2

    sampled.probe.start_batch()
    value = loss()
    sampled.probe.before_backward()
    value.backward(retain_graph=True)
    sampled.finish()
    sampled.probe.start_batch()
    sampled.probe.before_backward()
    kept[0].backward()
    assert not sampled.probe.had_backward


def test_no_hook_is_left_on_a_parameter_that_a_module_returned():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self):
            return self.weight

    model = Position()
    found = Sampled(model).step(lambda: (model() * 3).sum())
    assert found["(root)"]["delta_norm"] == pytest.approx(math.sqrt(18))
    assert not model.weight._backward_hooks


def test_a_dropped_sample_is_forgotten():
    model = nn.Linear(1, 1)
    sampled = Sampled(model)
    sampled.probe.start_batch()
    model(torch.ones(1, 1))
    sampled.probe.drop()
    assert not sampled.probe.is_observing
    assert sampled.finish() == {}


def test_an_error_of_ours_does_not_reach_the_forward_pass(monkeypatch):
    def breaks(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("lightning_gradflow.probes.signals._sum_of_squares", breaks)
    model = nn.Linear(1, 1)
    sampled = Sampled(model)
    sampled.probe.start_batch()
    loss = model(torch.ones(1, 1)).sum()
    sampled.probe.before_backward()
    loss.backward()
    with pytest.raises(ZeroDivisionError):
        sampled.probe.finish()


def test_one_shared_activation_behind_many_layers_is_a_point_behind_each():
    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return x

    model = Calls(forward, layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), act=nn.ReLU())
    found = Sampled(model).step(lambda: model(torch.ones(1, 2)).sum())
    assert list(found) == ["layers.0", "act", "layers.1", "layers.1/act", "layers.2", "layers.2/act"]


def test_a_thousand_layers_are_measured():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(1000)))
    for layer in model:
        nn.init.eye_(layer.weight)
    found = Sampled(model).step(lambda: model(torch.ones(1, 2)).sum())
    np.testing.assert_allclose([values["delta_norm"] for values in found.values()], np.full(1000, math.sqrt(2)))


def test_packed_sequences_are_measured():
    sequence = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    model = nn.LSTM(1, 2)
    found = Sampled(model).step(lambda: model(sequence)[0].data.sum())
    assert found["(root)"]["delta_norm"] == pytest.approx(math.sqrt(10))


def test_the_output_projection_of_an_attention_is_no_point():
    model = nn.MultiheadAttention(4, 2)
    x = torch.ones(3, 1, 4)
    found = Sampled(model).step(lambda: model(x, x, x)[0].sum())
    assert list(found) == ["(root)"]


def test_points_tell_the_module_to_name_to_people():
    model = Calls(lambda self, x: F.relu(self.lin(x)), lin=nn.Linear(1, 1))
    probe = SignalProbe(LayerMap(model), transfer := Transfer())
    probe.start_batch()
    loss = model(torch.ones(1, 1)).sum()
    probe.before_backward()
    loss.backward()
    probe.finish()
    assert list(probe.collect(transfer.fetch())) == [Point("lin", "lin"), Point("lin/relu", "lin", "relu")]
