"""Initialisations by name: their variance, what stays as it was, and where the numbers come from."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

from lightning_gradflow.remedies.textbook import INITIALISATIONS, assign, gain_between, initialise, name_for


def _draw(module, name, seed=0, **kwargs):
    return initialise(module, name, torch.Generator().manual_seed(seed), **kwargs)


def _gain_of(forward, x):
    """What a layer multiplies the rms of a signal by, by running it."""
    y = forward(x)
    return (y.std() / x.std()).item()


@pytest.mark.parametrize(("name", "variance"), [("glorot", 2 / 700), ("he", 2 / 400), ("lecun", 1 / 400)])
def test_the_variance_of_a_linear_layer_is_the_textbooks(name, variance):
    layer = nn.Linear(400, 300)
    assert _draw(layer, name) == [layer.weight, layer.bias]
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert not layer.bias.any()


@pytest.mark.parametrize("shape", [(16, 16), (16, 8), (8, 16)])
def test_orthogonal_keeps_the_length_of_what_there_are_fewer_of(shape):
    layer = nn.Linear(*shape)
    _draw(layer, "orthogonal")
    small = layer.weight @ layer.weight.T if shape[0] >= shape[1] else layer.weight.T @ layer.weight
    torch.testing.assert_close(small, torch.eye(min(shape)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_drawn_by_lecun_keeps_the_signal_whatever_its_groups(dims, groups):
    layer = getattr(nn, f"Conv{dims}d")(32, 32, 3, groups=groups, stride=2)
    _draw(layer, "lecun")
    torch.manual_seed(0)
    assert _gain_of(layer, torch.randn(8, 32, *[12] * dims)) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("dims", "stride"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_a_transposed_convolution_drawn_by_lecun_keeps_the_signal_whatever_its_groups(dims, stride, groups):
    layer = getattr(nn, f"ConvTranspose{dims}d")(32, 16, 4, groups=groups, stride=stride, padding=3)
    _draw(layer, "lecun")
    torch.manual_seed(0)
    assert _gain_of(layer, torch.randn(4, 32, *[10] * dims)) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("layer", [nn.Conv2d(32, 32, 3, stride=2, groups=2), nn.ConvTranspose2d(32, 32, 4, stride=2)])
def test_glorot_keeps_forward_and_backward_gain_around_one(layer):
    """With its variance the squares of the two gains add up as 1 / fan_in and 1 / fan_out do: to two."""
    _draw(layer, "glorot")
    torch.manual_seed(0)
    x = torch.randn(8, 32, 24, 24, requires_grad=True)
    y = layer(x)
    v = torch.randn_like(y)
    (back,) = torch.autograd.grad((y * v).sum(), x)
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    squares = y[inside].var() / x.detach().var(), back[inside].var() / v.var()
    assert sum(squares).item() == pytest.approx(2, rel=0.15)


def test_a_bilinear_layer_drawn_by_lecun_keeps_the_product_of_two_signals():
    layer = nn.Bilinear(20, 30, 40)
    _draw(layer, "lecun")
    torch.manual_seed(0)
    y = layer(torch.randn(500, 20), torch.randn(500, 30))
    assert y.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_is_a_linear_map_of_one_input_and_its_padding_stays_zero(kind):
    layer = kind(500, 20, padding_idx=3)
    assert _draw(layer, "lecun") == [layer.weight]
    assert not layer.weight[3].any()
    rest = torch.cat([layer.weight[:3], layer.weight[4:]])
    assert rest.std().item() == pytest.approx(1, rel=0.03)


def test_the_orthogonal_columns_of_an_embedding_are_orthonormal():
    layer = nn.Embedding(50, 20)
    _draw(layer, "orthogonal")
    torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_attention_is_drawn_block_by_block(name):
    layer = nn.MultiheadAttention(64, 4)
    output = layer.out_proj.weight.detach().clone()
    assert _draw(layer, name) == [layer.in_proj_weight, layer.in_proj_bias]
    alone = nn.Linear(64, 64)
    _draw(alone, name)
    torch.testing.assert_close(layer.in_proj_weight[:64], alone.weight)
    for block in layer.in_proj_weight.split(64):
        assert block.std().item() == pytest.approx(alone.weight.std().item(), rel=0.05)
    assert torch.equal(layer.out_proj.weight, output)


def test_attention_with_other_sizes_of_key_and_value_is_drawn_too():
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    assert _draw(layer, "glorot") == [*weights, layer.in_proj_bias]


@pytest.mark.parametrize(("after", "bound"), [("sigmoid", torch.sigmoid), ("hardsigmoid", nn.functional.hardsigmoid)])
def test_the_gain_before_a_sigmoid_makes_up_for_its_slope(after, bound):
    x = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(bound(x), x)
    assert gain_between("sigmoid", after) == pytest.approx(1 / slope.item())


def test_what_comes_from_sigmoids_is_centred():
    layer = nn.Linear(40, 30)
    _draw(layer, "orthogonal", before="sigmoid", after="sigmoid")
    torch.testing.assert_close(layer(torch.full((1, 40), 0.5)), torch.zeros(1, 30), atol=1e-5, rtol=0)
    assert layer.weight.norm(2).item() == pytest.approx(4 * math.sqrt(30), rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_of_sigmoids_is_centred(kind, groups):
    layer = kind(6, 4, 2, stride=2, groups=groups)
    _draw(layer, "glorot", before="sigmoid")
    means = layer(torch.full((1, 6, 8, 8), 0.5)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(means, torch.zeros(4), atol=1e-5, rtol=0)


def test_the_name_goes_by_the_activation_that_follows():
    assert [name_for(op) for op in ("gelu", "selu", "sigmoid", "hardtanh", "")] == [
        "he",
        "lecun",
        "orthogonal",
        "orthogonal",
        "glorot",
    ]


def test_a_gain_of_ones_own_takes_the_place_of_the_activations():
    layer = nn.Linear(16, 16)
    _draw(layer, "orthogonal", after="relu", gain=3.0)
    torch.testing.assert_close(layer.weight @ layer.weight.T, 9 * torch.eye(16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan])
def test_a_gain_that_is_not_above_zero_is_refused(gain):
    with pytest.raises(ValueError, match="gain must be in"):
        _draw(nn.Linear(2, 2), "he", gain=gain)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of"):
        _draw(nn.Linear(2, 2), "xavier")


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(2),
        nn.LSTM(2, 2),
        nn.ReLU(),
        nn.Linear(2, 2).requires_grad_(False),
        parametrizations.weight_norm(nn.Linear(2, 2)),
        parametrizations.spectral_norm(nn.Conv1d(2, 2, 2)),
        nn.LazyLinear(3),
        nn.Linear(2, 2, device="meta"),
    ],
    ids=["norm", "lstm", "relu", "frozen", "weight_norm", "spectral_norm", "lazy", "meta"],
)
def test_what_has_no_weight_to_write_into_is_left_as_it_is(module):
    module.eval()  # in training a look at the weight of spectral_norm goes a step on with its power iteration
    before = {key: value.clone() for key, value in module.state_dict().items() if type(value) is torch.Tensor}
    assert _draw(module, "he") == []
    for key, value in before.items():
        if not value.is_meta:
            assert torch.equal(module.state_dict()[key], value)


def test_a_frozen_bias_is_left_as_it_is():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False).fill_(7.0)
    assert _draw(layer, "he") == [layer.weight]
    assert layer.bias.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 5), lambda: nn.ConvTranspose2d(4, 2, 3), lambda: nn.Embedding(4, 3)]
)
def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_not_touched(name, make):
    one, other = make(), make()
    state = torch.get_rng_state()
    _draw(one, name, seed=3)
    _draw(other, name, seed=3)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_stay_the_same_parameters_in_their_own_precision_without_a_pending_gradient():
    layer = nn.Linear(2, 2).bfloat16()
    weight = layer.weight
    layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    _draw(layer, "he")
    assert layer.weight is weight
    assert weight.dtype == torch.bfloat16
    assert weight.grad is layer.bias.grad is None


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_weight_gets_the_numbers_of_a_plain_one(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    plain, spread = nn.Linear(4, 4), nn.Linear(4, 4)
    for key, parameter in list(spread.named_parameters()):
        setattr(spread, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    weight = spread.weight
    _draw(plain, "orthogonal")
    assert _draw(spread, "orthogonal") == [weight, spread.bias]
    assert spread.weight is weight
    assert torch.equal(weight.full_tensor(), plain.weight)


def test_what_is_assigned_does_not_share_memory():
    weight, values = nn.Parameter(torch.zeros(2)), torch.ones(2)
    assign(weight, values)
    values += 1
    assert weight.tolist() == [1.0, 1.0]
