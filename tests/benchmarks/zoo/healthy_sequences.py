"""Networks on sequences that learn: recurrent ones whose first gradients reach back a few steps, attention, gates."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, seeded
from .data import CHARACTERS, SOURCES, WORDS, bags_of_words, characters, digits, source_code
from .task import ADAM, Task, sequence_loss

FASTER = partial(ADAM, lr=3e-3)
FASTEST = partial(ADAM, lr=1e-2)


class PixelLSTM(nn.Module):
    """Reads a digit pixel by pixel; at first almost no gradient reaches the first of the 64 steps."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x[..., None])[0][:, -1])
        return output


class CharacterModel(nn.Module):
    """Embedding, a fused recurrence and logits at every position."""

    def __init__(self, cell: type[nn.RNN] | type[nn.LSTM] | type[nn.GRU], layers: int = 1, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 24)
        self.rnn = cell(24, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(self.embed(tokens))[0])
        return output


class LoopedCell(nn.Module):
    """A GRU written by hand, called once per row of a digit."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(8 + hidden, 2 * hidden)
        self.candidate = nn.Linear(8 + hidden, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.hidden)
        for row in x.view(-1, 8, 8).unbind(1):
            update, reset = torch.sigmoid(self.gates(torch.cat([row, state], 1))).chunk(2, 1)
            proposed = torch.tanh(self.candidate(torch.cat([row, reset * state], 1)))
            state = update * state + (1 - update) * proposed
        output: Tensor = self.head(state)
        return output


class IdentityRNN(nn.Module):
    """ReLU cells whose recurrent weight starts as the identity (Le et al. 2015)."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, hidden, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(hidden, 10)
        nn.init.eye_(self.rnn.weight_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])
        return output


class BidirectionalTagger(nn.Module):
    """A bidirectional LSTM over padded words, with a maximum over the words that are there."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.rnn = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(SOURCES))

    def forward(self, words: Tensor) -> Tensor:
        lengths = (words > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=True, padding_value=-1.0, total_length=words.shape[1]
        )
        output: Tensor = self.head(states.amax(1))
        return output


class AttentiveReader(nn.Module):
    """A GRU whose states are averaged with weights of their own (Bahdanau et al. 2015); padding gets none."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.head = nn.Linear(width, len(SOURCES))

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(words))
        scores = self.score(states).squeeze(2).masked_fill(words == 0, -torch.inf)
        output: Tensor = self.head((torch.softmax(scores, 1)[..., None] * states).sum(1))
        return output


class GatedConvolutions(nn.Module):
    """Dilated causal convolutions with ``tanh * sigmoid`` units and a residual stream (van den Oord et al. 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.filters = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**index) for index in range(4))
        self.mixers = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(4))
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mT
        for index, (convolve, mix) in enumerate(zip(self.filters, self.mixers, strict=True)):
            content, gate = convolve(F.pad(x, (2**index, 0))).chunk(2, 1)
            x = x + mix(torch.tanh(content) * torch.sigmoid(gate))
        output: Tensor = self.head(x.mT)
        return output


class MaskedTransformer(nn.Module):
    """PyTorch's encoder, normalising first, over padded words, with the padding masked."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(SOURCES))

    def forward(self, words: Tensor) -> Tensor:
        there = (words > 0)[..., None]
        states = self.encoder(self.embed(words), src_key_padding_mask=words == 0)
        output: Tensor = self.head((states * there).sum(1) / there.sum(1))
        return output


_TEXT = partial(characters, batch_size=8)
_WORDS = partial(bags_of_words, batch_size=32)

CASES = [
    Case("lstm_64_pixels", seeded(lambda: Task(PixelLSTM(), FASTEST)), digits, 250, family="recurrent_images"),
    Case("identity_rnn", seeded(lambda: Task(IdentityRNN())), digits, 150, family="recurrent_images"),
    Case("gru_cell_by_hand", seeded(lambda: Task(LoopedCell(), FASTER)), digits, 150, family="recurrent_images"),
    Case(
        "characters_rnn",
        seeded(lambda: Task(CharacterModel(nn.RNN), FASTER, loss=sequence_loss)),
        _TEXT,
        150,
        family="recurrent_text",
    ),
    Case(
        "characters_gru_clipped",
        seeded(lambda: Task(CharacterModel(nn.GRU), FASTER, loss=sequence_loss)),
        source_code,
        150,
        trainer_kwargs={"gradient_clip_val": 0.25},
        family="recurrent_text",
    ),
    Case(
        "characters_lstm_2_layers",
        seeded(lambda: Task(CharacterModel(nn.LSTM, 2), FASTEST, loss=sequence_loss)),
        _TEXT,
        200,
        family="recurrent_text",
    ),
    Case("lstm_both_ways", seeded(lambda: Task(BidirectionalTagger(), FASTEST)), _WORDS, 150, family="padded_words"),
    Case("gru_attention", seeded(lambda: Task(AttentiveReader(), FASTEST)), _WORDS, 150, family="padded_words"),
    Case("transformer_masked", seeded(lambda: Task(MaskedTransformer(), FASTER)), _WORDS, 150, family="padded_words"),
    Case(
        "gated_convolutions",
        seeded(lambda: Task(GatedConvolutions(), FASTER, loss=sequence_loss)),
        source_code,
        150,
        family="gates",
    ),
]
