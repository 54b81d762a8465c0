"""Code that puts something around or before a layer: what it computes, and that it fits every kind of layer."""

import pytest
import torch
from torch import nn

from lightning_gradflow.advice.layer_cures import leak, normalise, scale_inputs, swap_activations
from lightning_gradflow.advice.path_cures import gates, residuals
from lightning_gradflow.advice.site import survey
from lightning_gradflow.history import History, Point
from tests.advice.cases import Net, finding, history_of


def site_of(model, kind="vanishing_gradient", cause="saturation", layers=("net.0",)):
    return survey(finding(kind, cause, layers=layers), history_of(model))


def patched(model, cure):
    """The model with the one suggestion of a cure carried out."""
    (suggestion,) = cure(site_of(model))
    exec(suggestion.code, {"self": model})
    return model


class Convs(nn.Module):
    """Convolutions of which some keep the shape and some do not."""

    def __init__(self, conv, act):
        super().__init__()
        shapes = [(2, 8, 1, 1), (8, 8, 1, 1), (8, 8, 2, 1), (8, 8, 1, 0), (8, 4, 1, 1)]
        blocks = [m for i, o, stride, pad in shapes for m in (conv(i, o, 3, stride=stride, padding=pad), act())]
        self.net = nn.Sequential(*blocks[:-1])

    def forward(self, x):
        return self.net(x)


CONVS = [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)]
CURES = [gates, leak, normalise, residuals, scale_inputs, swap_activations]


@pytest.mark.parametrize("cure", CURES)
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize(("conv", "axes"), CONVS)
def test_convolutions_keep_their_shapes(conv, axes, act, cure):
    model = Convs(conv, act)
    history = History()
    history.layer_axis.merge([f"net.{i}" for i in range(0, 9, 2)])
    history.add_points(
        [Point(f"net.{i}", f"net.{i}", "" if i % 2 == 0 else act.__name__.lower()) for i in range(9)],
    )
    x = torch.randn(3, 2, *[8] * axes)
    shape, before = model(x).shape, model(x)
    suggestions = cure(survey(finding("vanishing_gradient", "saturation", layers=("net.0",)), history))
    assert bool(suggestions) != ((cure is leak and act is nn.Sigmoid) or (cure is swap_activations and act is nn.ReLU))
    for suggestion in suggestions:
        exec(suggestion.code, {"self": model})
        assert model(x).shape == shape
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("cure", [gates, normalise, residuals, scale_inputs])
def test_linear_layers_over_sequences_keep_their_shapes(cure, act):
    model = patched(Net(depth=4, act=act), cure)
    assert model(torch.randn(6, 5, 32)).shape == (6, 5, 4)


def test_a_highway_is_the_input_and_a_little_of_the_layer_at_first():
    model = Net(depth=1, act=nn.Tanh)
    x = torch.randn(8, 32)
    layer = torch.tanh(model.net[0](x))
    share = 1 / (1 + torch.e**2)
    patched(model, gates)
    torch.testing.assert_close(model.net[0](x), (1 - share) * x + share * layer)


def test_a_residual_connection_is_left_out_where_the_shape_changes():
    model = Net(depth=2, act=nn.Tanh)
    model.net[2] = nn.Linear(32, 16)
    model.net[4] = nn.Linear(16, 4)
    x = torch.randn(8, 32)
    first, second = torch.tanh(model.net[0](x)), model.net[2]
    patched(model, residuals)
    torch.testing.assert_close(model.net[0](x), x + first)
    torch.testing.assert_close(model.net[2](x), torch.tanh(second(x)))


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("axes", [1, 2])
def test_each_unit_is_normalised_over_all_axes_but_the_last(axes, act):
    model = patched(Net(depth=2, act=act), normalise)
    x = torch.randn(*[40, 3][:axes], 32)
    out = model.net[0](x).flatten(0, -2)
    torch.testing.assert_close(out.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(32), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("first", "shape", "axes"),
    [
        (nn.Linear(3, 4), (50, 3), (0,)),
        (nn.Linear(3, 4), (50, 7, 3), (0, 1)),
        (nn.Conv1d(3, 4, 1), (50, 3, 7), (0, 2)),
        (nn.Conv2d(3, 4, 1), (50, 3, 7, 7), (0, 2, 3)),
        (nn.Conv3d(3, 4, 1), (50, 3, 5, 5, 5), (0, 2, 3, 4)),
        (nn.LSTM(3, 4, batch_first=True), (50, 7, 3), (0, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_first_layer_gets_standardised_inputs(first, shape, axes):
    model = nn.Module()
    model.first = first
    history = History()
    history.layer_axis.merge(["first"])
    (cure,) = scale_inputs(survey(finding("dead_units", "unscaled_inputs", layers=("first",)), history))
    exec(cure.code, {"self": model})
    x = 1000 * torch.rand(shape) + 100
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True, unbiased=False)
    wanted, got = first((x - mean) / std), model.first(x)
    if isinstance(first, nn.LSTM):
        wanted, got = wanted[0], got[0]
        state = torch.ones(1, 50, 4)
        assert model.first(x, (state, state))[0].shape == (50, 7, 4), "a state may come with the input"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)
