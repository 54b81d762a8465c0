"""Vanishing and exploding through time in real trainings, and that to watch them changes nothing."""

import logging
import warnings
from functools import cache

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradNormLogger
from tests.benchmarks.zoo import quiet_trainer


@cache
def _digits(blank_before, blank_behind):
    """Images of digits, row by row, with empty rows before and behind them."""
    x, y = load_digits(return_X_y=True)
    x = F.pad(torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) / 16, (0, 0, blank_before, blank_behind))
    return TensorDataset(x, torch.tensor(y))


class Reader(L.LightningModule):
    """Classifies a sequence from the last output of a recurrence."""

    def __init__(self, rnn, packed=False, sgd=False):
        super().__init__()
        self.rnn, self.packed, self.sgd = rnn, packed, sgd
        self.head = nn.Linear(rnn.hidden_size, 10)

    def training_step(self, batch):
        x, y = batch
        if self.packed:
            lengths = torch.arange(len(x)) % 5 + 8
            state = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
            state = (state[0] if isinstance(state, tuple) else state)[-1]
        else:
            state = self.rnn(x)[0][:, -1]
        return F.cross_entropy(self.head(state), y)

    def configure_optimizers(self):
        if self.sgd:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return torch.optim.Adam(self.parameters(), 3e-3)


class Loop(Reader):
    """The same with a cell that is written by hand."""

    def __init__(self, hidden=32):
        super().__init__(nn.LSTM(1, hidden))
        del self.rnn
        self.ih, self.hh = nn.Linear(8, hidden), nn.Linear(hidden, hidden)

    def training_step(self, batch):
        x, y = batch
        state = x.new_zeros(len(x), self.hh.in_features)
        for now in x.unbind(1):
            state = torch.sigmoid(self.ih(now) + self.hh(state))
        return F.cross_entropy(self.head(state), y)


def _fit(make, *, blank=(0, 0), steps=101, watched=True, every=50):
    L.seed_everything(0, verbose=False)
    module = make()
    watcher = GradNormLogger(every)
    data = DataLoader(_digits(*blank), batch_size=32, shuffle=True, drop_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        quiet_trainer(max_steps=steps, callbacks=[watcher] if watched else []).fit(module, data)
    return watcher, module


def _recurrent(watcher):
    return [f for f in watcher.findings if f.cause == "recurrence"]


def _closed(rnn, block, value):
    """A gate closed: its input bias far below zero."""
    rnn.bias_ih_l0.data[block * rnn.hidden_size : (block + 1) * rnn.hidden_size] = value
    return rnn


def _stretched(rnn, gain):
    nn.init.orthogonal_(rnn.weight_hh_l0, gain)
    return rnn


SICK = {
    "rnn": lambda: Reader(nn.RNN(8, 32, batch_first=True)),
    "lstm_under_sgd": lambda: Reader(nn.LSTM(8, 32, batch_first=True), sgd=True),
    "lstm_that_forgets": lambda: Reader(_closed(nn.LSTM(8, 32, batch_first=True), 1, -4.0)),
    "gru_that_forgets": lambda: Reader(_closed(nn.GRU(8, 32, batch_first=True), 1, -5.0)),
    "two_layers": lambda: Reader(nn.RNN(8, 32, num_layers=2, batch_first=True)),
    "cell_loop": Loop,
}


@pytest.mark.parametrize("name", SICK)
def test_what_has_to_be_remembered_for_forty_steps_is_lost(name):
    watcher, _ = _fit(SICK[name], blank=(0, 40))
    alarm = next(f for f in _recurrent(watcher) if f.severity.is_alarm)
    assert alarm.kind == "vanishing_gradient"
    assert set(alarm.layers) == ({"ih", "hh"} if name == "cell_loop" else {"rnn"})
    assert alarm.evidence["time_steps"] == 48
    assert "through time" in alarm.message


HEALTHY = {
    "rows": (SICK["rnn"], (0, 0)),
    "what_counts_stands_at_the_end": (SICK["rnn"], (40, 0)),
    "the_same_with_sgd": (SICK["lstm_under_sgd"], (40, 0)),
    "orthogonal": (lambda: Reader(_stretched(nn.RNN(8, 32, batch_first=True), 1.0)), (0, 40)),
    "a_gate_that_keeps": (lambda: Reader(_closed(nn.LSTM(8, 32, batch_first=True), 1, 4.0)), (0, 40)),
    "packed": (lambda: Reader(nn.LSTM(8, 32, batch_first=True), packed=True), (0, 8)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_recurrence_raises_no_alarm(name):
    make, blank = HEALTHY[name]
    watcher, _ = _fit(make, blank=blank, steps=151)
    assert [f for f in _recurrent(watcher) if f.severity.is_alarm] == []


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_recurrence_that_explodes_is_found_at_the_first_step(nonlinearity):
    make = lambda: Reader(_stretched(nn.RNN(8, 32, nonlinearity=nonlinearity, batch_first=True), 4.0), sgd=True)  # noqa: E731
    watcher, _ = _fit(make, blank=(0, 20), steps=2)
    alarm = next(f for f in _recurrent(watcher) if f.severity.is_alarm)
    assert (alarm.kind, alarm.step, alarm.layers) == ("exploding_gradient", 0, ("rnn",))


def test_a_default_lstm_that_heals_is_told_and_resolved():
    watcher, _ = _fit(lambda: Reader(nn.LSTM(8, 32, batch_first=True)), blank=(16, 0), steps=251)
    first = _recurrent(watcher)[0]
    assert (str(first.severity), first.step) == ("info", 0)
    assert all(f.resolved_step is not None and not f.severity.is_alarm for f in _recurrent(watcher))


def _normed():
    rnn = nn.RNN(8, 16, batch_first=True)
    parametrizations.spectral_norm(rnn, "weight_hh_l0")  # each forward pass moves its vectors on
    return Reader(rnn)


EXACT = {
    "dropout": lambda: Reader(nn.LSTM(8, 16, num_layers=2, dropout=0.5, batch_first=True)),
    "sgd": lambda: Reader(nn.GRU(8, 16, batch_first=True), sgd=True),
    "packed": lambda: Reader(nn.RNN(8, 16, batch_first=True), packed=True),
    "bidirectional": lambda: Reader(nn.LSTM(8, 16, batch_first=True, bidirectional=True, proj_size=8)),
}


@pytest.mark.parametrize("name", EXACT)
def test_to_watch_it_changes_nothing(name):
    blank = (0, 8)
    watcher, watched = _fit(EXACT[name], blank=blank, steps=20, every=1)
    random = torch.get_rng_state()
    _, alone = _fit(EXACT[name], blank=blank, steps=20, watched=False)
    assert watcher.history.calls("rnn").shape[1] >= 8
    assert torch.equal(random, torch.get_rng_state())
    for mine, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(parameter._backward_hooks for parameter in watched.parameters())


def test_a_recurrence_whose_weights_have_a_state_of_their_own_is_not_run_again():
    watcher, watched = _fit(_normed, blank=(0, 8), steps=5, every=1)
    _, alone = _fit(_normed, blank=(0, 8), steps=5, watched=False)
    mine, theirs = watched.state_dict(), alone.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert watcher.history.calls("rnn").shape[1] == 0
