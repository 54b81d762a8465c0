"""Statistics of outputs and deltas against analytic values and a naive second implementation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
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

    def step(self, *losses, **kwargs):
        for loss in losses:
            self.probe.start_batch()
            value = loss()
            self.probe.before_backward()
            value.backward()
            self.probe.after_backward()
        return self.finish(**kwargs)

    def finish(self, **kwargs):
        self.probe.finish()
        signals = self.probe.collect(self.transfer.fetch(), **kwargs)
        self.calls = signals.calls
        return {point.name: values for point, values in signals.points.items()}


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
    assert sampled.finish() == {}


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

    monkeypatch.setattr("lightning_gradflow.probes.gathering._waits", breaks)
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
    assert list(probe.collect(transfer.fetch()).points) == [Point("lin", "lin"), Point("lin/relu", "lin", "relu")]


@pytest.mark.parametrize("multiplier", [2.0, 0.125])
def test_a_multiplier_scales_deltas_and_nothing_else(multiplier):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())
    x = torch.ones(2, 3)
    plain = Sampled(model).step(lambda: model(model(x)).sum())
    scaled = Sampled(model).step(lambda: model(model(x)).sum(), multiplier=multiplier)
    expected = {name: found | {"delta_norm": found["delta_norm"] * multiplier} for name, found in plain.items()}
    assert scaled == {name: pytest.approx(found) for name, found in expected.items()}


# -- the calls of a point that runs more than once


def _doubling(turns, dtype=torch.float32):
    """x -> 2^turns * x by a cell in a loop; the gradient at the output of call k of a sum is 2^(turns - 1 - k)."""

    def forward(self, x):
        for _ in range(turns):
            x = self.cell(x)
        return x

    model = Calls(forward, cell=nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(model.cell.weight, 2.0)
    return model


def test_each_turn_of_a_loop_has_its_own_delta_in_order_of_execution():
    model = _doubling(5)
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum())
    assert sampled.calls["cell"].tolist() == [16.0, 8.0, 4.0, 2.0, 1.0]


def test_the_number_of_calls_is_told():
    model = _doubling(5)
    assert Sampled(model).step(lambda: model(torch.ones(1, 1)).sum())["cell"]["calls"] == 5.0


def test_a_point_that_runs_once_has_no_calls():
    model = _doubling(1)
    sampled = Sampled(model)
    found = sampled.step(lambda: model(torch.ones(1, 1)).sum())
    assert sampled.calls == {}
    assert "calls" not in found["cell"]


def test_the_delta_of_a_loop_is_the_norm_over_its_calls():
    model = _doubling(5)
    sampled = Sampled(model)
    found = sampled.step(lambda: model(torch.ones(1, 1)).sum())
    assert found["cell"]["delta_norm"] == pytest.approx(np.sqrt((sampled.calls["cell"] ** 2).sum()))


def test_calls_are_multiplied_like_the_delta_norm():
    model = _doubling(3)
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum(), multiplier=0.5)
    assert sampled.calls["cell"].tolist() == [2.0, 1.0, 0.5]


def test_the_calls_of_a_cell_are_those_of_retained_outputs():
    torch.manual_seed(0)
    cell, head = nn.Linear(3, 3), nn.Linear(3, 1)
    x = torch.randn(4, 3)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(self.cell(x))
        return self.head(x)

    model = Calls(forward, cell=cell, head=head)
    outputs, hidden = [], x
    for _ in range(4):
        outputs.append(cell(hidden))
        hidden = torch.tanh(outputs[-1])
        outputs.append(hidden)
    naive = [_norm(g) for g in torch.autograd.grad(head(hidden).square().mean(), outputs)]
    sampled = Sampled(model)
    sampled.step(lambda: model(x).square().mean())
    assert set(sampled.calls) == {"cell", "cell/tanh"}
    np.testing.assert_allclose(sampled.calls["cell"], naive[0::2], rtol=1e-6)
    np.testing.assert_allclose(sampled.calls["cell/tanh"], naive[1::2], rtol=1e-6)


def test_the_two_uses_of_a_shared_layer_are_told_apart():
    model = Calls(lambda self, x: 3 * self.shared(x) + 5 * self.shared(2 * x), shared=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum())
    assert sampled.calls["shared"].tolist() == [3.0, 5.0]


def test_a_call_whose_output_is_not_used_is_missing_and_not_zero():
    def forward(self, x):
        self.shared(x)
        return self.shared(x) * 3

    model = Calls(forward, shared=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum())
    np.testing.assert_array_equal(sampled.calls["shared"], [math.nan, 3.0])


def test_a_call_whose_delta_is_no_number_is_infinite_and_leaves_the_others():
    model = Calls(lambda self, x: 3 * self.shared(x) + math.nan * self.shared(x), shared=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum())
    assert sampled.calls["shared"].tolist() == [3.0, math.inf]


def test_calls_of_accumulated_batches_are_taken_together_by_their_place():
    model = Calls(lambda self, x: 3 * self.shared(x) + 6 * self.shared(x), shared=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(1, 1)).sum(), lambda: 4 / 3 * model(torch.ones(1, 1)).sum())
    np.testing.assert_allclose(sampled.calls["shared"], [5.0, 10.0], rtol=1e-6)


def test_loops_of_several_lengths_in_one_step_are_as_long_as_the_longest():
    model = Calls(lambda self, x: sum(self.cell(x) for _ in range(len(x))).sum(), cell=nn.Linear(1, 1))
    sampled = Sampled(model)
    sampled.step(lambda: model(torch.ones(2, 1)), lambda: model(torch.ones(3, 1)))
    np.testing.assert_allclose(sampled.calls["cell"] ** 2, [5.0, 5.0, 3.0])


# -- headroom

SMALLEST = {torch.float64: -1074, torch.float32: -149, torch.float16: -24, torch.bfloat16: -133}
"""log2 of the smallest positive number, a subnormal one."""


def _headroom(weights, dtype=torch.float32, **kwargs):
    weights = torch.tensor([weights], dtype=dtype)
    model = nn.Linear(1, weights.shape[1]).to(dtype)
    loss = lambda: (model(torch.ones(1, 1, dtype=dtype)) * weights).sum()  # noqa: E731
    return Sampled(model).step(loss, **kwargs)["(root)"]["delta_headroom"]


@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_the_smallest_numbers_of_a_type_are_those_of_torch(dtype):
    smallest = 2.0 ** SMALLEST[dtype]
    assert torch.tensor([smallest], dtype=torch.float64).to(dtype).item() == smallest
    assert torch.tensor([smallest / 2], dtype=torch.float64).to(dtype).item() == 0.0


@pytest.mark.parametrize("exponent", [0, -10, -14])
@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_headroom_is_the_distance_to_the_smallest_number_of_the_type(dtype, exponent):
    assert _headroom([2.0**exponent] * 4, dtype) == pytest.approx(exponent - SMALLEST[dtype])


def test_headroom_is_that_of_the_root_mean_square():
    assert _headroom([3.0, 4.0, 0.0, 0.0]) == pytest.approx(math.log2(2.5) + 149)


def test_headroom_is_that_of_the_delta_as_it_was_held():
    assert _headroom([1.0], multiplier=2.0**-16) == pytest.approx(149)


def test_headroom_of_a_loop_is_that_over_all_calls():
    model = _doubling(2)
    found = Sampled(model).step(lambda: model(torch.ones(1, 1)).sum())
    assert found["cell"]["delta_headroom"] == pytest.approx(math.log2(math.sqrt(2.5)) + 149)


def test_a_delta_of_zero_has_a_headroom_of_minus_infinity():
    assert _headroom([0.0, 0.0]) == -math.inf


def test_a_delta_that_underflowed_has_a_headroom_of_minus_infinity():
    assert _headroom([2.0**-30], torch.float16) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_delta_that_is_not_finite_has_an_infinite_headroom(bad):
    assert _headroom([1.0, bad]) == math.inf


# -- spread over the batch


def _scale(factor=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, factor)
    return model


def _spread(model, *inputs):
    found = Sampled(model).step(*(lambda x=x: model(x).sum() for x in inputs))
    return found["(root)"].get("output_spread")


def test_the_spread_is_the_rms_around_the_batch_mean_over_the_rms():
    assert _spread(_scale(), torch.tensor([[1.0], [3.0]])) == pytest.approx(1 / math.sqrt(5))


@pytest.mark.parametrize("factor", [1e-25, 1e6])
def test_the_spread_does_not_depend_on_the_size_of_the_output(factor):
    assert _spread(_scale(factor), torch.tensor([[1.0], [3.0]])) == pytest.approx(1 / math.sqrt(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_same_output_for_every_sample_has_no_spread(dtype):
    model = nn.Linear(4, 8).to(dtype)
    assert _spread(model, torch.full((37, 4), 0.3, dtype=dtype)) < 1e-8


def test_outputs_around_zero_have_a_spread_of_one():
    assert _spread(_scale(), torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])) == 1.0


def test_positions_that_differ_are_no_spread():
    positions = torch.arange(5.0).reshape(1, 5, 1).expand(3, 5, 1)
    assert _spread(_scale(), positions) == 0.0


def test_each_batch_of_a_step_spreads_around_its_own_mean():
    assert _spread(_scale(), torch.tensor([[1.0], [1.0]]), torch.tensor([[9.0], [9.0]])) == 0.0


def test_each_call_spreads_around_its_own_mean():
    model = Calls(lambda self, x: self.cell(x) + self.cell(9 * x), cell=_scale())
    x = torch.tensor([[1.0], [3.0]])
    assert Sampled(model).step(lambda: model(x).sum())["cell"]["output_spread"] == pytest.approx(1 / math.sqrt(5))


def test_a_batch_of_one_sample_has_no_part_in_the_spread():
    one, two = torch.tensor([[7.0]]), torch.tensor([[1.0], [3.0]])
    assert _spread(_scale(), one) is None
    assert _spread(_scale(), one, two) == _spread(_scale(), two)


def test_an_output_of_nothing_but_zeros_has_no_spread():
    assert _spread(_scale(), torch.zeros(4, 1)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_spread_that_is_not_finite_was_measured(bad):
    assert _spread(_scale(), torch.tensor([[1.0], [bad]])) == math.inf


def test_spread_is_that_of_numpy_on_pictures():
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3), torch.randn(6, 3, 8, 8) + 2
    out = model(x).detach().double().numpy()
    assert _spread(model, x) == pytest.approx(np.sqrt(((out - out.mean(0)) ** 2).mean() / (out**2).mean()))


def test_the_output_itself_is_left_alone():
    model = nn.Linear(2, 2).double()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[-1].detach().clone()))
    sampled = Sampled(model)
    sampled.probe.start_batch()
    output = model(torch.arange(6.0, dtype=torch.float64).reshape(3, 2))
    sampled.probe.drop()
    assert torch.equal(output, seen[0])


def test_activations_have_neither_spread_nor_share_in_the_graph():
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
    found = Sampled(model).step(lambda: model(torch.tensor([[1.0], [2.0]])).sum())
    assert not {"output_spread", "in_graph"} & set(found["1"])


# -- in the graph


def _in_graph(model, loss):
    return {name: values.get("in_graph") for name, values in Sampled(model).step(loss).items()}


def test_a_layer_under_no_grad_is_not_in_the_graph_and_one_that_is_detached_later_is():
    def loss():
        with torch.no_grad():
            hidden = model[0](torch.ones(1, 2))
        return model[2](model[1](hidden).detach()).sum()

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert _in_graph(model, loss) == {"0": 0.0, "1": 1.0, "2": 1.0}


def test_a_layer_whose_own_forward_is_under_no_grad_is_not_in_the_graph():
    class Frozen(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Frozen(2, 2), nn.Linear(2, 2))
    assert _in_graph(model, lambda: model(torch.ones(1, 2)).sum()) == {"0": 0.0, "1": 1.0}


def test_frozen_layers_are_in_the_graph_where_something_before_them_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert _in_graph(model, lambda: model(torch.ones(1, 2)).sum()) == {"0": 0.0, "1": 1.0, "2": 1.0}


def test_the_share_in_the_graph_is_that_of_the_calls():
    def forward(self, x):
        with torch.no_grad():
            x = self.cell(self.cell(self.cell(x)))
        return self.cell(x)

    model = Calls(forward, cell=_scale())
    assert _in_graph(model, lambda: model(torch.ones(1, 1)).sum()) == {"cell": 0.25}


def test_of_a_checkpointed_layer_that_is_detached_later_it_cannot_be_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    def loss():
        hidden = checkpoint(model[0], torch.ones(1, 2, requires_grad=True), use_reentrant=True).detach()
        return checkpoint(model[2], model[1](hidden), use_reentrant=True).sum()

    assert _in_graph(model, loss) == {"0": None, "1": 1.0, "2": 1.0}


def test_a_teacher_inside_of_a_checkpointed_segment_is_not_in_the_graph():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def segment(x):
        with torch.no_grad():
            target = model[0](x)
        return model[1](x) - target

    x = torch.ones(1, 2, requires_grad=True)
    assert _in_graph(model, lambda: checkpoint(segment, x, use_reentrant=True).sum()) == {"0": 0.0, "1": 1.0}


def test_a_checkpointed_layer_is_in_the_graph_and_the_one_under_no_grad_before_it_is_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def loss():
        with torch.no_grad():
            hidden = model[0](torch.ones(1, 2))
        return checkpoint(model[1], hidden.requires_grad_(), use_reentrant=True).sum()

    assert _in_graph(model, loss) == {"0": 0.0, "1": 1.0}


# -- activation checkpointing


def _compare(forward, reentrant, window=1, **modules):
    """What is seen without and with checkpointing; `forward` gets the function that runs a segment."""

    def seen(segment):
        torch.manual_seed(0)
        for module in modules.values():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.7)
        model = Calls(lambda self, x: forward(self, x, segment), **modules)
        sampled = Sampled(model, window=window)
        x = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()
        return sampled.step(lambda: model(x).square().sum()), sampled.calls

    return seen(lambda part, x: part(x)), seen(lambda part, x: checkpoint(part, x, use_reentrant=reentrant))


def _same(found, expected, without=()):
    """Whether all is the same, but for the deltas of a few points, which are missing."""
    (points, calls), (plain, plain_calls) = found, expected
    delta = {"delta_norm", "delta_headroom", "backward_pass", "calls"}
    wanted = {
        name: {metric: value for metric, value in values.items() if name not in without or metric not in delta}
        for name, values in plain.items()
    }
    assert {name: dict(values) for name, values in points.items()} == {
        name: pytest.approx(values, rel=1e-6) for name, values in wanted.items()
    }
    assert set(calls) == set(plain_calls) - set(without)
    for name in calls:
        np.testing.assert_allclose(calls[name], plain_calls[name], rtol=1e-6)
    return True


def _linear():
    return nn.Linear(3, 3)


def _one_segment(self, x, segment):
    return self.head(segment(self.body, x))


def _two_segments(self, x, segment):
    return self.head(segment(self.second, segment(self.first, x)))


def _shared_activation(self, x, segment):
    x = segment(lambda h: self.act(self.first(h)), x)
    return self.head(segment(lambda h: self.act(self.second(h)), x))


def _loop(self, x, segment):
    for _ in range(4):
        x = segment(lambda h: torch.tanh(self.cell(h)), x)
    return self.head(x)


def _two_calls_in_each_segment(self, x, segment):
    for _ in range(3):
        x = segment(lambda h: torch.tanh(self.cell(torch.sigmoid(self.cell(h)))), x)
    return self.head(x)


def _inside_and_then_outside(self, x, segment):
    return self.cell(segment(lambda h: torch.tanh(self.cell(h)), x))


def _outside_and_then_inside(self, x, segment):
    return segment(lambda h: torch.tanh(self.cell(h)), self.cell(x))


def _with_branches(self, x, segment):
    return self.head(segment(self.first, x) * segment(self.second, x))


def _nothing_behind(self, x, segment):
    return segment(self.body, x)


def _body(*activations):
    return nn.Sequential(*(module for activation in activations for module in (_linear(), activation)))


CHECKPOINTED = {
    "one segment": lambda: (_one_segment, {"body": _body(nn.Sigmoid(), nn.ReLU()), "head": _linear()}),
    "two segments": lambda: (
        _two_segments,
        {"first": _body(nn.Sigmoid()), "second": _body(nn.ReLU(), nn.Tanh()), "head": _linear()},
    ),
    "a shared activation": lambda: (
        _shared_activation,
        {"first": _linear(), "second": _linear(), "act": nn.Tanh(), "head": _linear()},
    ),
    "a loop": lambda: (_loop, {"cell": _linear(), "head": _linear()}),
    "two calls in each segment": lambda: (_two_calls_in_each_segment, {"cell": _linear(), "head": _linear()}),
    "inside and then outside": lambda: (_inside_and_then_outside, {"cell": _linear()}),
    "outside and then inside": lambda: (_outside_and_then_inside, {"cell": _linear()}),
    "branches": lambda: (_with_branches, {"first": _body(nn.Tanh()), "second": _body(nn.Sigmoid()), "head": _linear()}),
    "nothing behind it": lambda: (_nothing_behind, {"body": _body(nn.Tanh(), nn.Sigmoid())}),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_checkpointing_changes_no_number(case, reentrant):
    forward, modules = CHECKPOINTED[case]()
    plain, saved = _compare(forward, reentrant, **modules)
    assert _same(saved, plain)


def test_an_activation_with_which_a_repeated_segment_begins_has_no_delta_and_spoils_no_other():
    def forward(self, x, segment):
        x = segment(self.first, x)
        return self.head(segment(lambda h: torch.tanh(self.second(torch.tanh(h))), x))

    plain, saved = _compare(forward, True, first=_body(nn.Sigmoid()), second=_linear(), head=_linear())
    assert _same(saved, plain, without=["first.0/tanh"])


def test_of_a_loop_whose_segments_begin_with_an_activation_all_other_deltas_are_right():
    def forward(self, x, segment):
        for _ in range(3):
            x = segment(lambda h: torch.tanh(self.cell(torch.sigmoid(h))), x)
        return self.head(x)

    plain, saved = _compare(forward, True, cell=_linear(), head=_linear())
    assert _same(saved, plain, without=["(root)/sigmoid", "cell/sigmoid"])


def test_a_segment_inside_a_segment_changes_no_number():
    def forward(self, x, segment):
        return self.head(segment(lambda h: torch.tanh(self.outer(segment(self.inner, h))), x))

    plain, saved = _compare(forward, True, outer=_linear(), inner=_body(nn.Sigmoid()), head=_linear())
    assert _same(saved, plain)


def test_a_segment_in_a_batch_of_an_accumulated_step_is_seen_as_often_as_there_are_batches():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    batches = [torch.randn(3, 2, requires_grad=True) for _ in range(2)]
    plain = Sampled(block).step(*(lambda x=x: block(x).square().sum() for x in batches))
    saved = Sampled(block).step(*(lambda x=x: checkpoint(block, x, use_reentrant=True).square().sum() for x in batches))
    assert _same((saved, {}), (plain, {}))


def test_after_a_checkpointed_backward_pass_nothing_is_left():
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    Sampled(block).step(lambda: checkpoint(block, torch.ones(3, 2, requires_grad=True), use_reentrant=True).sum())
    assert not _get_current_function_mode_stack()
    assert not module_hooks._global_forward_hooks


def test_after_an_error_in_a_repeated_forward_pass_nothing_is_left():
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    sampled = Sampled(block)
    sampled.probe.start_batch()
    loss = checkpoint(block, torch.ones(3, 2, requires_grad=True), use_reentrant=True).sum()
    sampled.probe.before_backward()
    block[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    sampled.probe.drop()
    assert not _get_current_function_mode_stack()
    assert not module_hooks._global_forward_hooks


def test_the_forward_pass_that_is_repeated_is_no_forward_pass_of_the_sample():
    block = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    sampled = Sampled(block)
    sampled.probe.start_batch()
    checkpoint(block, torch.ones(3, 2, requires_grad=True), use_reentrant=True)
    sampled.probe.before_backward()
    observes = sampled.probe.is_observing
    sampled.probe.drop()
    assert not observes


def test_gradients_of_checkpointed_parameters_are_those_without_a_probe():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sigmoid())
    x = torch.randn(3, 2, requires_grad=True)

    def loss():
        torch.manual_seed(1)
        return checkpoint(block, x, use_reentrant=True).square().sum()

    loss().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    Sampled(block).step(loss)
    assert all(map(torch.equal, expected, (p.grad for p in block.parameters())))


# -- a batch without a backward pass


def test_a_batch_that_is_forgotten_has_no_part_in_the_step():
    model = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid())
    x = torch.ones(3, 1)

    def step(with_a_bad_batch):
        sampled = Sampled(model, window=1)
        if with_a_bad_batch:
            sampled.probe.start_batch()
            model(1e6 * x)
            sampled.probe.forget_batch()
        return sampled.step(lambda: model(x).sum())

    assert step(True) == step(False)


def test_a_batch_that_is_forgotten_leaves_those_before_it():
    model = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid())
    x = torch.ones(3, 1)
    plain = Sampled(model).step(lambda: model(x).sum())
    sampled = Sampled(model)
    sampled.probe.start_batch()
    loss = model(x).sum()
    sampled.probe.before_backward()
    loss.backward()
    sampled.probe.after_backward()
    sampled.probe.start_batch()
    model(1e6 * x)
    sampled.probe.forget_batch()
    assert sampled.finish() == plain


@pytest.mark.parametrize(("scale", "delta"), [(4.0, 1.25), (0.0, math.inf)])
def test_deltas_are_unscaled_and_behind_a_scale_of_zero_they_are_lost(scale, delta):
    model = nn.Linear(2, 2, bias=False)
    sampled = Sampled(model)
    sampled.probe.start_batch()
    loss = (model(torch.ones(1, 2)) * torch.tensor([3.0, 4.0])).sum()
    sampled.probe.before_backward()
    loss.backward()
    sampled.probe.after_backward(torch.tensor(scale))
    assert sampled.finish()["(root)"]["delta_norm"] == delta
