"""Names of the places where the signal is measured."""

from torch import nn

from lightning_gradflow.history import Point
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.points import PointNames


def _points():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "act": nn.ReLU(), "other": nn.ReLU()})
    return PointNames(LayerMap(model))


def test_a_layer_is_one_point_however_often_it_is_called():
    points = _points()
    assert points.layer("a") is points.layer("a")


def test_a_shared_activation_is_a_point_behind_each_layer():
    points = _points()
    names = []
    for layer in ("a", "b"):
        points.layer(layer)
        names.append(points.activation("act", "relu").name)
    assert names == ["act", "b/act"]


def test_two_functional_activations_behind_a_layer_are_told_apart():
    points = _points()
    points.layer("a")
    assert [points.activation("(root)", "tanh").name for _ in range(2)] == ["a/tanh", "a/tanh:2"]


def test_a_functional_activation_is_told_of_the_layer_that_it_follows():
    points = _points()
    points.layer("b")
    assert points.activation("(root)", "tanh") == Point("b/tanh", "b", "tanh")


def test_a_functional_activation_before_any_layer_is_told_of_the_module_that_calls_it():
    assert _points().activation("(root)", "tanh") == Point("(root)/tanh", "(root)", "tanh")


def test_an_activation_module_is_told_by_its_own_name():
    points = _points()
    points.layer("a")
    assert points.activation("act", "relu") == Point("act", "act", "relu")


def test_a_cell_in_a_loop_has_the_same_points_at_every_time_step():
    points = _points()

    def step():
        points.layer("a")
        return [points.activation("(root)", "sigmoid").name, points.activation("(root)", "sigmoid").name]

    assert step() == step() == ["a/sigmoid", "a/sigmoid:2"]


def test_names_are_the_same_at_every_forward_pass():
    points = _points()

    def forward():
        points.restart()
        names = [points.activation("act", "relu").name]
        for layer in ("a", "b"):
            points.layer(layer)
            names += [points.activation("act", "relu").name, points.activation("(root)", "tanh").name]
        return names

    assert forward() == forward()


def test_no_two_places_share_a_name():
    points = _points()
    found = []
    for layer in ("a", "b"):
        found.append(points.layer(layer))
        for module in ("act", "other", "(root)"):
            found += [points.activation(module, op) for op in ("relu", "tanh", "relu")]
    assert len({point.name for point in found}) == len(found)


def test_an_activation_that_was_seen_before_is_known_again():
    points = _points()
    points.layer("a")
    seen = [points.activation("(root)", "tanh") for _ in range(2)]
    points.restart()
    points.layer("a")
    assert [points.known_activation("(root)", "tanh", seen) for _ in range(2)] == seen


def test_an_activation_that_was_never_seen_is_not_known_and_takes_no_name():
    points = _points()
    points.layer("a")
    assert points.known_activation("(root)", "tanh", []) is None
    points.restart()
    points.layer("a")
    assert points.activation("(root)", "tanh").name == "a/tanh"


def test_an_activation_before_any_layer_is_known_where_it_can_be_only_one():
    points = _points()
    points.layer("a")
    seen = points.activation("act", "relu")
    points.restart()
    assert points.known_activation("act", "relu", [seen]) == seen


def test_an_activation_before_any_layer_is_not_known_where_it_can_be_two():
    points = _points()
    seen = []
    for layer in ("a", "b"):
        points.layer(layer)
        seen.append(points.activation("act", "relu"))
    points.restart()
    assert points.known_activation("act", "relu", seen) is None


def test_an_activation_before_any_layer_is_none_that_cannot_be_repeated():
    points = _points()
    seen = []
    for layer in ("a", "b"):
        points.layer(layer)
        seen.append(points.activation("act", "relu"))
    points.restart()
    assert points.known_activation("act", "relu", seen[1:]) == seen[1]
