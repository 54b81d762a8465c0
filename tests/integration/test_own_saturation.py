"""Real trainings of networks that are written by hand: shut gates, lists of bare matrices, and a cell of gates."""

import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import flow

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")

WIDTH = 32
WORTH = (0, 0, 1, 1, -1, -1, 2, -2)


class Highway(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.inp = nn.Linear(8, WIDTH)
        self.h = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.t = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        for layer in self.t:
            nn.init.constant_(layer.bias, bias)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.inp(x)
        for h, t in zip(self.h, self.t, strict=True):
            gate = torch.sigmoid(t(x))
            x = gate * torch.relu(h(x)) + (1 - gate) * x
        return self.out(x)


class Lists(nn.Module):
    """A network from scratch."""

    def __init__(self, draw):
        super().__init__()
        sizes = [8, WIDTH, WIDTH, 2]
        self.w = nn.ParameterList([draw(a, b) for a, b in pairwise(sizes)])
        self.b = nn.ParameterList([torch.zeros(b) for b in sizes[1:]])

    def forward(self, x):
        for w, b in zip(self.w[:-1], self.b[:-1], strict=True):
            x = torch.sigmoid(x @ w + b)
        return x @ self.w[-1] + self.b[-1]


class Cell(nn.Module):
    """An LSTM whose gates are computed together."""

    def __init__(self, size):
        super().__init__()
        self.words = nn.Embedding(len(WORTH), WIDTH)
        self.w = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * size)
        self.u = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * size)
        self.b = nn.Parameter(torch.zeros(4 * WIDTH))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x):
        words = self.words(x)
        h = c = words.new_zeros(len(x), WIDTH)
        for now in words.unbind(1):
            i, f, g, o = (now @ self.w + h @ self.u + self.b).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


SICK = {
    "shut gates": (lambda: Highway(-20.0), {"net.t.0", "net.t.1", "net.t.2"}),
    "all positive": (lambda: Lists(lambda a, b: 4 * torch.rand(a, b)), {"net"}),
    "too large": (lambda: Lists(lambda a, b: 4 * torch.randn(a, b)), {"net"}),
}
HEALTHY = {
    "gates": lambda: Highway(-2.0),
    "gates that are all but shut": lambda: Highway(-6.0),
    "lists": lambda: Lists(lambda a, b: torch.randn(a, b) * 4 / math.sqrt(a)),
}


class Net(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _numbers():
    x = torch.rand(1024, 8) * 2
    return x, ((x[:, 0] - 1) * (x[:, 1] - 1) > 0).long()


def _words():
    x = torch.randint(len(WORTH), (1024, 16))
    return x, (torch.tensor(WORTH)[x].sum(1) > 0).long()


def _fit(make, mitigate, data=_numbers):
    L.seed_everything(0, verbose=False)
    model, watching = Net(make()), flow(every_n_steps=10, mitigate=mitigate)
    x, y = data()
    trainer = quiet_trainer(max_steps=400, max_epochs=-1, callbacks=[watching])
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    with torch.no_grad():
        return watching, (model.net(x).argmax(1) == y).double().mean().item()


def _told(watching):
    return [finding for finding in watching.findings if finding.severity.is_alarm]


@pytest.mark.parametrize("case", SICK)
def test_what_is_shut_is_found_and_cured(case):
    make, layers = SICK[case]
    watching, without = _fit(make, "off")
    first = _told(watching)[0]
    assert (str(first.kind), first.cause, {*first.layers}) == ("saturated_activation", "weight_scale", layers)
    cured, reached = _fit(make, "apply")
    # of a list the first matrix is drawn last: on its inputs it is not sick by far
    assert {action.kind for action in cured.actions} == {"reinit"}
    assert cured.actions[0].outcome == "kept"
    assert len(cured.actions) <= 2  # the first matrix is still far larger than usual, and told of once more
    assert reached > without + 0.1


@pytest.mark.parametrize("case", HEALTHY)
def test_what_is_open_is_not_touched(case):
    watching, without = _fit(HEALTHY[case], "off")
    assert _told(watching) == []
    treated, reached = _fit(HEALTHY[case], "apply")
    assert not treated.actions
    assert reached == without


def test_the_gates_of_a_cell_that_are_chaos_are_found_and_drawn_anew():
    watching, without = _fit(lambda: Cell(1.0), "off", _words)
    first = _told(watching)[0]
    assert (str(first.kind), first.cause, first.layers) == ("loss_plateau", "recurrence", ("net",))
    treated, reached = _fit(lambda: Cell(1.0), "apply", _words)
    assert [(action.kind, action.outcome) for action in treated.actions] == [("reinit", "kept")]
    assert reached > without + 0.05


def test_a_cell_that_is_well_is_not_touched():
    watching, without = _fit(lambda: Cell(WIDTH**-0.5), "apply", _words)
    assert _told(watching) == []
    assert not watching.actions
    assert without > 0.9
