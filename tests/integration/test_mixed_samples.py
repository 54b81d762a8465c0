"""Layers that run over the samples of a batch in the place of time, in real trainings."""

import logging

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow, GradNormLogger, MixedSamplesWarning
from tests.benchmarks.zoo import quiet_trainer

BATCH, STEPS, FEATURES = 32, 20, 6
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Recurrent(L.LightningModule):
    """Three classes of sequences, read by an LSTM."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, 24, batch_first=batch_first)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


class Transposed(Recurrent):
    """The same, with an LSTM that takes time first and gets it."""

    def __init__(self):
        super().__init__(batch_first=False)

    def forward(self, x):
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


class Attending(Recurrent):
    """The same, with a transformer."""

    def __init__(self, batch_first=True):
        super().__init__()
        del self.rnn
        self.embed = nn.Linear(FEATURES, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class TimeFirst(Recurrent):
    """Sequences that come with time first."""

    def __init__(self):
        super().__init__(batch_first=False)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def data(steps=STEPS, samples=20 * BATCH, shuffle=True, **kwargs):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(samples) % 3
    x = torch.randn(samples, steps, FEATURES, generator=generator) + torch.eye(3, FEATURES)[y][:, None]
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=shuffle, **kwargs)


def fit(make, loader=None, flow=None, steps=81, **kwargs):
    L.seed_everything(0, verbose=False)
    module = make()
    callbacks = [flow] if flow is not None else []
    quiet_trainer(**{"max_steps": steps, "callbacks": callbacks, **kwargs}).fit(module, loader or data())
    return module


def watcher(every_n_steps=10):
    return GradFlow(every_n_steps=every_n_steps, report=False, console=False, mitigate="apply")


def alarms(flow):
    return [(f.step, str(f.kind), f.cause, f.layers, dict(f.evidence)) for f in flow.findings if f.severity.is_alarm]


SICK = {
    "lstm": (lambda: Recurrent(batch_first=False), ("rnn",)),
    "transformer": (
        lambda: Attending(batch_first=False),
        ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"),
    ),
}


@pytest.mark.parametrize(("make", "layers"), SICK.values(), ids=SICK)
def test_it_is_told_at_once_and_nothing_is_done(make, layers):
    flow = watcher()
    with pytest.warns(MixedSamplesWarning, match="its 32 samples are taken for time steps, and the 20 time steps"):
        fit(make, flow=flow)
    found = (0, "mixed_samples", "batch_first", layers, {"batch_size": 32.0, "time_steps": 20.0})
    assert alarms(flow) == [found]
    assert flow.findings[0].is_open
    assert flow.actions == ()


@pytest.mark.parametrize("make", [Recurrent, Transposed, Attending])
def test_a_run_in_the_right_order_is_left_in_peace_to_the_bit(make):
    flow = watcher()
    watched, alone = fit(make, flow=flow), fit(make)
    assert alarms(flow) == []
    assert flow.actions == ()
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize(("make", "layers"), SICK.values(), ids=SICK)
def test_the_code_that_is_suggested_cures_the_next_run(make, layers):
    flow = watcher()
    fit(make, flow=flow, steps=3)

    def mended():
        module = make()
        exec(flow.findings[0].suggestions[0].code, {"self": module})
        return module

    again = watcher()
    fit(mended, flow=again)
    assert alarms(again) == []
    assert again.history.losses[-10:].mean() < 0.3 < flow.history.losses[0]


def test_nothing_is_said_of_samples_in_order():
    flow = watcher()
    fit(SICK["lstm"][0], data(shuffle=False), flow)
    assert not any(f.kind == "mixed_samples" for f in flow.findings)


def _time_first(samples):
    x, y = zip(*samples, strict=True)
    return torch.stack(x, dim=1), torch.stack(y)


def _time_first_alone(samples):
    return [torch.stack([x for x, _ in samples], dim=1)]


class Alone(TimeFirst):
    """The same without labels: the first features are to be told from the rest."""

    def training_step(self, batch, _):
        (x,) = batch
        return F.mse_loss(self(x), x.mean(0)[:, :3])


@pytest.mark.parametrize(
    ("make", "collate"),
    [(Transposed, None), (TimeFirst, _time_first), (Alone, _time_first_alone)],
    ids=["transposed in the model", "transposed in the loader", "without labels"],
)
def test_sequences_as_long_as_a_batch_and_a_smaller_batch_at_the_end_are_no_sign(make, collate):
    flow = watcher(1)
    fit(make, data(steps=BATCH, samples=2 * BATCH + 7, collate_fn=collate), flow, steps=9)
    assert flow.history.steps.tolist() == list(range(9))
    assert not any(f.kind == "mixed_samples" for f in flow.findings)


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_it_lasts_through_rows_of_gradients_alone_and_smaller_batches():
    flow = GradFlow(gradients=GradNormLogger(1, signal_every_n_steps=4), report=False, console=False)
    fit(SICK["lstm"][0], data(samples=4 * BATCH + 7), flow, steps=40)
    (finding,) = [f for f in flow.findings if f.kind == "mixed_samples"]
    assert (finding.step, finding.is_open) == (0, True)
    whole = [row for row in flow.history.rows if not row.gradients_only]
    assert any("samples_as_steps" not in row.scalars for row in whole)  # of a smaller batch nothing is said


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_it_is_told_of_accumulated_batches_and_of_several_loaders():
    flow = watcher()
    fit(SICK["lstm"][0], flow=flow, steps=3, accumulate_grad_batches=2)
    assert [f.cause for f in flow.findings] == ["batch_first"]

    class First(Recurrent):
        def __init__(self):
            super().__init__(batch_first=False)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    flow = watcher()
    fit(First, {"a": data(), "b": data()}, flow, steps=3)
    assert [f.cause for f in flow.findings] == ["batch_first"]
