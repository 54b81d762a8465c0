"""A recurrence of a finding is treated, and what comes of it through time is measured on a batch."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.recurrent_treatment import treat
from lightning_gradflow.remedies.through_time import TimeWatch, comes_from
from lightning_gradflow.remedies.training import Training

STEPS, SIZE = 40, 16


class Loop(nn.Module):
    """A recurrence by hand, with one layer for the state and one for the input, of the same shape."""

    def __init__(self, activation=nn.Tanh, inputs=SIZE):
        super().__init__()
        self.enter = nn.Linear(inputs, SIZE)
        self.again = nn.Linear(SIZE, SIZE)
        self.activation = activation()
        self.read = nn.Linear(SIZE, 1)

    def forward(self, x):
        state = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            state = self.activation(self.enter(now) + self.again(state))
        return self.read(state)


class Joined(Loop):
    """The same with one layer for both."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(5 + SIZE, SIZE)

    def forward(self, x):
        state = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            state = self.activation(self.again(torch.cat([now[:, :5], state], 1)))
        return self.read(state)


class Fused(nn.Module):
    def __init__(self, kind=nn.RNN, **kwargs):
        super().__init__()
        self.rnn = kind(SIZE, SIZE, **kwargs)
        self.read = nn.Linear(SIZE * (2 if kwargs.get("bidirectional") else 1), 1)

    def forward(self, x):
        return self.read(self.rnn(x)[0][-1])


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTMCell(SIZE, SIZE)
        self.read = nn.Linear(SIZE, 1)

    def forward(self, x):
        state = None
        for now in x:
            state = self.rnn(now, state)
        return self.read(state[0])


def _seeded(make):
    torch.manual_seed(0)
    return make()


def _history(layers, ops=(), steps=STEPS, gates=()):
    """Layers and the activations behind them, each called at each time step."""
    history = History()
    points = [*(Point(name, name) for name in layers), *(Point(name, name, op) for name, op in ops)]
    history.add_points(points)
    gate = np.array([float(point.name in gates) if point.op else np.nan for point in points])
    history.append(Row(0, values={"gate_fraction": gate}, calls={p.name: np.ones(steps) for p in points}))
    return history


def _training(model, history, optimizers=(), rehearses=True, averaged=lambda x: x, seed=1):
    x = torch.randn(STEPS, 4, SIZE, generator=torch.Generator().manual_seed(0))

    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(model)
        yield twin, lambda: twin(x)

    return Training(model, optimizers, history, rehearse if rehearses else None, averaged, seed)


def _finding(*layers):
    return Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 0, layers, "recurrence")


LOOP = ("again", "enter")


def _treat_loop(make, op="tanh", ops=None, **kwargs):
    model = _seeded(make)
    history = _history(["enter", "again"], ops or [("activation", op)], gates=kwargs.pop("gates", ()))
    return model, treat(_training(model, history, **kwargs), _finding(*LOOP))


@pytest.mark.parametrize(
    "make", [Fused, lambda: Fused(nonlinearity="relu"), lambda: Fused(nn.LSTM), lambda: Fused(nn.GRU), Cells]
)
def test_a_gradient_that_vanishes_comes_through_afterwards(make):
    model = _seeded(make)
    treatment = treat(_training(model, _history(["rnn"])), _finding("rnn"))
    assert treatment.layers == ("rnn",)
    assert treatment.changed == tuple(model.rnn.parameters())
    assert treatment.before["time_decades"] < -4
    assert abs(treatment.after["time_decades"]) < 2
    assert treatment.after["time_steps"] == STEPS


@pytest.mark.parametrize(("activation", "op"), [(nn.Tanh, "tanh"), (nn.Sigmoid, "sigmoid"), (nn.ReLU, "relu")])
def test_a_loop_by_hand_comes_through_afterwards(activation, op):
    _, treatment = _treat_loop(lambda: Loop(activation), op)
    assert set(treatment.layers) == {"enter", "again"}
    assert treatment.before["time_decades"] < -4
    assert abs(treatment.after["time_decades"]) <= 1


def test_a_gradient_that_explodes_does_no_longer():
    model = _seeded(lambda: Fused(nonlinearity="relu"))
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(2 * torch.eye(SIZE))
    treatment = treat(_training(model, _history(["rnn"])), _finding("rnn"))
    assert treatment.before["time_decades"] > 8
    assert abs(treatment.after["time_decades"]) < 1


def test_of_two_square_layers_the_one_that_gets_the_state_is_orthogonal():
    model, _ = _treat_loop(Loop)
    small = model.again.weight @ model.again.weight.T
    torch.testing.assert_close(small / small[0, 0], torch.eye(SIZE), atol=1e-4, rtol=0)
    other = model.enter.weight @ model.enter.weight.T / model.enter.weight.square().sum(dim=1)
    assert (other - torch.diag(other.diag())).abs().max() > 0.1


def test_of_a_layer_that_gets_both_the_columns_of_the_state_are_found():
    model = _seeded(Joined)
    treatment = treat(_training(model, _history(["again"], [("activation", "tanh")])), _finding("again"))
    small = model.again.weight[:, 5:] @ model.again.weight[:, 5:].T
    torch.testing.assert_close(small / small[0, 0], torch.eye(SIZE), atol=1e-4, rtol=0)
    assert abs(treatment.after["time_decades"]) < 1


def test_without_a_rehearsal_the_only_square_layer_is_taken():
    model, treatment = _treat_loop(lambda: Loop(inputs=SIZE), rehearses=False)
    assert treatment is None
    model = _seeded(lambda: Loop(inputs=3))
    history = _history(["enter", "again"], [("activation", "tanh")])
    treatment = treat(_training(model, history, rehearses=False), _finding(*LOOP))
    assert treatment.layers == ("again", "enter")
    assert treatment.before == treatment.after == {}


def test_a_layer_that_makes_a_gate_is_left_as_it_is():
    _, treatment = _treat_loop(lambda: Loop(nn.Sigmoid), "sigmoid", gates=["activation"])
    assert treatment is None


def test_a_content_that_a_gate_lets_in_is_drawn_anew():
    _, treatment = _treat_loop(Loop, gates=["activation"])
    assert set(treatment.layers) == {"enter", "again"}


def test_the_memory_of_an_lstm_is_set_to_the_time_steps_that_the_run_shows():
    model = _seeded(lambda: Fused(nn.LSTM))
    treat(_training(model, _history(["rnn"], steps=60)), _finding("rnn"))
    memory = 1 / (1 - model.rnn.bias_ih_l0[SIZE : 2 * SIZE].sigmoid())
    assert 40 < memory.max() <= 60.01


def test_a_recurrence_both_ways_lasts_twice_the_way_to_the_nearer_end():
    model = _seeded(lambda: Fused(nn.LSTM, bidirectional=True))
    treat(_training(model, _history(["rnn"], steps=60)), _finding("rnn"))
    memory = 1 / (1 - model.rnn.bias_ih_l0_reverse[SIZE : 2 * SIZE].sigmoid())
    assert 80 < memory.max() <= 120.01


def test_the_optimizer_forgets_what_was_drawn_anew_and_no_more():
    model = _seeded(Fused)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(STEPS, 2, SIZE)).sum().backward()
    optimizer.step()
    treat(_training(model, _history(["rnn"]), [optimizer]), _finding("rnn"))
    assert set(optimizer.state) == set(model.read.parameters())


class Pictures(nn.Module):
    """A recurrence of convolutions by hand; the input and the state in two layers, or side by side in one."""

    def __init__(self, activation, joined, gain):
        super().__init__()
        self.joined = joined
        self.enter = nn.Conv2d(1, 6, 3, padding=1)
        self.again = nn.Conv2d(7 if joined else 6, 6, 3, padding=1, bias=False)
        self.again.weight.data *= gain
        self.activation = activation()

    def forward(self, x):
        x = x.reshape(STEPS, 4, 1, 4, 4)
        state = x.new_zeros(4, 6, 4, 4)
        for now in x:
            new = self.again(torch.cat([now, state], 1)) if self.joined else self.enter(now) + self.again(state)
            state = self.activation(new)
        return state.mean()


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("activation", "op", "gain"), [(nn.ReLU, "relu", 6.0), (nn.Tanh, "tanh", 0.3)])
def test_a_loop_of_convolutions_is_treated_as_one_of_linear_layers(activation, op, gain, joined):
    model, treatment = _treat_loop(lambda: Pictures(activation, joined, gain), op)
    assert set(treatment.layers) == ({"again"} if joined else {"again", "enter"})
    assert abs(treatment.before["time_decades"]) > 4
    assert abs(treatment.after["time_decades"]) < 1
    state = model.again.weight[:, -6:].flatten(2).detach().clone()
    middle = state[:, :, 4].clone()
    state[:, :, 4] = 0
    assert not state.any()
    torch.testing.assert_close(middle @ middle.T / (middle @ middle.T)[0, 0], torch.eye(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "kwargs"), [(nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {})])
def test_the_layers_of_a_stack_are_set_to_one_size(kind, kwargs):
    model = _seeded(lambda: Fused(kind, num_layers=8, **kwargs))
    treatment = treat(_training(model, _history(["rnn"])), _finding("rnn"))
    assert treatment.changed == tuple(model.rnn.parameters())
    x = torch.randn(STEPS, 4, SIZE, generator=torch.Generator().manual_seed(0))
    lowest = kind(SIZE, SIZE, **kwargs)
    lowest.load_state_dict({key: p for key, p in model.rnn.state_dict().items() if key.endswith("l0")})
    size, last = lowest(x)[0].norm().item(), model.rnn(x)[0].norm().item()
    assert last == pytest.approx(size, rel=0.15)


def test_layers_that_the_finding_does_not_name_are_left_as_they_are():
    model = _seeded(Loop)
    before = copy.deepcopy(model.state_dict())
    history = _history(["enter", "again"], [("activation", "tanh")])
    treat(_training(model, history), _finding("again"))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"again.weight", "again.bias"}


def test_a_tied_weight_is_left_as_it_is():
    model = _seeded(Fused)
    model.other = nn.RNN(SIZE, SIZE)
    model.other.weight_hh_l0 = model.rnn.weight_hh_l0
    assert treat(_training(model, _history(["rnn"])), _finding("rnn")) is None


def test_a_finding_without_a_recurrence_is_not_treated():
    model = _seeded(Fused)
    assert treat(_training(model, _history(["read"])), _finding("read")) is None


def test_the_same_seed_does_the_same_and_the_global_generator_is_not_touched():
    one, other = _seeded(Fused), _seeded(lambda: Fused())
    torch.nn.init.normal_(other.rnn.weight_hh_l0)
    state = torch.get_rng_state()
    for model in (one, other):
        treat(_training(model, _history(["rnn"])), _finding("rnn"))
    torch.testing.assert_close(one.rnn.weight_hh_l0, other.rnn.weight_hh_l0, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("span", "shrinks"), [(-0.1, False), (-2.0, False), (-20.0, True)])
def test_what_is_lost_to_curvature_is_made_up_for_by_the_mean_over_the_ranks(span, shrinks):
    """All ranks do what the mean asks for: a gain for a small loss, a smaller input for a large one."""
    model, plain = _seeded(Fused), _seeded(Fused)
    answers = iter([0.0, span, 0.0])  # before, after the first draw, after the second
    treat(_training(model, _history(["rnn"]), averaged=lambda x: torch.tensor([next(answers), x[1]])), _finding("rnn"))
    treat(_training(plain, _history(["rnn"]), rehearses=False), _finding("rnn"))
    gain = model.rnn.weight_hh_l0.norm() / plain.rnn.weight_hh_l0.norm()
    input_gain = model.rnn.weight_ih_l0.norm() / plain.rnn.weight_ih_l0.norm()
    expected = 10 ** (-span / (STEPS - 1)) if span == -2.0 else 1.0
    assert gain.item() == pytest.approx(expected, rel=1e-5)
    assert input_gain.item() == pytest.approx(0.5 if shrinks else 1.0, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_profile_is_the_power_of_the_only_weight(batch_first, packed):
    rnn = nn.RNN(1, 1, bias=False, nonlinearity="relu", batch_first=batch_first)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(0.5)
        rnn.weight_ih_l0.fill_(1.0)
    x = torch.ones(3, 20, 1) if batch_first else torch.ones(20, 3, 1)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([20, 15, 12]), batch_first=batch_first)
    profile = TimeWatch(nn.ModuleDict({"rnn": rnn}), ["rnn"], lambda: rnn(x)).profile("rnn")
    assert profile.steps == 20
    assert profile.decay == pytest.approx(0.5, rel=0.05 if packed else 1e-6)


def test_hooks_are_gone_after_the_pass_and_after_an_error():
    model = _seeded(Fused)

    def fails():
        raise RuntimeError("a step that fails")

    TimeWatch(model, ["rnn"], lambda: model(torch.ones(STEPS, 2, SIZE)))
    with pytest.raises(RuntimeError, match="a step that fails"):
        TimeWatch(model, ["rnn"], fails)
    assert not model.rnn._forward_hooks
    assert not model.rnn._forward_pre_hooks


def test_what_came_from_a_tensor_is_known_by_the_graph():
    x = torch.ones(3, requires_grad=True).exp()
    assert comes_from(torch.cat([x, x]).sum(), x)
    assert not comes_from(torch.ones(3, requires_grad=True).exp(), x)
    assert not comes_from(x.detach(), x)
