"""Nets that lose or blow up the signal keep its size afterwards; those that keep it are not touched."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradflow.remedies.critical import make_critical
from lightning_gradflow.remedies.gains import Gains
from lightning_gradflow.remedies.sick_layers import FAR, MAX_OFF, size_of

WIDTH = 32


def _batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def _treated(net, x, **kwargs):
    return make_critical(net, lambda: net(x), **kwargs)


def _drawn_with(net, draw):
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            draw(module.weight)
            nn.init.zeros_(module.bias)
    return net


def _stack(activation, depth, width=WIDTH, draw=None):
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), activation())]
    net = nn.Sequential(*layers, nn.Linear(width, 4))
    return net if draw is None else _drawn_with(net, draw)


def _state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def _assert_untouched(net, x, **kwargs):
    before = _state(net)
    treated = _treated(net, x, **kwargs)
    assert treated.changed == {}
    assert treated.centres == {}
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def _decades_to_data(net, x):
    """How much of a random gradient at the last layer's input is left at the input, by autograd in one go."""
    own = x.double().requires_grad_()
    features = copy.deepcopy(net[:-1]).double()(own)
    v = torch.randn_like(features)
    (gradient,) = torch.autograd.grad(features, own, v)
    return math.log10(gradient.norm() / v.norm())


SMALL, LARGE = lambda w: nn.init.normal_(w, std=0.01), nn.init.normal_
BENT = (nn.Sigmoid, nn.Tanh, nn.Softsign, nn.Hardsigmoid, nn.Hardtanh)
HALF = (nn.ReLU, nn.GELU, nn.SELU, nn.SiLU, nn.Hardswish)


@pytest.mark.parametrize("depth", [5, 20, 40])
@pytest.mark.parametrize("activation", [*BENT, *HALF])
def test_the_signal_comes_through_a_stack_that_lost_it(activation, depth):
    net = _made(lambda: _stack(activation, depth, draw=SMALL))
    treated = _treated(net, _batch(64, WIDTH))
    before, after = treated.spans
    assert before < -4
    assert abs(after) < 0.3
    assert len(treated.changed) == depth + 1


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.GELU])
def test_the_signal_comes_through_a_deep_stack_as_torch_draws_it(activation):
    net = _made(lambda: _stack(activation, 20))
    before, after = _treated(net, _batch(64, WIDTH)).spans
    assert before < -6
    assert abs(after) < 0.3


@pytest.mark.parametrize("activation", HALF)
def test_and_is_not_blown_up_any_more(activation):
    net = _made(lambda: _stack(activation, 20, draw=LARGE))
    before, after = _treated(net, _batch(64, WIDTH)).spans
    assert before > 6
    assert abs(after) < 0.3


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softsign, nn.Hardtanh])
def test_activations_that_are_at_their_bounds_are_brought_back_though_the_signal_is_kept(activation):
    net = _made(lambda: _stack(activation, 5, draw=lambda w: nn.init.normal_(w, std=2.0)))
    treated = _treated(net, _batch(64, WIDTH))
    assert min(treated.before[str(i)].spread for i in range(2, 10, 2)) > 4
    assert max(link.spread for link in treated.after.values()) < 2
    assert abs(treated.spans[1]) < 0.3


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.SELU])
def test_the_gains_that_are_set_one_by_one_hold_for_all_of_the_net_at_once(activation):
    net, x = _made(lambda: _stack(activation, 10, draw=SMALL)), _batch(64, WIDTH)
    assert _decades_to_data(net, x) < -9
    _treated(net, x)
    assert abs(_decades_to_data(net, x)) < 1.3  # the first layer has variance 1, not gain 1


def test_orthogonal_and_he_come_out_where_they_hold():
    """Around 0 a tanh is linear; behind a ReLU half of the gradient is lost, so the weights have twice the variance."""
    x = 1e-3 * _batch(256, WIDTH)
    tanh = _made(lambda: _stack(nn.Tanh, 6, draw=SMALL))
    _treated(tanh, x)
    relu = _made(lambda: _stack(nn.ReLU, 6, width=64, draw=SMALL))
    _treated(relu, _batch(256, 64))
    for layer in relu[2:-1:2]:
        torch.testing.assert_close(layer.weight @ layer.weight.T, 2 * torch.eye(64), atol=0.5, rtol=0)
    for layer in tanh[2:-1:2]:
        gram = layer.weight @ layer.weight.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(WIDTH), atol=1e-4, rtol=0)


def test_units_are_centred_and_the_first_and_last_layer_have_variance_one():
    net, x = _made(lambda: _stack(nn.Sigmoid, 8, draw=SMALL)), _batch(64, WIDTH)
    _treated(net, x)
    first, last = net[0](x), net(x)
    for output in (first, last):
        torch.testing.assert_close(output.mean(0), torch.zeros(output.shape[1]), atol=1e-4, rtol=0)
        assert output.square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)
    hidden = net[:5](x)
    assert hidden.mean(0).abs().max() < 0.02 * hidden.std()


@pytest.mark.parametrize("head", [SMALL, lambda w: nn.init.normal_(w, std=1.0)])
def test_a_last_layer_is_no_larger_than_those_before_it(head):
    """Behind deep rectifiers little differs between samples, and an output of variance 1 would be all of the loss."""
    net, x = _made(lambda: _stack(nn.ReLU, 30, width=64, draw=SMALL)), _batch(64, 64)
    head(net[-1].weight)
    links = _treated(net, x).after
    sizes = [size_of(layer) for layer in net if isinstance(layer, nn.Linear)]
    assert sizes[-1] == pytest.approx(np.median(sizes[:-1]), rel=0.05)
    assert 1e-3 < links[str(len(net) - 1)].spread < 0.5


def test_a_last_layer_alone_is_no_larger_than_what_keeps_the_size():
    net, x = _made(lambda: _stack(nn.ReLU, 2, width=64)), 1e-2 * _batch(64, 64)
    nn.init.normal_(net[-1].weight, std=1e-3)
    assert [*_treated(net, x, only=[str(len(net) - 1)]).changed] == [str(len(net) - 1)]
    assert size_of(net[-1]) <= 1.001


def _convolutions(activation, make=nn.Conv2d, pad=1):
    layers = [module for _ in range(8) for module in (make(8, 8, 3, padding=pad), activation())]
    return nn.Sequential(make(2, 8, 3, padding=pad), activation(), *layers, make(8, 2, 1))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_the_signal_comes_through_convolutions(make, activation):
    net = _made(lambda: _drawn_with(_convolutions(activation, make), SMALL))
    x = _batch(8, 2, 32) if make is nn.Conv1d else _batch(8, 2, 12, 12)
    before, after = _treated(net, x).spans
    assert before < -5
    assert abs(after) < 0.3


class UNet(nn.Module):
    def __init__(self, activation=nn.Sigmoid, skips=True):
        super().__init__()
        widths = [4, 8, 16]
        pairs = zip([1, *widths], [*widths, 32], strict=False)
        self.down = nn.ModuleList(self._pair(i, o, activation) for i, o in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths))
        self.join = nn.ModuleList(self._pair((1 + skips) * w, w, activation) for w in reversed(widths))
        self.out = nn.Conv2d(4, 1, 1)
        self.skips = skips

    @staticmethod
    def _pair(i, o, activation):
        return nn.Sequential(nn.Conv2d(i, o, 3, 1, 1), activation(), nn.Conv2d(o, o, 3, 1, 1), activation())

    def forward(self, x):
        kept = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(kept[:-1]), strict=True):
            x = join(torch.cat([up(x), skip], 1) if self.skips else up(x))
        return self.out(x)


@pytest.mark.parametrize("skips", [True, False])
def test_the_signal_comes_through_a_u_net(skips):
    net = _made(lambda: UNet(skips=skips))
    before, after = _treated(net, _batch(4, 1, 16, 16)).spans
    assert before < -6
    assert abs(after) < 0.3


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_group_of_a_convolution_is_orthogonal(make, groups):
    layer = _made(lambda: make(8, 8, 1, groups=groups))
    nn.init.normal_(layer.weight, std=1e-4)
    _treated(nn.Sequential(layer, nn.Tanh(), make(8, 8, 1)), _batch(16, 8, 4, 4))
    for group in layer.weight.detach().chunk(groups):
        gram = group.flatten(1) @ group.flatten(1).T
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)), atol=1e-4, rtol=0)


# What keeps the signal is left


def _he(net):
    return _drawn_with(net, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"))


class Residual(nn.Module):
    def __init__(self, *layers, norm=None):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def _resnet():
    blocks = []
    for _ in range(4):
        block = Residual(
            nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        )
        nn.init.zeros_(block.layers[-1].weight)
        blocks += [block, nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), *blocks, *head)


class Transformer(nn.Module):
    def __init__(self, std=None, norm_first=True, width=WIDTH):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, norm_first=norm_first, batch_first=True, dropout=0.0)
        self.embed = nn.Embedding(20, width)
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 20)
        for module in self.modules() if std else ():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


class Adapted(nn.Module):
    """LoRA, beside a frozen layer."""

    def __init__(self):
        super().__init__()
        self.kept = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.kept(x) + self.b(self.a(x))


def _normed(norm, activation, depth=12):
    layers = [module for _ in range(depth) for module in (nn.Linear(WIDTH, WIDTH), norm(WIDTH), activation())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


TOKENS = torch.randint(0, 20, (8, 10), generator=torch.Generator().manual_seed(0))
HEALTHY = {
    "He ReLU": (lambda: _he(_stack(nn.ReLU, 30, width=64)), _batch(64, 64)),
    "narrow He ReLU": (lambda: _he(_stack(nn.ReLU, 5, width=16)), _batch(64, 16)),
    "orthogonal tanh": (lambda: _drawn_with(_stack(nn.Tanh, 30), nn.init.orthogonal_), _batch(64, WIDTH)),
    "SELU with LeCun": (
        lambda: _drawn_with(_stack(nn.SELU, 20, 64), lambda w: nn.init.normal_(w, std=w.shape[1] ** -0.5)),
        _batch(64, 64),
    ),
    "one hidden layer, sigmoid": (lambda: _stack(nn.Sigmoid, 1), _batch(64, WIDTH)),
    "two hidden layers, ReLU": (lambda: _stack(nn.ReLU, 2), _batch(64, WIDTH)),
    "logistic regression": (lambda: nn.Sequential(nn.Linear(WIDTH, 4)), _batch(64, WIDTH)),
    "BatchNorm": (lambda: _normed(nn.BatchNorm1d, nn.ReLU), _batch(64, WIDTH)),
    "LayerNorm": (lambda: _normed(nn.LayerNorm, nn.Tanh), _batch(64, WIDTH)),
    "RMSNorm": (lambda: _normed(nn.RMSNorm, nn.GELU), _batch(64, WIDTH)),
    "norm and nothing": (lambda: _normed(nn.LayerNorm, nn.Identity), _batch(64, WIDTH)),
    "ResNet, zero gamma": (_resnet, _batch(8, 3, 8, 8)),
    "pre-LN transformer": (Transformer, TOKENS),
    "pre-LN transformer, 0.02": (lambda: Transformer(0.02, width=128), TOKENS),
    "post-LN transformer": (lambda: Transformer(norm_first=False), TOKENS),
    "LoRA": (lambda: nn.Sequential(Adapted(), nn.Tanh(), Adapted(), nn.Tanh(), nn.Linear(WIDTH, 4)), _batch(64, WIDTH)),
}


@pytest.mark.parametrize("max_off", [None, FAR])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_net_is_left_to_the_bit(name, max_off):
    make, x = HEALTHY[name]
    _assert_untouched(_made(make), x, **({} if max_off is None else {"max_off": max_off}))


def _learnt(layer):
    """A direction of its own that stands out, as training leaves one."""
    with torch.no_grad():
        left, right = (torch.nn.functional.normalize(torch.randn(n), dim=0) for n in layer.weight.shape)
        layer.weight += 6 * layer.weight.std() * math.sqrt(max(layer.weight.shape)) * torch.outer(left, right)


def test_weights_that_have_been_learnt_are_left_however_the_signal_fares():
    net, x = _made(lambda: _stack(nn.Sigmoid, 10)), _batch(64, WIDTH)
    for layer in net[::2]:
        _learnt(layer)
    assert make_critical(copy.deepcopy(net), lambda: net(x)).spans[0] != 0
    _assert_untouched(net, x)


@pytest.mark.parametrize("pretrained", [False, True])
def test_what_is_too_small_to_tell_is_left_where_another_layer_has_been_trained(pretrained):
    net, x = _made(lambda: nn.Sequential(_stack(nn.Sigmoid, 6), _stack(nn.Sigmoid, 6, width=8))), _batch(64, WIDTH)
    net[0][-1] = nn.Linear(WIDTH, 8)
    if pretrained:
        for layer in net[0][:-1:2]:
            _learnt(layer)
    small = _state(net[1])
    treated = _treated(net, x)
    changed = any(not torch.equal(a, b) for a, b in zip(_state(net[1]).values(), small.values(), strict=True))
    assert changed is not pretrained
    assert any(name.startswith("1.") for name in treated.changed) is not pretrained


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_ends_of_residual_branches_that_are_zero_stay_zero(value):
    def make():
        blocks = [Residual(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)]
        for block in blocks:
            nn.init.constant_(block.layers[2].weight, 0.0)
            nn.init.normal_(block.layers[0].weight, std=value * 20 + 1e-6)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, 4))

    net = _made(make)
    _treated(net, _batch(64, WIDTH))
    assert not any(net[i].layers[2].weight.any() for i in range(1, 5))


def test_residual_branches_that_blow_the_signal_up_are_set_to_share_it():
    net = _made(lambda: nn.Sequential(*(Residual(nn.Linear(WIDTH, WIDTH)) for _ in range(9)), nn.Linear(WIDTH, 4)))
    net.insert(0, nn.Linear(WIDTH, WIDTH))
    for block in net[1:-1]:
        nn.init.normal_(block.layers[0].weight)
    treated = _treated(net, _batch(64, WIDTH))
    gains = [treated.after[f"{i}.layers.0"].gain for i in range(1, 10)]
    assert gains == pytest.approx([1 / 3] * 9, rel=0.05)


@pytest.mark.parametrize("max_off", [MAX_OFF, FAR])
@pytest.mark.parametrize(("depth", "std", "is_sick"), [(14, 1.0, True), (14, 0.5, False), (4, 1.0, False)])
def test_residual_branches_that_add_up_are_set_to_share_it(depth, std, is_sick, max_off):
    blocks = _made(lambda: [Residual(nn.Linear(WIDTH, WIDTH)) for _ in range(depth)])
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, 4))
    for block in blocks:
        nn.init.normal_(block.layers[0].weight, std=std / WIDTH**0.5)
    changed = _treated(net, _batch(64, WIDTH), max_off=max_off).changed
    ends = [f"{i}.layers.0" for i in range(1, depth + 1)]
    assert [name for name in changed if name in ends] == (ends if is_sick else [])


def test_branches_that_are_put_side_by_side_do_not_add_up():
    _assert_untouched(
        _made(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Split() for _ in range(8)))),
        _batch(64, WIDTH),
        max_off=FAR,
    )


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList(nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))
        for half in self.halves:
            nn.init.kaiming_normal_(half.weight)

    def forward(self, x):
        return torch.cat([half(x).relu() for half in self.halves], 1)


class Highway(nn.Module):
    """Gates that are mostly shut hold back what weights make."""

    def __init__(self, size):
        super().__init__()
        self.h, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for layer in (self.h, self.g):
            nn.init.normal_(layer.weight, std=size / WIDTH**0.5)
        nn.init.constant_(self.g.bias, -2.0)

    def forward(self, x):
        gate = self.g(x).sigmoid()
        return gate * self.h(x).relu() + (1 - gate) * x


@pytest.mark.parametrize(("depth", "size", "is_sick"), [(6, 3.3, True), (2, 3.3, False), (12, 1.5, False)])
@pytest.mark.parametrize("max_off", [MAX_OFF, FAR])
def test_weights_that_are_too_large_only_together_are_all_drawn(depth, size, is_sick, max_off):
    net = _made(
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Highway(size) for _ in range(depth)), nn.Linear(WIDTH, 4))
    )
    x = 0.3 * _batch(64, WIDTH)
    changed = _treated(net, x, max_off=max_off).changed
    layers = [f"{i}.{part}" for i in range(1, depth + 1) for part in "hg"]
    assert {name for name in changed if "." in name} == ({*layers} if is_sick else set())


# One of them alone


def _with(change, make=lambda: _stack(nn.Sigmoid, 8)):
    net = _made(make)
    change(net)
    before = _state(net)
    treated = _treated(net, _batch(64, WIDTH))
    changed = {name for name, value in net.state_dict().items() if not value.allclose(before[name], 0, 0, True)}
    assert {name.rpartition(".")[0] for name in changed} == set(treated.changed)
    return net, treated, changed


def test_what_is_said_to_be_drawn_is_what_has_changed():
    net, treated, changed = _with(lambda net: None)
    assert {f"{i}.weight" for i in range(2, 16, 2)} <= changed
    assert list(treated.changed) == [name for name in treated.before if name in treated.changed]
    assert treated.changed["4"] == [net[4].weight, net[4].bias]


def test_a_frozen_layer_is_left():
    _, _, changed = _with(lambda net: net[4].requires_grad_(False))
    assert not {"4.weight", "4.bias"} & changed
    assert "6.weight" in changed


def test_a_frozen_bias_is_left():
    _, _, changed = _with(lambda net: net[4].bias.requires_grad_(False))
    assert "4.bias" not in changed
    assert "4.weight" in changed


def test_tied_weights_are_left():
    def tie(net):
        net[4].weight = net[8].weight

    _, _, changed = _with(tie)
    assert not {"4.weight", "8.weight", "4.bias", "8.bias"} & changed
    assert "6.weight" in changed


def test_a_layer_that_is_called_in_a_loop_is_judged_by_all_of_its_calls():
    class Loop(nn.Module):
        def __init__(self, calls):
            super().__init__()
            self.first, self.again, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.calls = calls

        def forward(self, x):
            x = torch.tanh(self.first(x))
            for _ in range(self.calls):
                x = torch.tanh(self.again(x))
            return self.out(x)

    x = _batch(64, WIDTH)
    assert "again" not in _treated(_made(lambda: Loop(2)), x).changed
    treated = _treated(_made(lambda: Loop(12)), x)
    assert "again" in treated.changed
    assert treated.before["again"].gain < 0.7
    assert treated.after["again"].gain == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_weights_that_cannot_be_scaled_are_left(make):
    net = _made(lambda: _stack(nn.Sigmoid, 8))
    before = _state(make(net[4]))
    treated = _treated(net, _batch(64, WIDTH))
    assert "4" not in treated.changed
    assert "6" in treated.changed
    assert all(torch.equal(p, before[name]) for name, p in net[4].named_parameters())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("magnitude", [0.1, 10.0])
def test_the_magnitudes_of_weight_norm_are_set(norm, magnitude):
    net = _made(lambda: _stack(nn.LeakyReLU, 8))
    for layer in net[:-1:2]:
        norm(layer)
        g = layer.weight_g if hasattr(layer, "weight_g") else layer.parametrizations.weight.original0
        nn.init.constant_(g, magnitude)
    x = _batch(64, WIDTH)
    treated = _treated(net, x)
    assert abs(treated.spans[0]) > 4
    assert abs(treated.spans[1]) < 0.3
    assert {f"{i}" for i in range(0, 16, 2)} <= set(treated.changed)
    assert len(treated.changed["4"]) == 3  # the bias as well


def test_a_frozen_magnitude_is_left():
    def freeze(net):
        parametrizations.weight_norm(net[4]).parametrizations.weight.original0.requires_grad_(False)

    _, treated, _ = _with(freeze)
    assert "4" not in treated.changed


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_weights_are_drawn(value):
    net, treated, _ = _with(lambda net: nn.init.constant_(net[4].weight, value))
    assert len(net[4].weight.unique()) > WIDTH
    assert abs(treated.spans[1]) < 0.3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_layer_that_is_not_finite_is_drawn_and_the_others_are_judged_without_it(which, value):
    def spoil(net):
        with torch.no_grad():
            getattr(net[4], which)[0] = value

    net, treated, _ = _with(spoil)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert abs(treated.spans[1]) < 0.3
    _, treated, _ = _with(spoil, lambda: _he(_stack(nn.ReLU, 8)))
    assert list(treated.changed) == ["0", "4"]  # and the first, whose output He makes larger than 1


def test_layers_behind_something_else_that_is_not_finite_stay_finite():
    def spoil(net):
        net[4].requires_grad_(False)
        nn.init.constant_(net[4].bias, math.nan)

    net, *_ = _with(spoil)
    assert all(torch.isfinite(net[i].weight).all() for i in range(0, 17, 2))
    assert all(torch.isfinite(net[i].bias).all() for i in range(6, 17, 2))


def test_dead_units_come_back():
    """Biases of -8 before ReLUs: no gradient at all comes through."""

    def kill(net):
        for layer in net[:-1:2]:
            nn.init.constant_(layer.bias, -8.0)

    net, treated, _ = _with(kill, lambda: _he(_stack(nn.ReLU, 6)))
    assert treated.spans[0] == -math.inf
    assert abs(treated.spans[1]) < 0.3
    assert 0.3 < (net[:2](_batch(64, WIDTH)) > 0).float().mean() < 0.7


def test_one_layer_among_healthy_ones_is_drawn_alone():
    _, treated, _ = _with(
        lambda net: nn.init.normal_(net[4].weight, std=1e-3),
        lambda: _drawn_with(_stack(nn.Identity, 6), nn.init.orthogonal_),
    )
    assert list(treated.changed) == ["4"]


def test_inputs_that_are_always_zero_do_no_harm():
    net, x = _made(lambda: _stack(nn.Sigmoid, 8, draw=SMALL)), _batch(64, WIDTH)
    x[:, ::2] = 0
    before, after = _treated(net, x).spans
    assert before < -8
    assert abs(after) < 0.3
    net = _made(lambda: _stack(nn.Sigmoid, 8, draw=SMALL))
    _treated(net, torch.zeros(64, WIDTH))
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_far_is_what_no_usual_initialisation_gives():
    ours = _made(lambda: _stack(nn.ReLU, 20))
    _assert_untouched(ours, _batch(64, WIDTH), max_off=FAR)
    large = _made(lambda: _stack(nn.ReLU, 20, width=64, draw=LARGE))
    # the first one, whose spread is made up for, and the last one are as badly drawn
    assert list(_treated(large, _batch(64, 64), max_off=FAR).changed) == [str(i) for i in range(0, 41, 2)]
    one = _made(lambda: _stack(nn.ReLU, 20, width=64))
    nn.init.normal_(one[8].weight)
    assert list(_treated(one, _batch(64, 64), max_off=FAR).changed) == ["8"]


def test_centres_are_where_inputs_lie_that_are_farther_from_zero_than_they_spread():
    net, x = _made(lambda: _stack(nn.Sigmoid, 8)), _batch(64, WIDTH)
    treated = _treated(net, x)
    assert "4" in treated.centres
    assert "0" not in treated.centres
    inputs = net[:4](x).detach().double()
    torch.testing.assert_close(treated.centres["4"].mean, inputs.mean(0).float())
    around = (inputs - inputs.mean(0)).square().mean().sqrt().item()
    assert treated.centres["4"].spread == pytest.approx(around, rel=1e-3)


def test_an_output_layer_that_is_left_as_it_is_has_a_centre_too():
    net, x = _made(lambda: _stack(nn.Sigmoid, 8)), _batch(64, WIDTH)
    treated = _treated(net, x)
    last = list(treated.before)[-1]
    assert last not in treated.changed
    assert last in treated.centres


# How it is done


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    x = _batch(64, WIDTH)
    one, same, other = (_made(lambda: _stack(nn.Tanh, 8, draw=SMALL)) for _ in range(3))
    _treated(one, x, seed=1)
    torch.manual_seed(99)
    _treated(same, x, seed=1)
    _treated(other, x, seed=2)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.allclose(one[2].weight, other[2].weight)


def test_the_global_random_state_is_not_touched():
    net, x = _made(lambda: _stack(nn.Tanh, 8, draw=SMALL)), _batch(64, WIDTH)
    before = torch.get_rng_state()
    _treated(net, x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_holds_under_autocast(dtype):
    net, x = _made(lambda: _stack(nn.Sigmoid, 10)), _batch(64, WIDTH)

    def run():
        with torch.autocast("cpu", dtype):
            net(x)

    before, after = make_critical(net, run).spans
    assert before < -6
    assert abs(after) < 0.3
    assert net[2].weight.dtype == torch.float32


def test_it_holds_in_bfloat16():
    net, x = _made(lambda: _stack(nn.Sigmoid, 10)).bfloat16(), _batch(64, WIDTH).bfloat16()
    weight = net[2].weight
    before, after = _treated(net, x).spans
    assert before < -6
    assert abs(after) < 0.3
    assert net[2].weight is weight
    assert weight.dtype == torch.bfloat16


def test_it_needs_a_few_passes_and_one_where_there_is_nothing_to_do():
    calls = []
    for make in (lambda: _stack(nn.Sigmoid, 20), lambda: _he(_stack(nn.ReLU, 20, 64))):
        net = _made(make)
        x = _batch(64, net[0].in_features)
        passes = []
        make_critical(net, lambda net=net, x=x, passes=passes: passes.append(net(x)))
        calls.append(len(passes))
    assert 3 <= calls[0] <= 12
    assert calls[1] == 1


def test_a_model_without_layers_is_left():
    net = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    treated = _treated(net, torch.arange(4))
    assert treated.changed == {}
    assert all(math.isnan(span) for span in treated.spans)


def test_nothing_is_left_behind_after_an_error():
    net = _made(lambda: _stack(nn.Sigmoid, 8))
    passes = []

    def fail():
        net(_batch(64, WIDTH))
        passes.append(None)
        if len(passes) == 3:
            raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's"):
        make_critical(net, fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_what_is_measured_afterwards_is_what_is_measured_by_itself():
    net, x = _made(lambda: _stack(nn.Sigmoid, 8)), _batch(64, WIDTH)
    after = _treated(net, x, seed=5).after
    assert Gains(net, lambda: net(x), 5).measure() == pytest.approx(after)


class _Tied(nn.Module):
    """An embedding whose weights are those of the output layer too.

    Args:
        factor: times the usual size of these weights.
    """

    def __init__(self, factor):
        super().__init__()
        self.embed, self.hidden, self.back = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.out = nn.Linear(WIDTH, 40)
        nn.init.normal_(self.embed.weight, 0, factor / math.sqrt(WIDTH))
        nn.init.normal_(self.back.weight, 0, 2.0)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.back(torch.tanh(self.hidden(self.embed(x)))))


def _tokens():
    return torch.randint(40, (256,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [5.0, 10.0])
def test_before_a_tied_output_layer_that_is_too_large_the_signal_is_made_smaller(factor, seed):
    net = _made(lambda: _Tied(factor), seed)
    tied = net.out.weight.detach().clone()
    treated = _treated(net, _tokens())
    assert "back" in treated.changed
    assert torch.equal(net.out.weight, tied)
    assert treated.after["back"].gain == pytest.approx(1 / factor, rel=0.1)
    outputs = net(_tokens())
    assert outputs.std() < 3  # and not as large as the weights


def test_before_a_tied_output_layer_of_the_usual_size_it_keeps_its_size():
    net = _made(lambda: _Tied(1.0))
    assert _treated(net, _tokens()).after["back"].gain == pytest.approx(1.0, rel=0.1)


class Graphs(nn.Module):
    """Layers over nodes that are summed over all neighbours, or averaged."""

    def __init__(self, depth=5, *, divides=False, draw=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self._divides = divides
        if draw is not None:
            _drawn_with(self, draw)

    def forward(self, x):
        nodes = x.shape[1]
        joined = (torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(0)) < 0.7).float()
        joined = joined / joined.sum(-1, keepdim=True) if self._divides else joined
        for layer in self.layers:
            x = layer(joined @ x).relu()
        return self.head(x.mean(1))


def _graphs(seed=0):
    """Nodes that have something in common with those around them."""
    return _batch(32, 20, WIDTH, seed=seed) + _batch(32, 1, WIDTH, seed=seed + 1)


@pytest.mark.parametrize("depth", [3, 5, 10])
@pytest.mark.parametrize("divides", [False, True])
def test_what_neighbours_have_in_common_keeps_its_size_through_a_graph_network(divides, depth):
    net = _made(lambda: Graphs(depth, divides=divides, draw=None if not divides else SMALL))
    treated = _treated(net, _graphs())
    assert len(treated.changed) >= depth
    sizes = [treated.after[f"layers.{i}"].spread for i in range(1, depth - 1)]
    assert all(0.2 < size < 2 for size in sizes)
    assert net(_graphs()).std() < 8


def _positive(w):
    nn.init.uniform_(w, 0, 2)


def test_an_output_layer_that_was_drawn_as_badly_as_the_others_is_drawn_with_them():
    net = _made(lambda: _stack(nn.ReLU, 3, draw=_positive))
    treated = _treated(net, _batch(64, WIDTH).abs())
    assert "6" in treated.changed
    assert 0.3 < treated.after["6"].spread < 1.1
    before, after = treated.outputs
    assert (before > 1000, after) == (True, treated.after["6"].spread)


def test_and_left_where_the_others_are_healthy():
    net = _made(lambda: _he(_stack(nn.ReLU, 3)))
    nn.init.uniform_(net[-1].weight, 0, 1.5)
    treated = _treated(net, _batch(64, WIDTH))
    assert treated.changed == {}
    assert treated.outputs[0] == treated.outputs[1]


class Normed(nn.Module):
    """Residual branches behind norms, on a stream without one at its end."""

    def __init__(self, std, depth=4):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)
        if std is not None:
            _drawn_with(self, lambda w: nn.init.normal_(w, std=std))

    def forward(self, x):
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).relu())
        return self.head(x)


@pytest.mark.parametrize("std", [1.0, 3.0])
def test_branches_that_hide_each_other_behind_norms_are_all_drawn(std):
    net = _made(lambda: Normed(std))
    treated = _treated(net, _batch(64, WIDTH))
    assert {"head", *(f"{part}.{i}" for part in ("ups", "downs") for i in range(4))} <= {*treated.changed}
    assert net(_batch(64, WIDTH)).std() < 2
    assert all(treated.after[f"downs.{i}"].own_gain <= 1.05 for i in range(4))


def test_branches_of_the_usual_size_are_left():
    _assert_untouched(_made(lambda: Normed(None)), _batch(64, WIDTH))


@pytest.mark.parametrize(("size", "is_drawn"), [(0.02, True), (0.2, False), (5, False), (20, True)])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_weights_whose_size_a_norm_hides_are_drawn_where_others_are(norm, size, is_drawn):
    net, x = _made(lambda: _normed(norm, nn.ReLU, depth=4)), _batch(64, WIDTH)
    hidden = ["3", "6", "9"]
    for name in hidden:
        nn.init.normal_(net[int(name)].weight, std=size / math.sqrt(WIDTH))
    _assert_untouched(net, x)
    nn.init.normal_(net[-1].weight, std=20)
    treated = _treated(net, x)
    assert [name for name in hidden if name in treated.changed] == hidden * is_drawn
    assert all(treated.after[name].spread == pytest.approx(1, rel=0.1) for name in hidden * is_drawn)


@pytest.mark.parametrize(("low", "is_drawn"), [(0, True), (-0.2, True), (-0.8, False)])
def test_units_that_are_all_but_alike_are_drawn_where_others_are(low, is_drawn):
    net, x = _made(lambda: _normed(nn.LayerNorm, nn.ReLU, depth=4)), _batch(64, WIDTH)
    hidden = ["3", "6", "9"]
    for name in hidden:
        nn.init.uniform_(net[int(name)].weight, low * 3 / math.sqrt(WIDTH), 3 / math.sqrt(WIDTH))
    assert _drawn(_treated(copy.deepcopy(net), x), hidden) == hidden * is_drawn  # they are most
    for name in hidden[1:]:
        nn.init.normal_(net[int(name)].weight, std=1 / math.sqrt(WIDTH))
    assert _drawn(_treated(copy.deepcopy(net), x), hidden) == []
    nn.init.normal_(net[-1].weight, std=20)
    assert _drawn(_treated(net, x), hidden) == hidden[:1] * is_drawn


def test_filters_of_channels_of_their_own_may_be_the_same():
    """Rows of a depthwise convolution see different channels: equal ones are no symmetry."""
    net = nn.Sequential(nn.Conv1d(8, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH), nn.ReLU())
    net.append(nn.Conv1d(WIDTH, WIDTH, 1))
    nn.init.dirac_(net[1].weight, groups=WIDTH)
    nn.init.normal_(net[3].weight, std=20)
    treated = _treated(net, _batch(16, 8, 12))
    assert "3" in treated.changed
    assert "1" not in treated.changed


def _drawn(treated, names):
    return [name for name in names if name in treated.changed]


def test_ends_of_branches_that_were_made_small_are_left_where_others_are_drawn():
    net, x = _made(lambda: Normed(None)), _batch(64, WIDTH)
    for layer in net.downs:
        nn.init.normal_(layer.weight, std=1e-3)
    nn.init.normal_(net.head.weight, std=20)
    assert {*_treated(net, x).changed} == {"head"}


def test_weights_before_a_softmax_are_not_made_large_because_no_gradient_comes_through():
    net = _made(lambda: _drawn_with(Attending(), nn.init.normal_))
    treated = _treated(net, _batch(16, 10, WIDTH))
    assert {"q", "k"} <= {*treated.changed}
    assert all(treated.after[name].own_gain <= 1.05 for name in "qk")


class Attending(nn.Module):
    """Attention that is written out."""

    def __init__(self):
        super().__init__()
        self.first, self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.first(x)
        shares = (self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
        return self.head((x + self.o(shares @ self.v(x))).mean(1))


@pytest.mark.parametrize(("size", "is_drawn"), [(3.5, True), (1.9, False)])
def test_layers_none_of_which_is_off_by_far_are_drawn_where_together_they_make_outputs_that_are(size, is_drawn):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=size / 8)
    net, x = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), torch.randn(256, 64)
    before = float(net(x).detach().std())
    treated = make_critical(net, lambda: net(x))
    assert (before > 10) is is_drawn
    assert (set(treated.changed) == {"0", "2", "4"}) is is_drawn
    assert float(net(x).detach().std()) < (2 if is_drawn else 10)


class Gated(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.h, self.t, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        nn.init.constant_(self.t.bias, bias)

    def forward(self, x):
        gate = torch.sigmoid(self.t(x))
        return self.out(gate * torch.relu(self.h(x)) + (1 - gate) * x)


@pytest.mark.parametrize("is_shut", [True, False])
def test_a_gate_keeps_its_bias_unless_it_is_to_be_drawn_whatever_was_measured(is_shut):
    net, x = _made(lambda: Gated(-20.0)), _batch(64, WIDTH)
    treated = _treated(net, x, gates=() if is_shut else ("t",), always=("t",))
    assert "t" in treated.changed
    opening = torch.sigmoid(net.t(x)).mean().item()
    assert (abs(opening - 0.5) < 0.1) == is_shut
    assert bool((net.t.bias == -20).all()) != is_shut


class Halved(nn.Module):
    """One layer gives a content and the gate that it goes through, as gated linear units do."""

    def __init__(self, bias, depth=4):
        super().__init__()
        self.both = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(depth))
        self.out = nn.Linear(WIDTH, 2)
        for layer in self.both:
            nn.init.constant_(layer.bias, bias)

    def forward(self, x):
        for layer in self.both:
            content, gate = layer(x).chunk(2, -1)
            x = torch.tanh(content) * torch.sigmoid(gate)
        return self.out(x)


@pytest.mark.parametrize(("bias", "is_kept"), [(-4.0, False), (1.0, True)])
def test_a_bias_that_nothing_usual_comes_through_is_none_of_a_gate(bias, is_kept):
    net, x = _made(lambda: Halved(bias)), _batch(64, WIDTH)
    gates = [f"both.{i}" for i in range(4)]
    treated = _treated(net, x, gates=gates, always=gates)
    assert {*treated.changed} >= {*gates}
    assert all(bool((layer.bias == bias).all()) is is_kept for layer in net.both)
    assert all(size_of(layer) < 4 for layer in net.both)
    assert abs(treated.spans[1]) < 0.5


def test_what_is_to_be_drawn_whatever_was_measured_is_left_where_it_looks_trained():
    net, x = _made(lambda: Gated(-20.0)), _batch(64, WIDTH)
    net.t.weight.data += 5 * torch.outer(_batch(WIDTH), _batch(WIDTH, seed=1)) / WIDTH**0.5
    before = net.t.weight.clone()
    assert "t" not in _treated(net, x, always=("t", "nowhere")).changed
    assert torch.equal(net.t.weight, before)


class Neighbours(nn.Module):
    """Usual weights, and a sum over `neighbours` of 64 nodes behind each."""

    def __init__(self, neighbours):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 5)])
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("sums", (torch.rand(64, 64) < neighbours / 64).float())

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(self.sums @ layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize(("neighbours", "expected"), [(32, {"layers.0", "layers.1", "layers.2"}), (2, set())])
def test_usual_weights_that_make_large_outputs_by_sums_over_neighbours_are_drawn(neighbours, expected):
    torch.manual_seed(0)
    net, x = Neighbours(neighbours), 3 * torch.randn(64, 16)
    treated = make_critical(net, lambda: net(x))
    assert treated.changed.keys() == expected
    if expected:
        assert treated.outputs[0] > 10
        assert treated.outputs[1] == pytest.approx(1, rel=0.1)


class _Largest(nn.Module):
    """Convolutions with a maximum over many places at their end."""

    def __init__(self, activation):
        super().__init__()
        layers = [m for i in range(8) for m in (nn.Conv1d(16 if i else 1, 16, 3, padding=1), activation())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).amax(-1))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_weights_do_not_grow_where_larger_ones_let_less_through(activation):
    net = _drawn_with(_made(lambda: _Largest(activation)), lambda w: nn.init.normal_(w, std=0.02))
    x = _batch(32, 1, 128)
    treated = _treated(net, x)
    last = list(treated.after.values())[-2]
    assert 0.5 < last.spread < 2
    assert last.gain > 0.1


class Waves(nn.Module):
    """Sines of a frequency, with usual weights."""

    def __init__(self, frequency):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2 if i == 0 else 64, 64) for i in range(4)])
        self.last = nn.Linear(64, 1)
        self.frequency = frequency

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return self.last(x)


@pytest.mark.parametrize("frequency", [20, 60])
def test_behind_a_frequency_all_but_the_first_layer_are_drawn(frequency):
    net = _made(lambda: Waves(frequency))
    treated = _treated(net, _batch(256, 2))
    assert list(treated.changed) == ["layers.1", "layers.2", "layers.3"]
    assert treated.spans[0] > 2.5
    assert all(treated.after[name].gain == pytest.approx(1, abs=0.2) for name in treated.changed)


class Sines(nn.Module):
    def __init__(self, frequency):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)])
        self.frequency = frequency
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1e-4)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize(("frequency", "behind"), [(1.0, 1.0), (4.0, 4.0), (30.0, 8.0), (100.0, 8.0)])
def test_a_first_layer_is_as_large_as_what_multiplies_it_leaves_room_for(frequency, behind):
    net, x = _made(lambda: Sines(frequency)), _batch(256, 2)
    treated = _treated(net, x)
    assert set(treated.changed) == {"layers.0", "layers.1", "layers.2"}
    spread = float(net.layers[0](x).detach().std(0).square().mean().sqrt())
    # of a sine whose argument spreads that far the slope is a root of two smaller
    assert frequency * spread == pytest.approx(behind * (math.sqrt(2) if frequency > 8 else 1), rel=0.1)
    assert abs(treated.spans[1]) < 0.3
