"""Recurrences whose weights were drawn far too small or too large, with all that stands behind them."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
KINDS, STEPS = 6, 20


class Reads(L.LightningModule):
    """Says at the end which symbol came first."""

    def __init__(self, recurrence, draw, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = nn.Embedding(KINDS + 2, 16), recurrence(16, 48, batch_first=True)
        self.head = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, KINDS))
        self.optimizer = optimizer
        for parameter in (*self.rnn.parameters(), *self.head.parameters()):
            if parameter.dim() > 1:
                draw(parameter)

    def training_step(self, batch, i):
        (x,) = batch
        return nn.functional.cross_entropy(self.head(self.rnn(self.embed(x))[0][:, -1]), x[:, 0])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def fitted(net, mitigate):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(KINDS, KINDS + 2, (512, STEPS), generator=generator)
    x[:, 0] = torch.randint(KINDS, (512,), generator=generator)
    flow = GradFlow(mitigate=mitigate, report=False, console=False)
    trainer = quiet_trainer(max_steps=300, callbacks=[flow])
    trainer.fit(net, DataLoader(TensorDataset(x), 32))
    return flow


SICK = {
    "far too small": (nn.RNN, lambda p: nn.init.normal_(p, std=3e-3), lambda p: torch.optim.RMSprop(p, 5e-4)),
    "all positive": (nn.LSTM, nn.init.uniform_, lambda p: torch.optim.Adam(p, 4e-3)),
}


@pytest.mark.parametrize("how", SICK)
def test_it_remembers_what_came_first_once_all_of_it_is_drawn_anew(how):
    assert fitted(Reads(*SICK[how]), "off").history.losses[-1] > 1.0
    flow = fitted(Reads(*SICK[how]), "apply")
    first = flow.actions[0]
    assert (first.kind, str(first.outcome)) == ("reinit", "kept")
    assert {"rnn", "head.2"} <= {*first.layers}
    assert flow.history.losses[-1] < 0.1
