"""What a layer does to the signal: analytic gains, a naive second computation, and what a forward pass may contain."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_gradflow.remedies.gains import Gains, by_unit, unit_dim

SIZE = 64


def _measured(net, *args, seed=0, **kwargs):
    return Gains(net, lambda: net(*args, **kwargs), seed).measure()


def _batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _between(make, width=SIZE, samples=64, start="he"):
    """The link of a layer with a module behind it, and another layer behind that."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width)
    if start == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif start == "orthogonal":
        nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = _batch(samples, width)
    between = make()
    return _measured(nn.Sequential(layer, between, nn.Linear(between(layer(x)).shape[-1], 2)), x)["0"]


class Calls(nn.Module):
    """Layers called as a function says."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(layers)
        self._calls = forward

    def forward(self, x):
        return self._calls(self.layers, x)


def _calls(forward, x=None, **layers):
    found = _measured(Calls(forward, **layers), _batch(16, 8) if x is None else x)
    for link in found.values():
        link.follower = link.follower.removeprefix("layers.")
    return {name.removeprefix("layers."): link for name, link in found.items()}


def _linears(*names, size=8):
    torch.manual_seed(0)
    return {name: nn.Linear(size, size) for name in names}


def test_a_chain_of_orthogonal_layers_keeps_the_size():
    torch.manual_seed(0)
    net = nn.Sequential(*(parametrizations.orthogonal(nn.Linear(8, 8)) for _ in range(4)))
    links = _measured(net, _batch(4, 8))
    assert [link.gain for link in links.values()][:-1] == pytest.approx([1, 1, 1], abs=1e-5)
    assert math.isnan(links["3"].gain)
    assert [link.follower for link in links.values()] == ["1", "2", "3", ""]
    assert [link.is_first for link in links.values()] == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "start", "gain"),
    [
        (nn.ReLU, "he", 1),
        (lambda: nn.ReLU(inplace=True), "he", 1),
        (lambda: nn.LeakyReLU(0.5), "he", math.sqrt(2 * (1 + 0.25) / 2)),
        (nn.Identity, "he", math.sqrt(2)),
        (lambda: nn.Dropout(0.75), "orthogonal", 2),  # kept with probability 1/4, and then times 4
        (nn.Sigmoid, "default", 0.25 / math.sqrt(3)),
        (nn.Tanh, "default", 1 / math.sqrt(3)),
    ],
)
def test_a_gain_is_that_of_the_weights_times_that_of_the_slopes(make, start, gain):
    is_bent = start == "default"  # the slopes away from 0 are smaller, by a little where the input is small
    assert _between(make, 256, start=start).gain == pytest.approx(gain, rel=0.2 if is_bent else 0.04)


@pytest.mark.parametrize("out", [16, 64, 256])
def test_a_change_of_width_alone_changes_the_gain_by_what_the_weights_do(out):
    """N(0, 1 / fan_in) keeps a gradient: each of its `out` numbers is sent to fan_in inputs."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, out)
    nn.init.normal_(layer.weight, std=SIZE**-0.5)
    assert _measured(nn.Sequential(layer, nn.Linear(out, 2)), _batch(64, SIZE))["0"].gain == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_gain_of_a_convolution_is_the_norm_of_the_weights_that_an_output_is_made_with(dims, groups, stride):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    layer = make(8, 16, 3, stride, groups=groups)
    gain = _measured(nn.Sequential(layer, make(16, 1, 1)), _batch(4, 8, *[9] * dims))["0"].gain
    assert gain == pytest.approx(math.sqrt(layer.weight.square().sum().item() / 16), rel=0.06)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_so_is_that_of_a_transposed_one(dims, groups):
    """Stride = kernel: each output is made with the weights of one place in the kernel."""
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    torch.manual_seed(0)
    layer = make(16, 8, 2, 2, groups=groups)
    gain = _measured(nn.Sequential(layer, make(8, 1, 1)), _batch(4, 16, *[4] * dims))["0"].gain
    assert gain == pytest.approx(math.sqrt(layer.weight.square().sum().item() / 8 / 2**dims), rel=0.06)


@pytest.mark.parametrize(
    ("pool", "gain"),
    [(nn.AvgPool2d(2), 0.5), (nn.MaxPool2d(2), 1.0), (nn.Upsample(scale_factor=2), 1.0)],
    ids=["mean", "largest", "repeated"],
)
def test_pooling_between_counts(pool, gain):
    """A mean sends a quarter to each of four, half the norm; the largest gets all of it.

    What is repeated gets four random ones, 4 times the square at a quarter as many places.
    """
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 1)
    nn.init.orthogonal_(layer.weight)
    net = nn.Sequential(layer, pool, nn.Conv2d(8, 1, 1))
    assert _measured(net, _batch(8, 8, 8, 8))["0"].gain == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (torch.sigmoid, nn.Sigmoid()),
        (F.gelu, nn.GELU()),
        (lambda x: x * torch.sigmoid(x), nn.SiLU()),
        (lambda x: torch.where(x > 0, x, 0.1 * x), nn.LeakyReLU(0.1)),
        (lambda x: x.clone().relu_(), nn.ReLU()),
        (torch.relu_, nn.ReLU()),
    ],
)
def test_a_function_counts_as_the_module_does(function, module):
    layers = _linears("a", "b")
    by_hand = _calls(lambda own, x: own["b"](function(own["a"](x))), **layers)
    by_module = _calls(lambda own, x: own["b"](module(own["a"](x))), **layers)
    assert by_hand["a"].gain == pytest.approx(by_module["a"].gain, rel=1e-5)
    assert 0.01 < by_hand["a"].gain < 1


def _slope(x):
    s = 1 / (1 + math.exp(-1.702 * x))
    return s + 1.702 * x * s * (1 - s)


def test_the_slopes_of_an_activation_of_the_users_own_are_seen():
    """x * sigmoid(1.702 x) behind an orthogonal layer whose outputs are all 0, or all 1."""
    for value in (0.0, 1.0):
        layers = _linears("a", "b")
        nn.init.orthogonal_(layers["a"].weight)
        nn.init.constant_(layers["a"].bias, value)
        links = _calls(lambda own, x: own["b"](_quick(own["a"](x))), torch.zeros(4, 8), **layers)
        assert links["a"].gain == pytest.approx(_slope(value), rel=1e-4)


def _quick(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.GLU(), nn.Linear(3, 2)),
    ],
)
def test_it_is_the_norm_of_the_jacobian_over_the_root_of_the_size_of_the_next_input(make):
    torch.manual_seed(0)
    net, x = make(), _batch(3, 3)
    jacobian = torch.autograd.functional.jacobian(net[:-1], x)
    n = jacobian[..., 0, 0].numel()
    links = [_measured(net, x, seed=seed)["0"] for seed in range(200)]
    mean_square = sum(link.gain**2 for link in links) / len(links)
    assert mean_square == pytest.approx(jacobian.square().sum().item() / n, rel=0.06)


def test_the_same_seed_measures_the_same_and_another_one_does_not():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), _batch(4, 4)
    assert _measured(net, x, seed=3) != _measured(net, x, seed=4)
    assert _measured(net, x, seed=3)["0"] == _measured(net, x, seed=3)["0"]


def test_the_scale_of_the_loss_and_the_global_random_state_have_no_part():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), _batch(4, 4)
    before = torch.get_rng_state()
    one = Gains(net, lambda: net(x)).measure()["0"]
    other = Gains(net, lambda: 1e6 * net(x)).measure()["0"]
    assert one == other
    assert torch.equal(torch.get_rng_state(), before)


def test_the_spread_is_what_is_around_the_mean_of_each_unit():
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0], [4.0]]))
        layer.bias.copy_(torch.tensor([100.0, -7.0]))
    assert _measured(layer, torch.tensor([[1.0], [-1.0]]))[""].spread == pytest.approx(math.sqrt((9 + 16) / 2))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (5, 6, 3)),
        (nn.Conv1d(3, 4, 1), (5, 3, 6)),
        (nn.Conv1d(3, 4, 1), (3, 30)),
        (nn.Conv2d(3, 4, 1), (5, 3, 3, 2)),
        (nn.ConvTranspose3d(3, 4, 1), (5, 3, 1, 3, 2)),
    ],
)
def test_units_are_found_with_a_batch_and_without(layer, shape):
    output = layer(torch.zeros(shape))
    assert output.shape[unit_dim(layer)] == 4
    expected = output.detach().double().movedim(output.shape.index(4), -1).reshape(30, 4)
    torch.testing.assert_close(by_unit(layer, output), expected)


# What belongs to a chain


def test_branches_that_meet_are_no_chain_and_what_they_come_from_is():
    def attend(own, x):
        x = own["a"](x)
        q, k, v = own["q"](x), own["k"](x), own["v"](x)
        return own["out"](F.softmax(q @ k.mT, -1) @ v)

    links = _calls(attend, _batch(4, 5, 8), **_linears("a", "q", "k", "v", "out"))
    assert {name: link.is_chain for name, link in links.items() if link.is_known} == {
        "a": True,
        "q": False,
        "k": False,
        "v": False,
    }
    assert {links[name].follower for name in "qkv"} == {"out"}


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, y: x + y,
        lambda x, y: y.add_(x),
        lambda x, y: torch.sigmoid(y) * x,
        lambda x, y: torch.cat([x, y], 1)[:, 4:12],
        lambda x, y: torch.maximum(x, y),
        lambda x, y: torch.stack([x, y]).mean(0),
    ],
    ids=["sum", "sum in place", "gate", "concatenation", "maximum", "mean"],
)
def test_what_meets_an_earlier_layer_again_is_no_chain(meet):
    def skip(own, x):
        x = own["a"](x)
        return own["c"](meet(x, own["b"](x.tanh())))

    links = _calls(skip, **_linears("a", "b", "c"))
    assert (links["a"].is_chain, links["b"].is_chain) == (True, False)
    assert links["b"].follower == "c"


def test_a_residual_from_an_embedding_is_seen():
    torch.manual_seed(0)
    layers = {"e": nn.Embedding(5, 8), **_linears("a", "b", "c")}

    def skip(own, x):
        x = own["e"](x)
        return own["c"](x + own["b"](own["a"](x).relu()))

    links = _calls(skip, torch.arange(5), **layers)
    assert list(links) == ["a", "b", "c"]
    assert [links[name].is_chain for name in "ab"] == [True, False]
    assert not links["a"].is_first


def test_of_a_residual_sum_only_the_branch_is_measured():
    layers = _linears("a", "b", "c")
    nn.init.orthogonal_(layers["b"].weight, gain=0.5)
    links = _calls(lambda own, x: own["c"](own["a"](x) + own["b"](own["a"](x) * 1)), **layers)
    assert links["b"].gain == pytest.approx(0.5, rel=1e-5)


def test_a_gate_that_a_layer_makes_for_itself_is_a_chain():
    links = _calls(lambda own, x: own["b"](F.silu(own["a"](x)) * own["a"].weight.mean()), **_linears("a", "b"))
    assert links["a"].is_chain


def test_a_u_net_is_a_chain_down_to_the_bottom_and_none_where_its_halves_meet():
    torch.manual_seed(0)
    layers = {
        "down": nn.Conv2d(1, 4, 3, 2, 1),
        "bottom": nn.Conv2d(4, 8, 3, 2, 1),
        "up": nn.ConvTranspose2d(8, 4, 2, 2),
        "out": nn.Conv2d(8, 1, 1),
    }

    def forward(own, x):
        down = own["down"](x).relu()
        return own["out"](torch.cat([down, own["up"](own["bottom"](down).relu())], 1))

    links = _calls(forward, _batch(2, 1, 8, 8), **layers)
    assert {name: link.is_chain for name, link in links.items() if link.is_known} == {
        "down": True,
        "bottom": True,
        "up": False,
    }


# What a norm takes away


def _by_hand(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self._function = function

    def forward(self, x):
        return self._function(x)


NORMS = {
    "batch": lambda: nn.BatchNorm1d(SIZE),
    "layer": lambda: nn.LayerNorm(SIZE),
    "group": lambda: nn.GroupNorm(4, SIZE),
    "rms": lambda: nn.RMSNorm(SIZE),
    "function": lambda: Function(lambda x: F.layer_norm(x, (SIZE,))),
    "by hand": lambda: Function(_by_hand),
    "unit length": lambda: Function(lambda x: F.normalize(x, dim=-1)),
}
OTHERS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "dropout": nn.Dropout,
    "pool": lambda: nn.AvgPool1d(2),
    "nothing": nn.Identity,
    "softmax": lambda: nn.Softmax(-1),
    "norm in eval": lambda: nn.BatchNorm1d(SIZE).eval(),
}


@pytest.mark.parametrize("behind", [nn.Identity, nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_takes_the_scale_away(name, behind):
    assert _between(lambda: nn.Sequential(NORMS[name](), behind())).is_normalised


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_does(name, scale):
    assert not _between(lambda: nn.Sequential(Function(lambda x: scale * x), OTHERS[name]())).is_normalised


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softsign], ids=lambda a: a.__name__)
@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_an_activation_at_its_bounds_takes_no_scale_away_though_it_hardly_tells_one(activation, scale):
    assert not _between(lambda: nn.Sequential(Function(lambda x: scale * x), activation())).is_normalised


def test_a_norm_of_a_sum_takes_the_scale_of_its_parts_together_and_not_of_each():
    layers = {**_linears("a", "b", "c"), "norm": nn.LayerNorm(8)}
    links = _calls(lambda own, x: own["c"](own["norm"](own["a"](x) + own["b"](x))), **layers)
    assert not links["a"].is_normalised
    assert not links["b"].is_normalised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_known_in_half_precision_too(dtype):
    torch.manual_seed(0)
    x = _batch(64, SIZE)
    for between, expected in [(NORMS["layer"](), True), (NORMS["batch"](), True), (nn.Tanh(), False)]:
        net = nn.Sequential(nn.Linear(SIZE, SIZE), between, nn.Linear(SIZE, 2))

        def run(net=net):
            with torch.autocast("cpu", dtype):
                net(x)

        assert Gains(net, run).measure()["0"].is_normalised is expected


# What a forward pass may contain


def test_a_layer_in_a_loop_is_measured_to_its_own_next_call():
    layers = _linears("again", "out")
    nn.init.orthogonal_(layers["again"].weight, gain=0.5)

    def loop(own, x):
        for _ in range(4):
            x = own["again"](x)
        return own["out"](x)

    links = _calls(loop, **layers)
    assert links["again"].calls == 4
    assert links["again"].gain == pytest.approx(0.5, rel=1e-5)
    assert links["again"].follower == "again"
    assert links["out"].calls == 1


def test_calls_with_autograd_off_are_passed_over():
    def twice(own, x):
        with torch.no_grad():
            own["teacher"](own["a"](x))
        return own["b"](own["a"](x))

    links = _calls(twice, **_linears("a", "b", "teacher"))
    assert list(links) == ["a", "b"]
    assert links["a"].calls == 1
    assert links["a"].is_known


def test_a_layer_called_by_keyword_is_measured():
    links = _calls(lambda own, x: own["b"](input=own["a"](input=x).relu()), **_linears("a", "b"))
    assert links["a"].is_known
    assert links["a"].is_first


def test_integers_go_through_an_embedding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    links = _measured(net, torch.arange(5))
    assert list(links) == ["1", "3"]
    assert links["1"].is_known
    assert not links["1"].is_first


def test_under_autocast_the_gain_is_the_same_up_to_rounding():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)), _batch(64, 32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            net(x)

    assert Gains(net, run).measure()["0"].gain == pytest.approx(_measured(net, x)["0"].gain, rel=0.02)


def test_under_autocast_a_layer_that_was_adjusted_computes_with_its_new_weights():
    torch.manual_seed(0)
    net, x, seen = nn.Linear(32, 32, bias=False), _batch(64, 32), []

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(net(x).detach().float())

    def double(name, layer, source, output):
        with torch.no_grad():
            layer.weight.mul_(2)
        return True

    gains = Gains(net, run)
    gains.measure()
    spread = gains.measure(double)[""].spread
    torch.testing.assert_close(seen[1], 2 * seen[0])
    assert spread == pytest.approx(gains.measure()[""].spread)


def test_frozen_layers_are_measured_like_others():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), _batch(16, 8)
    before = _measured(net, x)
    net[:4].requires_grad_(False)
    after = _measured(net, x)
    assert [after[name].gain for name in ("0", "2")] == [before[name].gain for name in ("0", "2")]
    assert all(p.requires_grad == (name.startswith("4")) for name, p in net.named_parameters())


def test_zero_weights_have_a_gain_of_zero_and_others_that_are_not_finite_none():
    for value, expected in [(0.0, 0.0), (math.nan, math.nan), (math.inf, math.nan)]:
        layers = _linears("a", "b", "c")
        nn.init.constant_(layers["b"].weight, value)
        link = _calls(lambda own, x: own["c"](own["b"](own["a"](x))), **layers)["b"]
        assert link.gain == pytest.approx(expected, nan_ok=True) or math.isinf(link.gain)
        assert not link.is_normalised


def test_outputs_that_are_no_tensors_are_passed_through():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    torch.manual_seed(0)
    layers = {**_linears("a", "b"), "pair": Pair(8, 8)}
    links = _calls(lambda own, x: own["b"](own["pair"](own["a"](x))[0]), **layers)
    assert list(links) == ["a", "b"]
    assert links["a"].follower == "pair"


@pytest.mark.parametrize("x", [torch.zeros(8), torch.zeros(0, 8), torch.zeros(2, 8, dtype=torch.complex64)])
def test_inputs_without_a_batch_of_real_numbers_are_passed_over(x):
    net = nn.Sequential(nn.Linear(8, 8, dtype=x.dtype), nn.Linear(8, 8, dtype=x.dtype))
    assert _measured(net, x) == {}


def test_the_share_of_the_weights_is_told_apart_from_what_follows():
    layers = _linears("a", "b")
    nn.init.orthogonal_(layers["a"].weight, gain=3.0)
    link = _calls(lambda own, x: own["b"](0.5 * own["a"](x)), **layers)["a"]
    assert link.own_gain == pytest.approx(3, rel=1e-5)
    assert link.gain == pytest.approx(1.5, rel=1e-5)


def test_a_model_without_layers_has_no_links():
    assert _measured(nn.Sequential(nn.Embedding(2, 2), nn.LayerNorm(2)), torch.arange(2)) == {}


def test_a_training_step_may_ask_for_gradients_itself():
    torch.manual_seed(0)
    critic, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), _batch(16, 8)
    seen = []

    def penalty():
        own = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(critic(own).sum(), own, create_graph=True)
        seen.append(((slope.norm(dim=1) - 1) ** 2).mean().item())

    link = Gains(critic, penalty).measure()["0"]
    penalty()
    assert seen[0] == seen[1]
    assert link.gain == _measured(critic, x)["0"].gain
    assert link.is_first


@pytest.mark.parametrize("adjusts", [False, True])
def test_layers_that_are_called_again_for_the_backward_pass_count_once(adjusts):
    layers = _linears("a", "b", "c", "d")

    def forward(own, x, again=lambda f, x: checkpoint(f, x, use_reentrant=False)):
        return own["d"](again(lambda y: own["c"](own["b"](y).tanh()).tanh(), own["a"](x)))

    def halve(name, layer, source, output):
        with torch.no_grad():
            layer.weight.div_(2)
        return adjusts

    net, x = Calls(forward, **layers), _batch(16, 8)
    plain = Calls(lambda own, y: forward(own, y, lambda f, z: f(z)), **layers)
    kwargs = {"adjust": halve} if adjusts else {}
    links = Gains(net, lambda: net(x)).measure(**kwargs)
    assert [link.calls for link in links.values()] == [1, 1, 1, 1]
    assert [link.gain for link in links.values()] == pytest.approx(
        [link.gain for link in _measured(plain, x).values()], nan_ok=True
    )


def test_what_is_computed_is_what_is_computed_without_it():
    torch.manual_seed(0)
    net, x, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)), _batch(4, 8), []
    Gains(net, lambda: seen.append(net(x))).measure()
    assert torch.equal(seen[0], net(x))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind_on_the_module(fails):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.arange(3)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def run():
        net(x)
        if fails:
            raise ValueError("the user's")

    if fails:
        with pytest.raises(ValueError, match="the user's"):
            Gains(net, run).measure()
    else:
        Gains(net, run).measure()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_layers_are_adjusted_in_order_of_execution_before_what_they_give_is_taken():
    layers = _linears("second", "first")
    order, seen = [], []

    def adjust(name, layer, source, output):
        order.append(name)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.fill_(3.0)
        return True

    net = Calls(lambda own, x: seen.append(own["second"](own["first"](x))), **layers)
    Gains(net, lambda: net(_batch(4, 8))).measure(adjust)
    assert order == ["layers.first", "layers.second"]
    assert torch.equal(seen[0], torch.full((4, 8), 3.0))


TOKENS = 9


class Alike(nn.Module):
    """A layer over positions that are all the same, or not, and what makes one of them."""

    def __init__(self, join, *, same):
        super().__init__()
        self.layer, self.next = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, 2)
        nn.init.orthogonal_(self.layer.weight)
        self._join, self._same = join, same

    def forward(self, x):
        shape = (len(x), TOKENS, SIZE)
        return self.next(self._join(self.layer(x[:, None].expand(shape) if self._same else x.view(shape)), 1))


@pytest.mark.parametrize(("join", "noise", "signal"), [(torch.mean, 1 / 3, 1.0), (torch.sum, 3.0, 9.0)])
def test_a_signal_that_is_the_same_at_all_positions_grows_by_more_than_noise_does(join, noise, signal):
    torch.manual_seed(0)
    link = _measured(Alike(join, same=True), _batch(64, SIZE))["layer"]
    assert link.gain == pytest.approx(noise, rel=0.1)
    assert link.signal_gain == pytest.approx(signal, rel=0.1)
    assert link.growth == link.signal_gain


@pytest.mark.parametrize(("join", "gain"), [(torch.mean, 1 / 3), (torch.sum, 3.0)])
def test_where_positions_have_nothing_to_do_with_each_other_it_grows_as_noise_does(join, gain):
    torch.manual_seed(0)
    link = _measured(Alike(join, same=False), _batch(64, TOKENS * SIZE))["layer"]
    assert link.signal_gain == pytest.approx(gain, rel=0.1)
    assert link.growth == link.gain == pytest.approx(gain, rel=0.1)


def test_behind_weights_with_a_mean_a_signal_with_a_mean_grows_with_the_width():
    """c in each entry of n x n: n c for what all units share, sqrt(n) c for what they do not."""
    net = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, 2))
    nn.init.constant_(net[0].weight, 0.5)
    link = _measured(net, _batch(64, 1).expand(64, SIZE))["0"]
    assert link.signal_gain == pytest.approx(SIZE / 2, rel=0.2)
    assert link.gain == pytest.approx(math.sqrt(SIZE) / 2, rel=0.2)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Identity])
def test_behind_weights_without_one_it_grows_no_faster_than_noise_does(activation):
    link = _between(activation)
    assert link.growth == link.gain
    assert 0 < link.signal_gain < 1.25 * link.gain


def test_what_is_the_same_for_all_samples_is_no_signal():
    """The border that padding makes of a mean, which is larger than what differs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1))
    x = _batch(64, 8, 12)
    near, far = (_measured(net, size * x + 1)["0"] for size in (1.0, 1e-3))
    assert far.signal_gain == pytest.approx(near.signal_gain, rel=1e-3)


def test_a_single_sample_tells_nothing_of_it():
    link = _measured(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), _batch(1, 8))["0"]
    assert math.isnan(link.signal_gain)
    assert link.growth == link.gain
