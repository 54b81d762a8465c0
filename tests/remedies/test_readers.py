"""Which layers read what a recurrence gives out, and where their inputs lie."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.patient import Patient
from lightning_gradflow.remedies.readers import centres_behind
from lightning_gradflow.remedies.training import RehearsalError, Training
from lightning_gradflow.remedies.treatments import treat

SIZE = 8


class Loop(nn.Module):
    """A recurrence by hand, one layer that reads its states, one behind that, and one that reads the inputs."""

    def __init__(self, op):
        super().__init__()
        self.before = nn.Linear(SIZE, SIZE)
        self.again = nn.Linear(SIZE, SIZE)
        self.read = nn.Linear(SIZE, SIZE)
        self.last = nn.Linear(SIZE, 1)
        self.beside = nn.Linear(SIZE, 1)
        self.op = op

    def forward(self, x):
        state = x.new_zeros(x.shape[1], SIZE)
        for now in x:
            state = self.op(self.before(now) + self.again(state))
        self.states = state.detach()
        return self.last(torch.relu(self.read(state)) + 5.0) + self.beside(x[0] + 5.0)


class Fused(nn.Module):
    def __init__(self, kind, of_state):
        super().__init__()
        self.rnn = kind(SIZE, SIZE)
        self.read = nn.Linear(SIZE, 1)
        self.of_state = of_state

    def forward(self, x):
        sequence, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.read((state if self.of_state else sequence) + 5.0)


def _training(model, steps=12):
    torch.manual_seed(0)
    x = torch.randn(steps, 32, SIZE)

    @contextmanager
    def rehearse():
        yield model, lambda: model(x)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Training(model, [optimizer], History(), rehearse)


def _seeded(make, *args):
    torch.manual_seed(0)
    return make(*args)


def test_layers_behind_a_recurrence_of_sigmoids_read_what_lies_off_zero():
    assert set(centres_behind(_training(_seeded(Loop, torch.sigmoid)), ["again", "before"])) == {"read", "last"}


def test_a_layer_whose_inputs_lie_around_zero_is_left_as_it_is():
    assert set(centres_behind(_training(_seeded(Loop, torch.tanh)), ["again", "before"])) == {"last"}


@pytest.mark.parametrize("of_state", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_reader_of_the_sequence_or_of_the_state_is_found(kind, of_state):
    assert list(centres_behind(_training(_seeded(Fused, kind, of_state)), ["rnn"])) == ["read"]


def test_a_centre_is_the_mean_of_each_feature_and_what_is_around_them():
    model = _seeded(Loop, torch.sigmoid)
    centre = centres_behind(_training(model), ["again", "before"])["read"]
    torch.testing.assert_close(centre.mean, model.states.mean(0))
    assert centre.spread == pytest.approx(float(model.states.var(0, correction=0).mean().sqrt()))


def _fails():
    raise RehearsalError("the model can't be copied")


@pytest.mark.parametrize("rehearse", [None, _fails])
def test_without_a_rehearsal_nothing_is_known(rehearse):
    assert centres_behind(Training(Loop(torch.sigmoid), [], History(), rehearse), ["again"]) == {}


RECURS = Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 0, ("rnn",), "recurrence")


@pytest.mark.parametrize(("kind", "ratio"), [(nn.RNN, 0.01), (nn.LSTM, 0.03), (nn.GRU, 0.03)])
def test_what_is_drawn_anew_makes_small_steps_and_without_gates_smaller_ones(kind, ratio):
    training = _training(_seeded(Fused, kind, False))
    training.history.add_points([Point("rnn", "rnn"), Point("read", "read")])
    held = Held(training)
    assert treat("reinit", Patient(training, RECURS, held, has_past=False, allow=("clip",))).layers == ("rnn",)
    assert held.state_dict()["clipper"]["max_ratio"] == ratio
    assert held.scaling.layers == ("read",)


def test_what_the_network_computes_stays_as_it_is_but_for_the_recurrence():
    training = _training(_seeded(Fused, nn.RNN, False))
    training.history.add_points([Point("rnn", "rnn"), Point("read", "read")])
    read = training.model.read.weight.detach().clone()
    treat("reinit", Patient(training, RECURS, Held(training), has_past=False))
    assert torch.equal(training.model.read.weight, read)
