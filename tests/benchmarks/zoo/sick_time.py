"""Recurrences whose gradient vanishes or explodes through time: what is to be learned stands at the start."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .fault import fault
from .faulty_data import features_then_blank, rows_then_blank
from .task import ADAM, Task


class Reader(nn.Module):
    """A recurrence of PyTorch's own over (B, T, inputs), classified from its last state."""

    def __init__(self, cell: str, *, inputs: int = 8, hidden: int = 32, classes: int = 10, **kwargs: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, cell)(inputs, hidden, batch_first=True, **kwargs)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the class."""
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


class CellLoop(nn.Module):
    """A recurrence written by hand: a linear layer called once per time step."""

    def __init__(self, activation: type[nn.Module], *, hidden: int = 32, inputs: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, hidden)
        self.again = nn.Linear(hidden, hidden)
        self.activation = activation()
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the class."""
        state = x.new_zeros(len(x), self.again.in_features)
        for now in x.unbind(1):
            state = self.activation(self.enter(now) + self.again(state))
        output: Tensor = self.head(state)
        return output


class CellModule(nn.Module):
    """``nn.LSTMCell`` or ``nn.GRUCell`` in a loop."""

    def __init__(self, *, hidden: int = 32) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the class."""
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for now in x.unbind(1):
            state = self.cell(now, state)
        output: Tensor = self.head(state)
        return output


@torch.no_grad()
def _carrying(net: nn.Module, gain: float = 1.0) -> nn.Module:
    """Start every recurrence as ``gain`` times an orthogonal map with zero bias, gates open to the past."""
    for name, weight in net.named_parameters():
        if name.endswith(("weight_hh_l0", "weight_hh", "again.weight")):
            size = weight.shape[1]
            for rows in weight.split(size):
                nn.init.orthogonal_(rows, gain=gain)
        elif "bias" in name and "head" not in name:
            nn.init.zeros_(weight)
            if len(weight) == 128 and "bias_ih" in name:  # LSTM: input, forget, cell, output
                weight[32:64] = 4.0
            if len(weight) == 96 and "bias_ih" in name:  # GRU: reset, update, new
                weight[32:64] = 4.0
    return net


FASTER = partial(Task, optimize=partial(ADAM, lr=3e-3))
STEEP = partial(Task, optimize=partial(torch.optim.SGD, lr=0.2, momentum=0.9))
LOOP = ("net.again", "net.enter", "net.activation")
RNN = ("net.rnn",)

_vanishing = partial(
    fault,
    family="recurrent_vanishing",
    data=partial(rows_then_blank, blank=32),
    kinds="vanishing_gradient",
    causes="recurrence",
    task=FASTER,
    max_steps=200,
)
_exploding = partial(
    fault,
    family="recurrent_exploding",
    data=partial(rows_then_blank, blank=32),
    kinds="exploding_gradient",
    causes="recurrence",
    task=FASTER,
    max_steps=200,
)

CASES = [
    _vanishing("rnn_tanh_40", sick=lambda: Reader("RNN"), twin=lambda: _carrying(Reader("RNN")), layers=RNN),
    _vanishing(
        "rnn_tanh_40_slow",
        sick=lambda: Reader("RNN", hidden=48),
        twin=lambda: _carrying(Reader("RNN", hidden=48)),
        task=partial(Task, optimize=ADAM),
        layers=RNN,
    ),
    _vanishing(
        "lstm_40",
        sick=lambda: Reader("LSTM"),
        twin=lambda: _carrying(Reader("LSTM")),
        layers=RNN,
        max_steps=400,
    ),
    _vanishing(
        "gru_40_sgd",
        sick=lambda: Reader("GRU"),
        twin=lambda: _carrying(Reader("GRU")),
        task=STEEP,
        layers=RNN,
        max_steps=300,
    ),
    _vanishing(
        "rnn_features_one_by_one",
        sick=lambda: Reader("RNN", inputs=1, classes=2),
        twin=lambda: _carrying(Reader("RNN", inputs=1, classes=2)),
        data=partial(features_then_blank, blank=20),
        task=Task,
        layers=RNN,
    ),
    _vanishing(
        "cell_loop_tanh", sick=lambda: CellLoop(nn.Tanh), twin=lambda: _carrying(CellLoop(nn.Tanh)), layers=LOOP
    ),
    _vanishing(
        "cell_loop_sigmoid", sick=lambda: CellLoop(nn.Sigmoid), twin=lambda: _carrying(CellLoop(nn.Tanh)), layers=LOOP
    ),
    _vanishing(
        "gru_cell_loop",
        sick=CellModule,
        twin=lambda: _carrying(CellModule()),
        task=STEEP,
        layers=("net.cell",),
        max_steps=300,
    ),
    _exploding(
        "rnn_relu_gain_2",
        sick=lambda: _carrying(Reader("RNN", nonlinearity="relu"), 2.0),
        twin=lambda: _carrying(Reader("RNN")),
        layers=RNN,
    ),
    _exploding(
        "rnn_tanh_gain_3",
        sick=lambda: _carrying(Reader("RNN"), 3.0),
        twin=lambda: _carrying(Reader("RNN")),
        layers=RNN,
    ),
    _exploding(
        "cell_loop_relu_gain_2",
        sick=lambda: _carrying(CellLoop(nn.ReLU), 2.0),
        twin=lambda: _carrying(CellLoop(nn.Tanh)),
        layers=LOOP,
    ),
    _exploding(
        "cell_loop_tanh_gain_4",
        sick=lambda: _carrying(CellLoop(nn.Tanh), 4.0),
        twin=lambda: _carrying(CellLoop(nn.Tanh)),
        layers=LOOP,
    ),
]
