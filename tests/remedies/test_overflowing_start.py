"""A run whose first forward pass overflows because of the weights that it starts from."""

import contextlib
import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.patient import Patient
from lightning_gradflow.remedies.plan import remedies_for
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.treatments import treat

OVERFLOWS = Finding(FindingKind.NONFINITE_GRADIENT, Severity.CRITICAL, 0, ("decoder.0",), "forward")


class Exponential(nn.Module):
    """What comes out of the encoder goes through an exponential into a decoder."""

    def __init__(self, std, depth=3):
        super().__init__()
        torch.manual_seed(0)
        block = [part for _ in range(depth) for part in (nn.Linear(32, 32), nn.ELU())]
        self.encoder = nn.Sequential(*block, nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 4))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, std / math.sqrt(parameter.shape[1]))

    def forward(self, x):
        return self.decoder(self.encoder(x).exp())


class Counting(nn.Module):
    """A recurrence of rectifiers, which keeps all that comes in."""

    def __init__(self, length=60):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(8, 32, nonlinearity="relu", batch_first=True)
        self.out = nn.Linear(32, 2)
        self.length = length

    def forward(self, x):
        return self.out(self.rnn(x[:, None, :8].expand(-1, self.length, -1))[0][:, -1])


def _history(losses):
    history = History()
    history.append(Row(len(losses) - 1, losses=np.array(losses)))
    return history


def _patient(net, x, losses=(math.nan,)):
    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    training = Training(net, [torch.optim.SGD(net.parameters(), lr=0.01)], _history(losses), rehearse)
    return Patient(training, OVERFLOWS, Held(training), has_past=False)


def _batch():
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def test_such_weights_are_drawn_anew_before_anything_else_is_tried():
    assert remedies_for(OVERFLOWS.kind, OVERFLOWS.cause)[0] == "reinit"
    assert remedies_for(OVERFLOWS.kind, OVERFLOWS.cause, has_learnt=True)[0] != "reinit"


@pytest.mark.parametrize("std", [6.0, 20.0])
def test_what_lies_behind_numbers_that_are_not_finite_is_drawn_as_well(std):
    net, x = Exponential(std), _batch()
    assert not net(x).isfinite().all()
    done = treat("reinit", _patient(net, x))
    linears = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    assert Counter(done.layers) == Counter(linears)
    assert float(net(x).detach().abs().max()) < 100


def test_a_recurrence_that_overflows_from_the_start_is_drawn_anew():
    net, x = Counting(), _batch()
    with torch.no_grad():
        for name, weight in net.rnn.named_parameters():
            if "weight" in name:
                weight.uniform_(0, 10)
    assert not net(x).isfinite().all()
    done = treat("reinit", _patient(net, x))
    assert "rnn" in done.layers
    assert float(net(x).detach().abs().max()) < 100


def test_one_that_came_to_overflow_after_some_steps_was_not_drawn_so():
    net, x = Counting(), _batch()
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(60)
    assert not net(x).isfinite().all()
    assert treat("reinit", _patient(net, x, losses=(0.7, 0.6, math.nan))) is None


@pytest.mark.parametrize("kind", [lambda: Exponential(1.0), Counting], ids=["exponential", "counting"])
@pytest.mark.parametrize("losses", [(math.nan,), (0.7, 0.6, math.nan)], ids=["from the start", "later"])
def test_usual_weights_are_left_alone_whatever_the_batch_holds(kind, losses):
    net, x = kind(), _batch()
    x[3] = math.inf
    before = copy.deepcopy(net.state_dict())
    assert not net(x).isfinite().all()
    assert treat("reinit", _patient(net, x, losses)) is None
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
