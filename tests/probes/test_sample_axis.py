"""Which layers take the samples of a batch for time steps."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.sample_axis import SampleAxis, told
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

SAMPLES, STEPS, SIZE = 6, 5, 4
X = torch.ones(SAMPLES, STEPS, SIZE)
Y = torch.zeros(SAMPLES)
MIXED = {"steps_as_samples": float(STEPS)}
KINDS = [nn.RNN, nn.LSTM, nn.GRU]


class Net(nn.Module):
    """A layer, and what is done with it."""

    def __init__(self, layer, use=lambda layer, x: layer(x)):
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, x):
        return self.use(self.layer, x)


def mixed(model, *inputs, samples=SAMPLES, batch=None):
    """What is told of one sample, of so many batches."""
    axis, transfer = SampleAxis(), Transfer()
    probe = SignalProbe(LayerMap(model), transfer, on_sequence=axis.see)
    for x in inputs:
        axis.start_batch(samples, (x, Y) if batch is None else batch)
        probe.start_batch()
        model(x)
        probe.before_backward()
    axis.share(transfer)
    assert probe._error is None
    probe.drop()
    layers, scalars = told(transfer.fetch())
    assert scalars == ({"samples_as_steps": float(SAMPLES)} if layers else {})
    return layers


def attend(layer, x):
    return layer(x, x, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrence_that_is_fed_with_samples_first_is_told(kind):
    assert mixed(Net(kind(SIZE, 3)), X) == {"layer": MIXED}
    assert mixed(Net(kind(SIZE, 3, num_layers=2, bidirectional=True)), X) == {"layer": MIXED}


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_fed_in_its_own_order_is_not(kind):
    assert mixed(Net(kind(SIZE, 3, batch_first=True)), X) == {}
    assert mixed(Net(kind(SIZE, 3), lambda layer, x: layer(x.transpose(0, 1))), X) == {}
    assert mixed(Net(kind(SIZE, 3)), X.transpose(0, 1), batch=(X.transpose(0, 1), Y)) == {}


def test_one_that_puts_time_first_by_itself_is_not():
    class BatchFirst(nn.GRU):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))

    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            x = x.transpose(0, 1)
            return super().forward(x, x, x)

    assert mixed(Net(BatchFirst(SIZE, 3)), X) == {}
    assert mixed(Net(Attention(SIZE, 2)), X) == {}
    put = Net(nn.GRU(SIZE, 3))
    put.layer.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    assert mixed(put, X) == {}


def test_attention_is_told_in_the_wrong_order_alone():
    assert mixed(Net(nn.MultiheadAttention(SIZE, 2), attend), X) == {"layer": MIXED}
    assert mixed(Net(nn.MultiheadAttention(SIZE, 2, batch_first=True), attend), X) == {}
    assert mixed(Net(nn.MultiheadAttention(SIZE, 2), lambda layer, x: attend(layer, x.transpose(0, 1))), X) == {}


def test_attention_is_told_however_it_is_called():
    by_name = Net(nn.MultiheadAttention(SIZE, 2), lambda layer, x: layer(query=x, key=x, value=x))
    assert mixed(by_name, X) == {"layer": MIXED}
    of_two_sizes = nn.MultiheadAttention(SIZE, 2, kdim=3, vdim=3)
    assert mixed(Net(of_two_sizes, lambda layer, x: layer(x, x[..., :3], x[..., :3])), X) == {"layer": MIXED}


def test_all_attentions_of_a_transformer_are_told():
    layer = nn.TransformerEncoderLayer(SIZE, 2, 8)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert mixed(encoder, X) == {"layers.0.self_attn": MIXED, "layers.1.self_attn": MIXED}
    decoder = Net(nn.TransformerDecoderLayer(SIZE, 2, 8), lambda layer, x: layer(x, x))
    assert mixed(decoder, X) == {"layer.self_attn": MIXED, "layer.multihead_attn": MIXED}
    in_order = nn.TransformerEncoderLayer(SIZE, 2, 8, batch_first=True)
    assert mixed(nn.TransformerEncoder(in_order, 2, enable_nested_tensor=False), X) == {}


def test_as_many_steps_as_samples_tell_nothing():
    square = torch.ones(SAMPLES, SAMPLES, SIZE)
    assert mixed(Net(nn.LSTM(SIZE, 3)), square) == {}
    assert mixed(Net(nn.MultiheadAttention(SIZE, 2), attend), square) == {}


def test_a_single_step_tells_nothing():
    assert mixed(Net(nn.LSTM(SIZE, 3)), X[:, :1]) == {}


def test_a_batch_of_another_size_tells_nothing():
    assert mixed(Net(nn.LSTM(SIZE, 3)), X[:4]) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3)), X, samples=None) == {}


def test_packed_sequences_and_single_ones_tell_nothing():
    lengths = torch.full((SAMPLES,), STEPS)
    pack = Net(nn.LSTM(SIZE, 3), lambda layer, x: layer(pack_padded_sequence(x, lengths, batch_first=True)))
    assert mixed(pack, X) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3), lambda layer, x: layer(x[:, 0])), X) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3), lambda layer, x: layer(input=x)), X) == {}  # nothing is seen of it


def test_cells_and_loops_of_them_tell_nothing():
    def loop(cell, x):
        state = None
        for now in x.unbind(1):
            state = cell(now, state)
        return state

    assert mixed(Net(nn.GRUCell(SIZE, 3), loop), X) == {}


def test_what_does_not_train_tells_nothing():
    model = Net(nn.LSTM(SIZE, 3))
    model.layer.eval()
    assert mixed(model, X) == {}


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_one_call_in_the_right_order_is_enough(order):
    model = Net(nn.LSTM(SIZE, 3))
    inputs = [X if wrong else X.transpose(0, 1) for wrong in order]
    assert mixed(model, *inputs) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3), lambda layer, x: [layer(one) for one in inputs]), X) == {}


def test_of_several_calls_in_the_wrong_order_the_shortest_counts():
    assert mixed(Net(nn.LSTM(SIZE, 3)), X, X[:, :3]) == {"layer": {"steps_as_samples": 3.0}}


def test_a_multiple_of_the_batch_may_be_one_of_samples_unless_the_batch_has_it():
    views = torch.ones(SAMPLES, 2 * SAMPLES, SIZE)  # as many steps as samples, of two views of each
    images = torch.ones(SAMPLES, 3, 8, 8)
    model = Net(nn.LSTM(SIZE, 3))
    assert mixed(model, views, batch=(images, Y)) == {}
    found = {"layer": {"steps_as_samples": 2.0 * SAMPLES}}
    assert mixed(model, views, batch=(views, Y)) == found
    assert mixed(model, views, batch={"tokens": [torch.ones(SAMPLES, 2 * SAMPLES)], "name": "text"}) == found
    assert mixed(model, X, batch=(images, Y)) == {"layer": MIXED}


def test_what_the_batch_has_first_is_an_axis_of_samples():
    """A smaller batch, of sequences that are as long as a whole one has samples."""
    smaller, labels = torch.ones(STEPS, SAMPLES, SIZE), torch.zeros(STEPS)
    in_order = Net(nn.LSTM(SIZE, 3), lambda layer, x: layer(x.transpose(0, 1)))
    assert mixed(in_order, smaller, batch=(smaller, labels)) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3)), X, batch=(X, labels)) == {}
    assert mixed(Net(nn.LSTM(SIZE, 3)), X, batch=(X, Y, torch.tensor(1.0))) == {"layer": MIXED}


def test_what_any_rank_has_seen_counts_as_long_as_it_is_seen():
    sums = np.array([1.0, 64.0, 50.0])
    once = {("sample axis", "rnn"): sums, ("sample axis", "other"): 0 * sums, "else": sums}
    assert told(once) == ({"rnn": {"steps_as_samples": 50.0}}, {"samples_as_steps": 64.0})
    assert told({("sample axis", "rnn"): 2 * sums}) == told({("sample axis", "rnn"): sums})
    assert told({("sample axis", "rnn"): 0 * sums}) == ({}, {})


def test_the_next_sample_begins_anew():
    axis, transfer = SampleAxis(), Transfer()
    axis.start_batch(SAMPLES, (X, Y))
    axis.see("rnn", nn.LSTM(SIZE, 3), X)
    axis.clear()
    axis.share(transfer)
    assert transfer.fetch() == {}
