"""Which modules are layers, and whose parameters are whose."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradflow.probes.layers import ROOT, LayerMap


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(1, 1)


def test_layers_are_the_modules_that_own_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.LayerNorm(2), nn.Dropout()))
    assert LayerMap(model).names == ("0", "2.0")


def test_a_tied_weight_belongs_to_the_module_that_registered_it_first():
    model = Tied()
    layers = LayerMap(model)
    assert layers.owner(model.head.weight) == "embed"
    assert layers.owner(model.head.bias) == "head"


def test_a_module_that_owns_nothing_of_its_own_is_no_layer():
    model = Tied()
    model.head.bias = None
    assert LayerMap(model).names == ("embed",)


def test_a_module_used_under_two_names_is_one_layer():
    block = nn.Linear(2, 2)
    assert LayerMap(nn.ModuleDict({"a": block, "b": block})).names == ("a",)


def test_parameters_of_the_model_itself_belong_to_the_root():
    model = Bare()
    assert LayerMap(model).owner(model.scale) == ROOT


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_layer_is_one_layer_under_its_own_name(make):
    assert LayerMap(nn.Sequential(make(nn.Linear(3, 3)), nn.Tanh())).names == ("0",)


def test_a_parametrized_model_itself_is_the_root():
    assert LayerMap(parametrizations.weight_norm(nn.Linear(3, 3))).names == (ROOT,)


def test_a_name_that_only_begins_like_a_parametrization_is_kept():
    assert LayerMap(nn.ModuleDict({"parametrizations_of_mine": nn.Linear(1, 1)})).names == ("parametrizations_of_mine",)


def test_a_parameter_list_is_a_layer():
    model = nn.ModuleDict({"ws": nn.ParameterList([torch.ones(2), torch.ones(3)])})
    assert LayerMap(model).names == ("ws",)


def test_a_stranger_has_neither_name_nor_owner():
    layers = LayerMap(nn.Linear(1, 1))
    assert layers.name_of(nn.Linear(1, 1)) is None
    assert layers.owner(nn.Parameter(torch.ones(1))) is None


def test_only_leaves_without_parameters_can_be_activations():
    layers = LayerMap(nn.Sequential(nn.Linear(1, 1), nn.PReLU(), nn.Tanh()))
    assert [layers.is_activation(name) for name in (ROOT, "0", "1", "2")] == [False, False, False, True]


def test_a_model_is_covered_by_its_own_map():
    model = Tied()
    assert LayerMap(model).covers(model)


def _adds_a_layer(model):
    model.append(nn.Linear(1, 1))


def _adds_a_module_without_parameters(model):
    model.append(nn.ReLU())


def _adds_a_parameter(model):
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))


def _adds_a_bias(model):
    model[0].bias = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("change", [_adds_a_layer, _adds_a_module_without_parameters, _adds_a_parameter, _adds_a_bias])
def test_what_came_later_is_not_covered(change):
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    layers = LayerMap(model)
    change(model)
    assert not layers.covers(model)


def test_a_parameter_that_was_exchanged_is_covered():
    model = nn.Sequential(nn.Linear(1, 1))
    layers = LayerMap(model)
    model[0].weight = nn.Parameter(torch.ones(1, 1))
    assert layers.covers(model)


def test_the_owner_of_a_parameter_that_was_exchanged_is_found_by_another_look():
    model = nn.Sequential(nn.Linear(1, 1))
    layers = LayerMap(model)
    model[0].weight = nn.Parameter(torch.ones(1, 1))
    before = layers.owner(model[0].weight)
    layers.find_owners(model)
    assert (before, layers.owner(model[0].weight)) == (None, "0")


def test_a_parameter_that_is_gone_is_a_stranger_after_another_look():
    model = nn.Sequential(nn.Linear(1, 1))
    layers, old = LayerMap(model), model[0].weight
    model[0].weight = nn.Parameter(torch.ones(1, 1))
    layers.find_owners(model)
    assert layers.owner(old) is None


def test_plain_parameters_are_spread_over_no_ranks():
    assert LayerMap(Tied()).spread == ()


def test_a_lazy_layer_keeps_its_name_when_it_gets_its_weights():
    model = nn.Sequential(nn.LazyLinear(2))
    layers = LayerMap(model)
    model(torch.ones(1, 3))
    assert layers.owner(model[0].weight) == "0"


def test_a_layer_that_never_ran_stands_behind_the_one_registered_before_it():
    layers = LayerMap(nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))))
    assert layers.in_order(["3", "0"]) == ["3", "0", "1", "2"]


def test_a_first_layer_that_never_ran_stands_first():
    layers = LayerMap(nn.Sequential(*(nn.Linear(1, 1) for _ in range(3))))
    assert layers.in_order(["2", "1"]) == ["0", "2", "1"]


class Own(nn.Module):
    def __init__(self, *others, scale=False):
        super().__init__()
        self.w = nn.ParameterList([torch.ones(2, 2), torch.ones(2, 2)])
        self.b = nn.ParameterList([torch.ones(2)])
        self.others = nn.ModuleList(others)
        if scale:
            self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "runs"),
    [
        (Own, "own.w"),
        (lambda: Own(nn.Tanh()), "own.w"),
        (lambda: Own(scale=True), "own"),
        (lambda: Own(nn.Linear(2, 2)), None),  # what it gives may be what the other layer gives
        (lambda: nn.Sequential(nn.Tanh()), None),
    ],
)
def test_what_a_module_of_lists_alone_gives_is_what_its_first_list_gives(make, runs):
    model = nn.ModuleDict({"own": make()})
    assert LayerMap(model).that_runs("own") == runs
    assert LayerMap(model).that_runs("(root)") is None


def test_a_list_of_lists_gives_nothing():
    model = nn.ModuleDict({"own": nn.ModuleDict({"inner": Own()})})
    assert LayerMap(model).that_runs("own") is None
    assert LayerMap(model).that_runs("own.inner") == "own.inner.w"
