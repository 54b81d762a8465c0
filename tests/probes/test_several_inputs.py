"""Of several inputs the one to look at is measured."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

IMAGE = 0.5 * torch.ones(6, 4)


class Two(nn.Module):
    """An image, and a table beside it."""

    def __init__(self):
        super().__init__()
        self.image, self.table, self.head = nn.Linear(4, 3), nn.Linear(2, 3), nn.Linear(6, 1)

    def forward(self, image, table):
        return self.head(torch.cat([self.image(image), self.table(table)], 1))


def table(size):
    return torch.tensor([[1.0, size]] * 6)


class Sampled:
    def __init__(self, model):
        self.model, self.transfer = model, Transfer()
        self.probe = SignalProbe(LayerMap(model), self.transfer)

    def batch(self, *inputs, counts=True):
        self.probe.start_batch()
        loss = self.model(*inputs).sum()
        if not counts:
            self.probe.forget_batch()
            return
        self.probe.before_backward()
        loss.backward()
        self.probe.after_backward()

    def end(self):
        self.probe.finish()
        return self.probe.collect(self.transfer.fetch())

    def step(self, *inputs):
        self.batch(*inputs)
        return self.end()


@pytest.mark.parametrize(("size", "layer"), [(2e4, "table"), (15.0, "table"), (13.0, "image"), (0.5, "image")])
def test_a_large_input_is_looked_at_wherever_it_goes_in(size, layer):
    found = Sampled(Two()).step(IMAGE, table(size))
    assert found.input_layer == layer
    np.testing.assert_allclose(found.input_rms, [0.5] * 4 if layer == "image" else [1.0, size], rtol=1e-6)


def test_where_the_first_is_large_itself_it_is_looked_at():
    found = Sampled(Two()).step(100 * IMAGE, table(2e4))
    assert found.input_layer == "image"


@pytest.mark.parametrize(("first", "layer"), [(1.0, "image"), (2e4, "table")])
def test_it_is_the_same_one_in_the_whole_run(first, layer):
    sampled = Sampled(Two())
    sampled.step(IMAGE, table(first))
    found = sampled.step(IMAGE, table(2e4 if first == 1.0 else 1.0))
    assert found.input_layer == layer
    resumed = Sampled(sampled.model)
    resumed.probe.load_state_dict(sampled.probe.state_dict())
    assert resumed.step(IMAGE, table(2e4 if first == 1.0 else 1.0)).input_layer == layer


def test_batches_add_up_and_one_without_a_part_leaves_nothing():
    sampled = Sampled(Two())
    sampled.batch(IMAGE, table(3000.0))
    sampled.batch(IMAGE, table(4000.0))
    sampled.batch(IMAGE, table(1e9), counts=False)
    np.testing.assert_allclose(sampled.end().input_rms, [1.0, np.sqrt(12.5e6)], rtol=1e-6)


def test_of_several_calls_the_first_of_a_batch_counts():
    class Twice(Two):
        def forward(self, image, table):
            return super().forward(image, table) + super().forward(image, 100 * table)

    np.testing.assert_allclose(Sampled(Twice()).step(IMAGE, table(2e4)).input_rms, [1.0, 2e4])


def _frozen_body(model):
    model.image.requires_grad_(requires_grad=False)
    return lambda image, table: model.head(torch.cat([model.image(1e6 * image)] * 2, 1)) + 0 * model.table(table).sum()


def _detached(model):
    return lambda image, table: model.head(torch.cat([(1e6 * model.image(image)).detach()] * 2, 1)) + 0 * table.sum()


def _without_graph(model):
    def forward(image, table):
        h = model.image(image)
        with torch.no_grad():
            model.table(table)
        return model.head(torch.cat([h] * 2, 1))

    return forward


def _made_by_others(model):
    return lambda image, table: model.head(torch.cat([1e6 * model.image(image)] * 2, 1)) + 0 * table.sum()


@pytest.mark.parametrize("change", [_frozen_body, _detached, _without_graph, _made_by_others])
def test_what_is_no_input_is_not_taken_for_one(change):
    model = Two()
    model.forward = change(model)
    assert Sampled(model).step(IMAGE, table(2e4)).input_layer == "image"
