"""Parameters that no optimizer holds."""

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.unheld import Unheld, find_unregistered


def net():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    return model


def found(model, held):
    return Unheld(model, LayerMap(model)).measure(held)


def test_what_is_held_frozen_or_without_a_gradient_is_left_out():
    model = net()
    assert found(model, model.parameters()) == {}
    assert found(model, [model[0].weight]) == {"0": 3, "1": 4}
    model[0].requires_grad_(False)
    model[1].bias.grad = None
    assert found(model, []) == {"1": 3}


@pytest.mark.parametrize(
    "pack", [list, tuple, lambda made: {"a": made[0], "b": made[1]}, lambda made: [[made[0]], made[1:]]]
)
def test_layers_in_a_container_of_pythons_are_found_by_the_name_of_the_container(pack):
    model, hidden = net(), [nn.Linear(2, 2), nn.Linear(2, 2)]
    model[1].hidden = pack(hidden)
    assert found(model, model.parameters()) == {}  # they have no gradient
    hidden[1](torch.ones(1, 2)).sum().backward()
    assert found(model, model.parameters()) == {"1.hidden": 6}
    assert found(model, [*model.parameters(), *hidden[1].parameters()]) == {}


def test_a_list_of_layers_that_are_registered_too_is_nothing():
    model = net()
    model.all_of_them = list(model)
    assert find_unregistered(model) == {}


def test_a_tensor_that_is_no_parameter_is_found():
    model = net()
    model.scale = torch.ones(3, requires_grad=True)
    model.kept = model.scale * 2  # no leaf
    model.scale.sum().backward()
    assert found(model, model.parameters()) == {"scale": 3}


def test_what_changes_from_sample_to_sample_is_trained_by_something_else():
    model = net()
    unheld = Unheld(model, LayerMap(model))
    assert unheld.measure([]) == {"0": 9, "1": 4}
    with torch.no_grad():
        model[0].weight += 1
        model[0].bias += 1
    assert unheld.measure([]) == {"1": 4}
    assert unheld.measure([]) == {"0": 9, "1": 4}


class Strange(list):
    def __iter__(self):
        raise RuntimeError


def test_what_cannot_be_looked_into_is_passed_over():
    model = net()
    model.strange, model.data = Strange([1]), list(range(10**6))
    assert find_unregistered(model) == {}
