"""Which layers stand behind a dropout that is at work."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.probes.dropout import DROPOUTS, drops, drops_inside
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

X = torch.ones(4, 4)
SPATIAL = torch.ones(2, 4, 4)


class Net(nn.Module):
    def __init__(self, between, train=True):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 1), between
        self.train(train)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def dropped_at(model, times=1):
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    for _ in range(times):
        probe.start_batch()
        loss = model(X).sum()
        probe.before_backward()
        loss.backward()
        probe.after_backward()
        probe.finish()
        found = probe.collect(transfer.fetch()).dropped_at
    return found


def _attention(x):
    q = x[None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2)[0]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (nn.Dropout(0.1), "last"),
        (lambda x: F.dropout(x, 0.1), "last"),
        (lambda x: torch.dropout(x, 0.1, True), "last"),
        (_attention, "last"),
        (nn.AlphaDropout(0.1), "last"),
        (nn.Dropout(0.0), None),
        (lambda x: F.dropout(x, 0.1, training=False), None),
        (torch.tanh, None),
    ],
)
def test_the_layer_behind_a_dropout_is_named(between, expected):
    assert dropped_at(Net(between)) == expected


def test_in_evaluation_nothing_is_dropped():
    assert dropped_at(Net(nn.Dropout(0.1), train=False)) is None


@pytest.mark.parametrize(("p", "expected"), [(0.1, "between"), (0.0, None)])
def test_attention_of_torch_is_the_first_layer_that_its_dropout_has_a_part_in(p, expected):
    class Attending(Net):
        def forward(self, x):
            h = self.first(x)[None]
            return self.last(self.between(h, h, h)[0])

    assert dropped_at(Attending(nn.MultiheadAttention(4, 2, dropout=p))) == expected


@pytest.mark.parametrize(("p", "layers", "expected"), [(0.1, 2, "between"), (0.1, 1, None), (0.0, 2, None)])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_a_recurrence_drops_between_its_layers(p, layers, expected):
    class Recurrent(Net):
        def forward(self, x):
            return self.last(self.between(self.first(x))[0])

    assert dropped_at(Recurrent(nn.GRU(4, 4, layers, dropout=p))) == expected


def test_what_is_dropped_in_one_sample_says_nothing_of_the_next():
    class Once(Net):
        def forward(self, x):
            h = self.between(self.first(x))
            self.between.eval()
            return self.last(h)

    assert dropped_at(Once(nn.Dropout(0.1)), times=2) is None


@pytest.mark.parametrize("function", [F.dropout1d, F.dropout2d, F.dropout3d, F.dropout])
def test_the_usual_share_is_a_half_in_training(function):
    assert function in DROPOUTS
    assert drops(function, (SPATIAL,), {})
    assert not drops(function, (SPATIAL,), {"training": False})
    assert not drops(function, (SPATIAL, 0.0), {})


def test_others_drop_only_where_they_are_told_to():
    assert not drops(F.alpha_dropout, (X,), {})
    assert drops(F.alpha_dropout, (X,), {"training": True})
    assert not drops(F.scaled_dot_product_attention, (X, X, X), {})
    assert drops(F.scaled_dot_product_attention, (X, X, X, None, 0.1), {})
    assert not drops_inside(nn.Linear(2, 2))
