"""Inputs that a network cannot learn from as they come, and inputs that only look so, in real trainings."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow

STEPS = 240


def _data(shape):
    """Targets that follow from the inputs."""
    x = torch.randn(512, *shape, 4, generator=torch.Generator().manual_seed(0))
    last = x if not shape else x[:, -1] + x[:, -2]
    return x, torch.tanh(last @ torch.tensor([[1.5], [-1.0], [0.5], [1.0]]))


class Sequences(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(4, 24, batch_first=True), nn.Linear(24, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Table(nn.Module):
    """Embeddings beside numbers, or added to what a layer of their own makes of these."""

    def __init__(self, apart=False):
        super().__init__()
        self.lookup = nn.Embedding(7, 8)
        self.numbers = nn.Linear(4, 8) if apart else nn.Identity()
        self.rest = nn.Sequential(nn.Linear(8 if apart else 12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        found, numbers = self.lookup(torch.arange(len(x)) % 7), self.numbers(x)
        both = found + numbers if numbers.shape == found.shape else torch.cat([found, numbers], 1)
        return self.out(self.rest(both))


def _incomes(x):
    return x * torch.tensor([1.0, 2e4, 1.0, 5e3]) + torch.tensor([0.0, 5e4, 0.0, 0.0])


def _stack(*before):
    return nn.Sequential(*before, nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def _he():
    net = nn.Sequential(*(part for _ in range(4) for part in (nn.LazyLinear(64), nn.ReLU())), nn.LazyLinear(1))
    net(torch.zeros(1, 4))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return net


class Task(L.LightningModule):
    def __init__(self, net, optimize):
        super().__init__()
        self.net, self.optimize = net, optimize

    def training_step(self, batch, _):
        x, y = batch
        return mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return self.optimize(self.parameters())


def _adam(parameters):
    return torch.optim.Adam(parameters, lr=5e-3)


def _slowly(parameters):
    return torch.optim.Adam(parameters, lr=3e-4)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _train(tmp_path, make, change, optimize, mitigate=None):
    """The loss on all data after the training, and the callback."""
    torch.manual_seed(0)
    net = make()
    x, y = _data((6,) if isinstance(net, Sequences) else ())
    x = change(x)
    flow = GradFlow(every_n_steps=10, report=False, console=False, mitigate=mitigate) if mitigate else None
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[flow] if flow else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer.fit(Task(net, optimize), loader)
    with torch.no_grad():
        return mse_loss(net(x), y).item(), flow


SICK = {
    "tiny inputs of a stack": (_stack, lambda x: 1e-4 * x, _sgd, "loss_plateau", 50),
    "inputs far off 0": (_stack, lambda x: 0.01 * x + 4, _adam, "loss_plateau", 50),
    "tiny inputs of a recurrence": (lambda: Sequences(nn.GRU), lambda x: 1e-4 * x, _adam, "loss_plateau", 50),
    "a recurrence far off 0": (lambda: Sequences(nn.GRU), lambda x: 100 * x + 300, _adam, "saturated_activation", 2),
    "raw columns beside embeddings": (Table, _incomes, _adam, "exploding_gradient", 0),
    "raw columns behind an embedding": (lambda: Table(apart=True), _incomes, _adam, "exploding_gradient", 0),
    "outputs far beyond the targets": (_he, lambda x: 20 * x, _slowly, "loss_plateau", 50),
    "a recurrence of large inputs": (lambda: Sequences(nn.LSTM), lambda x: 500 * x, _adam, "saturated_activation", 2),
}


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize("name", SICK)
def test_inputs_that_nothing_is_learnt_from_are_found_and_scaled(name, tmp_path):
    make, change, optimize, kind, step = SICK[name]
    without, _ = _train(tmp_path, make, change, optimize)
    usual, _ = _train(tmp_path, make, lambda x: x, optimize)
    loss, flow = _train(tmp_path, make, change, optimize, "apply")
    alarms = [finding for finding in flow.findings if finding.severity.is_alarm]
    assert [(str(finding.kind), finding.cause, finding.step) for finding in alarms] == [(kind, "unscaled_inputs", step)]
    assert [(action.kind, action.outcome) for action in flow.actions] == [("scale_inputs", "kept")]
    assert alarms[0].suggestions[0].title.startswith("Scale the inputs")
    assert usual < 0.5 * without
    assert without - loss > 0.8 * (without - usual)


HEALTHY = {
    "inputs of a hundredth": (_stack, lambda x: 0.01 * x, _adam),
    "inputs between 0 and 1": (_stack, lambda x: torch.sigmoid(x), _adam),
    "tiny inputs behind a normalisation": (lambda: _stack(nn.BatchNorm1d(4, eps=1e-12)), lambda x: 1e-4 * x, _adam),
    "a normalisation of features": (lambda: _stack(nn.LayerNorm(4, eps=1e-12)), lambda x: 1e-4 * x, _adam),
    "a normalisation further back": (
        lambda: nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32, eps=1e-12), nn.ReLU(), nn.Linear(32, 1)),
        lambda x: 1e-4 * x,
        _adam,
    ),
    "columns beside embeddings": (Table, lambda x: 3 * x + 1, _adam),
    "a recurrence of inputs that are not small": (lambda: Sequences(nn.LSTM), lambda x: 8 * x, _adam),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_inputs_that_are_learnt_from_are_left_alone(name, tmp_path):
    make, change, optimize = HEALTHY[name]
    loss, flow = _train(tmp_path, make, change, optimize, "apply")
    assert not [finding for finding in flow.findings if finding.severity.is_alarm]
    assert flow.actions == ()
    assert _train(tmp_path, make, change, optimize)[0] == loss < 0.25


def test_weights_that_were_made_for_tiny_inputs_are_left_alone(tmp_path):
    def make():
        net = _stack()
        with torch.no_grad():
            net[0].weight *= 1e4
        return net

    # the first layer as it is, the others slowly: nothing is learnt, and the inputs are not to blame
    def slowly(parameters):
        first, *others = list(parameters)
        return torch.optim.SGD([{"params": [first], "lr": 1e-4}, {"params": others, "lr": 1e-4}])

    _, flow = _train(tmp_path, make, lambda x: 1e-4 * x, slowly, "suggest")
    assert "unscaled_inputs" not in [finding.cause for finding in flow.findings]
