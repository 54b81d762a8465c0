"""What the observer takes for detached, in real forward passes; and what it leaves alone."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow.probes.detached import Detached
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.observer import ForwardObserver


class Two(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.trunk, self.head, self.words = nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(4, 4)
        self.between = between

    def forward(self, x):
        return self.head(self.between(self, x))


def _inputs(between):
    """Whether the input of each layer counted as detached."""
    model, found = Two(between), {}
    observer = ForwardObserver(
        LayerMap(model), lambda name, _: found.update({name: observer.input_is_detached}), lambda *_: None
    )
    observer.open()
    model(torch.rand(3, 4))
    observer.close()
    return found


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.trunk(x).detach(),
        lambda m, x: m.trunk(x).data,
        lambda m, x: F.relu(m.trunk(x).detach()) * 2,
        lambda m, x: m.trunk(x).detach().view(2, 6)[:, :].reshape(3, 4),
        lambda m, x: torch.cat([m.trunk(x)[:, :2].detach(), x[:, :2]], dim=1),
        lambda m, x: torch.from_numpy(m.trunk(x).detach().numpy()),
        lambda m, x: torch.tensor(m.trunk(x).detach().numpy() * 2),
        lambda m, x: m.trunk(x).max(dim=1).indices[:, None].float() * x,
    ],
)
def test_a_cut_on_the_way_from_the_trunk_to_the_head_is_seen(between):
    assert _inputs(between) == {"trunk": False, "head": True}


def test_a_cut_by_argmax_is_seen_where_the_graph_begins_anew():
    assert _inputs(lambda m, x: m.words(m.trunk(x).argmax(1))) == {"trunk": False, "words": True, "head": False}


def _extracted(m, x):
    with torch.no_grad():
        return m.trunk(x)


def _beside(m, x):
    m.trunk(x).detach()
    return x * 2


def _stop_gradient_in_part(m, x):
    hidden = m.trunk(x)
    return hidden + (x - hidden).detach()


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.trunk(x),
        _extracted,
        _beside,
        _stop_gradient_in_part,
        lambda m, x: m.trunk(x) * (m.trunk(x) > 0),
        lambda m, x: torch.from_numpy(x.numpy() * 2) + 0 * m.trunk(x).detach().sum().item(),
    ],
)
def test_what_is_not_cut_is_left_alone(between):
    assert not any(_inputs(between).values())


def test_nothing_is_kept_alive_and_freed_memory_is_forgotten():
    detached, weight = Detached(), torch.ones(8, requires_grad=True)
    hidden = 2 * weight
    features = hidden.clone().detach()
    detached.note(features, (hidden,))
    view = features[2:]
    assert detached.holds([view])
    assert detached.holds([[view, 3]])
    assert not detached.holds([view, hidden])
    place = features.untyped_storage().data_ptr()
    del features, view
    gc.collect()
    other = torch.ones(8)
    detached._by_memory[other.untyped_storage().data_ptr()] = detached._by_memory[place]
    assert not detached.holds([other])


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.empty(0),
        nn.UninitializedParameter(),
        np.ones(2),
        None,
    ],
)
def test_odd_things_are_passed_over(odd):
    detached, hidden = Detached(), torch.ones(2, requires_grad=True) * 2
    detached.note(hidden.detach(), (hidden,))
    detached.note(odd, (hidden, odd))
    assert not detached.holds([odd])
