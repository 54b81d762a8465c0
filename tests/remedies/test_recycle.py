"""Dead units that come back to life: which ones, how, and what stays as it was."""

import contextlib
import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.training import Training

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def _finding(*layers):
    return Finding(FindingKind.DEAD_UNITS, Severity.WARNING, step=60, layers=layers)


def _mlp(*widths, activation=nn.ReLU, norm=None):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), *([norm(outputs)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def _convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.MaxPool2d(2),  # before its activation
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


@torch.no_grad()
def _kill(layer, units=slice(None), bias=-20.0):
    layer.bias[units] = bias


def _batch(inputs, outputs=10, size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, inputs, generator=generator), torch.randint(outputs, (size,), generator=generator)


def _training(net, batch, optimizer=None, history=None, loss=F.cross_entropy, copies=True, **kwargs):
    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net) if copies else net

        def run():
            torch.manual_seed(0)
            loss(twin(batch[0]), batch[1])

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield twin, run

    optimizer = optimizer or torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    return Training(net, [optimizer], history or History(), rehearse, **kwargs)


def _weights(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def _is_as_it_was(net, before):
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- analytic ---------------------------------------------------------------------------------------------------------


def test_the_new_unit_is_centred_and_as_wide_as_the_median_of_the_living():
    net, batch = _mlp(16, 9, 10), _batch(16)
    _kill(net[0], slice(0, 4))
    recycle(_training(net, batch), _finding("1"))
    values = net[0](batch[0]).double()
    torch.testing.assert_close(values[:, :4].mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-5, rtol=0)
    usual = values[:, 4:].std(0, correction=0).median()
    torch.testing.assert_close(values[:, :4].std(0, correction=0), usual.expand(4), rtol=1e-4, atol=0)


def test_outgoing_weights_of_dead_units_are_zero_and_all_others_the_same():
    net, batch = _mlp(16, 9, 10), _batch(16)
    _kill(net[0], slice(0, 4))
    before = _weights(net)
    recycle(_training(net, batch), _finding("1"))
    assert not net[2].weight[:, :4].any()
    assert torch.equal(net[2].weight[:, 4:], before["2.weight"][:, 4:])
    assert torch.equal(net[2].bias, before["2.bias"])
    assert torch.equal(net[0].weight[4:], before["0.weight"][4:])
    assert torch.equal(net[0].bias[4:], before["0.bias"][4:])


def test_the_report_counts_units_of_the_treated_activations():
    net, batch = _mlp(16, 8, 8, 10), _batch(16)
    _kill(net[0], slice(0, 4))
    _kill(net[2], slice(0, 6))
    done = recycle(_training(net, batch), _finding("1", "3"))
    assert done.layers == ("0", "2")
    assert done.units == 10
    assert done.before == {"dead_fraction": 10 / 16}
    assert done.after["dead_fraction"] == 0
    assert done.after["output_change"] < 1e-5
    assert done.after["loss_change"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_size_of_the_loss_plays_no_part(factor):
    net, batch = _mlp(16, 8, 8, 10), _batch(16)
    _kill(net[0])
    recycle(_training(net, batch, loss=lambda *a: factor * F.cross_entropy(*a)), _finding("1"))
    other = _mlp(16, 8, 8, 10)
    _kill(other[0])
    recycle(_training(other, batch), _finding("1"))
    assert _is_as_it_was(net, other.state_dict())


# -- the function stays -----------------------------------------------------------------------------------------------


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.other = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x):
        hidden = torch.relu(self.body(x))
        return self.one(hidden) + torch.tanh(self.other(hidden))


class _Joined(nn.Module):
    """What comes from the units is behind what comes from elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 12), nn.Linear(28, 10)

    def forward(self, x):
        return self.head(torch.cat([x, F.relu(self.body(x))], 1))


class _Branch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(x + self.down(F.relu(self.up(x))))


MODELS = {
    "linear": (lambda: _mlp(16, 12, 10), "0", 16),
    "deep": (lambda: _mlp(16, 12, 14, 12, 10), "2", 16),
    "elu, whose dead side is -1": (lambda: _mlp(16, 12, 10, activation=nn.ELU), "0", 16),
    "gelu": (lambda: _mlp(16, 12, 10, activation=nn.GELU), "0", 16),
    "softplus": (lambda: _mlp(16, 12, 10, activation=nn.Softplus), "0", 16),
    "batch norm before": (lambda: _mlp(16, 12, 12, 10, norm=nn.BatchNorm1d), "1", 16),
    "layer norm before": (lambda: _mlp(16, 12, 12, 10, norm=nn.LayerNorm), "1", 16),
    "batch norm behind": (
        lambda: nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.BatchNorm1d(12), nn.Linear(12, 10)),
        "0",
        16,
    ),
    "convolution, pooled": (_convnet, "1", 64),
    "convolution, pooled, dropped out, flattened": (_convnet, "4", 64),
    "two heads": (_TwoHeads, "body", 16),
    "joined with others": (_Joined, "body", 16),
    "residual branch": (_Branch, "up", 16),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 4)),
            nn.ConvTranspose1d(4, 6, 2),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 3, 2),
            nn.Flatten(),
            nn.Linear(18, 10),
        ),
        "1",
        16,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_units_live_get_a_gradient_and_the_output_stays(name):
    make, layer, inputs = MODELS[name]
    torch.manual_seed(0)
    net, batch = make(), _batch(inputs)
    dead = 4
    _kill(net.get_submodule(layer), slice(0, dead), -40.0)

    def forward():
        torch.manual_seed(0)
        return net(batch[0])

    before = forward()
    done = recycle(_training(net, batch), _finding(layer))
    assert done.units == dead
    assert done.after["dead_fraction"] == 0
    torch.testing.assert_close(forward(), before, atol=2e-5, rtol=1e-4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):  # in the first step the way out gets its gradient, in the second the way in
        optimizer.zero_grad()
        F.cross_entropy(forward(), batch[1]).backward()
        optimizer.step()
    gradient = net.get_submodule(layer).weight.grad
    units = gradient.movedim(1, 0) if isinstance(net.get_submodule(layer), nn.ConvTranspose1d) else gradient
    assert (units[:dead].reshape(dead, -1).abs().amax(1) > 0).all()


def test_a_rehearsal_on_the_model_itself_comes_to_the_same():
    one, other, batch = _mlp(16, 12, 10), _mlp(16, 12, 10), _batch(16)
    for net, copies in ((one, True), (other, False)):
        _kill(net[0], slice(0, 4))
        assert recycle(_training(net, batch, copies=copies), _finding("1")) is not None
    assert _is_as_it_was(one, other.state_dict())


@pytest.mark.parametrize("passes", range(1, 7))
def test_an_error_in_the_middle_leaves_the_model_as_it_was(passes):
    net, batch, left = _mlp(16, 12, 12, 10), _batch(16), [passes]
    _kill(net[0], slice(0, 4))
    _kill(net[2], slice(0, 4))
    before = _weights(net)

    def loss(output, target):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        return F.cross_entropy(output, target)

    with pytest.raises(RuntimeError, match="out of memory"):
        recycle(_training(net, batch, loss=loss, copies=False), _finding("1", "3"))
    assert _is_as_it_was(net, before)


def test_the_optimizer_forgets_the_units_of_both_sides_alone():
    net, batch = _mlp(16, 12, 10), _batch(16)
    optimizer = torch.optim.Adam(net.parameters())
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in net.parameters()}
    _kill(net[0], slice(0, 4))
    recycle(_training(net, batch, optimizer), _finding("1"))
    after = {p: optimizer.state[p]["exp_avg"] for p in net.parameters()}
    incoming, bias, outgoing, last = net.parameters()
    assert not after[incoming][:4].any()
    assert not after[bias][:4].any()
    assert not after[outgoing][:, :4].any()
    assert torch.equal(after[incoming][4:], before[incoming][4:])
    assert torch.equal(after[outgoing][:, 4:], before[outgoing][:, 4:])
    assert torch.equal(after[last], before[last])
    assert all(p.grad is None for p in (incoming, bias, outgoing))


# -- where the way out is not known -----------------------------------------------------------------------------------


class _Penalty(nn.Module):
    """The loss sees the units too: there is no way out that could be cut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, x):
        hidden = F.relu(self.body(x))
        return self.head(hidden) + 0.01 * hidden.mean()


def test_where_something_else_takes_the_units_the_way_out_stays():
    net, batch = _Penalty(), _batch(16)
    _kill(net.body, slice(0, 4))
    before = _weights(net)
    done = recycle(_training(net, batch), _finding("body"))
    assert done.after["dead_fraction"] == 0
    assert torch.equal(net.head.weight, before["head.weight"])
    assert abs(done.after["loss_change"]) < 0.1
    values = net.body(batch[0])
    assert values[:, :4].std() < 0.4 * values[:, 4:].std()


class _Stream(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branch, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(F.relu(x + self.branch(x)))


def test_units_with_something_added_before_their_activation_are_left():
    net, batch = _Stream(), _batch(16)
    _kill(net.branch, slice(0, 12))
    before = _weights(net)
    assert recycle(_training(net, batch), _finding("branch")) is None
    assert _is_as_it_was(net, before)


# -- whole layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("struck", ["0", "2", "4"])
def test_a_wholly_dead_layer_passes_the_gradient_on_at_once(struck):
    net, batch = _mlp(16, 12, 12, 12, 10), _batch(16)
    _kill(net.get_submodule(struck))
    loss = F.cross_entropy(net(batch[0]), batch[1])
    done = recycle(_training(net, batch), _finding(struck))
    assert done.before == {"dead_fraction": 1}
    assert done.after["dead_fraction"] == 0
    after = F.cross_entropy(net(batch[0]), batch[1])
    assert done.after["loss_change"] == pytest.approx((after / loss - 1).item(), rel=1e-3, abs=1e-6)
    after.backward()
    assert net[0].weight.grad.any()


def test_where_the_rest_is_loud_the_units_come_back_quietly():
    net, batch = _mlp(16, 12, 12, 10), _batch(16)
    with torch.no_grad():
        net[4].weight *= 30
    _kill(net[0])
    done = recycle(_training(net, batch), _finding("1"))
    he = (2 / 16) ** 0.5
    assert net[0].weight.std().item() == pytest.approx(0.1 * he, rel=0.2)
    assert done.after["dead_fraction"] == 0


def test_units_behind_a_dead_layer_are_judged_when_it_lives_again():
    """A layer that gets nothing but zeros looks dead where its bias is below zero, and is well."""
    net, batch = _mlp(16, 12, 12, 10), _batch(16)
    _kill(net[0])
    _kill(net[2], bias=-1e-3)
    before = _weights(net)
    done = recycle(_training(net, batch), _finding("1", "3"))
    assert done.layers == ("0",)
    assert torch.equal(net[2].weight, before["2.weight"])


# -- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Sigmoid, nn.Tanh])
def test_a_healthy_network_is_left_as_it_is(activation):
    net, batch = _mlp(16, 32, 32, 10, activation=activation), _batch(16)
    before = _weights(net)
    assert recycle(_training(net, batch), _finding("1", "3")) is None
    assert recycle(_training(net, batch), _finding()) is None
    assert _is_as_it_was(net, before)


def test_a_leaky_rectifier_has_no_dead_units():
    net, batch = _mlp(16, 12, 10, activation=nn.LeakyReLU), _batch(16)
    _kill(net[0])
    assert recycle(_training(net, batch), _finding("1")) is None


def test_a_quiet_gelu_is_not_dead():
    """Just below zero its output is as near to zero as far below, and its slope is a half."""
    net, batch = _mlp(16, 12, 10, activation=nn.GELU), _batch(16)
    with torch.no_grad():
        net[0].weight *= 1e-3
        net[0].bias.fill_(-5e-3)
    assert recycle(_training(net, batch), _finding("1")) is None


def test_a_unit_that_is_silent_by_chance_is_left():
    """Two deviations below zero it fires for one input in forty, if not in this batch."""
    net, batch = _mlp(16, 12, 10), _batch(16, size=8)
    with torch.no_grad():
        values = net[0](batch[0])
        net[0].bias -= values.mean(0) + 2 * values.std(0, correction=0)
    net[0].bias.data[(net[0](batch[0]) > 0).any(0)] += 1  # the others fire
    assert ((net[0](batch[0]) <= 0).all(0)).any()
    assert recycle(_training(net, batch), _finding("1")) is None


def test_the_history_of_several_batches_settles_what_one_batch_cannot():
    net, batch = _mlp(16, 12, 10), _batch(16, size=8)
    with torch.no_grad():
        values = net[0](batch[0])
        net[0].bias[:5] -= (values.amax(0) + 0.01)[:5]
        silent = (net[0](batch[0]) <= 0).all(0)
    history = History()
    history.add_points([Point("1", "1", "relu")])
    history.append(Row(0, values={"dead_fraction": np.array([silent.double().mean().item()])}))
    assert recycle(_training(net, batch, history=history), _finding("1")).units == int(silent.sum())


def test_an_activation_that_the_finding_does_not_name_is_left():
    net, batch = _mlp(16, 12, 12, 10), _batch(16)
    _kill(net[0], slice(0, 8))
    _kill(net[2], slice(0, 8))
    assert recycle(_training(net, batch), _finding("3")).layers == ("2",)


def test_a_finding_without_known_layers_is_about_every_activation_that_is_half_dead():
    net, batch = _mlp(16, 12, 12, 10), _batch(16)
    _kill(net[0], slice(0, 8))
    _kill(net[2], slice(0, 2))
    assert recycle(_training(net, batch), _finding()).layers == ("0",)


@pytest.mark.parametrize("what", ["frozen", "tied", "parametrized", "not in the optimizer"])
def test_a_layer_that_is_not_ours_to_change_is_left(what):
    net, batch = _mlp(12, 12, 12, 10), _batch(12)
    optimizer = None
    if what == "frozen":
        net[0].requires_grad_(False)
    elif what == "tied":
        net[2].weight = net[0].weight
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(net[0])
    else:
        optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    _kill(net[0], slice(0, 8))
    before = _weights(net)
    assert recycle(_training(net, batch, optimizer), _finding("1")) is None
    assert _is_as_it_was(net, before)


def test_a_frozen_layer_behind_keeps_its_weights():
    net, batch = _mlp(16, 12, 10), _batch(16)
    net[2].requires_grad_(False)
    _kill(net[0], slice(0, 8))
    before = _weights(net)
    done = recycle(_training(net, batch), _finding("1"))
    assert done is None or abs(done.after["loss_change"]) <= 0.1
    assert torch.equal(net[2].weight, before["2.weight"])


def test_a_model_that_is_spread_over_ranks_is_left():
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, batch = _mlp(16, 12, 10), _batch(16)
        _kill(net[0], slice(0, 8))
        mesh = init_device_mesh("cpu", (1,))
        net[0].bias = nn.Parameter(distribute_tensor(net[0].bias.detach(), mesh, [Shard(0)]))
        assert recycle(_training(net, batch), _finding("1")) is None
    finally:
        dist.destroy_process_group()


class _Half(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_in_mixed_precision_units_come_back_too():
    net, batch = _Half(*_mlp(16, 12, 10)), _batch(16)
    _kill(net[0], slice(0, 4))
    before = net(batch[0])
    done = recycle(_training(net, batch), _finding("1"))
    assert done.units == 4
    assert done.after["dead_fraction"] == 0
    assert torch.equal(net(batch[0]), before)


def test_without_a_rehearsal_nothing_is_done():
    net = _mlp(16, 12, 10)
    training = Training(net, [torch.optim.SGD(net.parameters(), lr=0.1)], History())
    assert recycle(training, _finding("1")) is None


def test_the_global_generator_and_batch_norm_statistics_stay():
    net, batch = _mlp(16, 12, 10, norm=nn.BatchNorm1d), _batch(16)
    _kill(net[1], slice(0, 6))
    buffers = [buffer.clone() for buffer in net.buffers()]
    before = torch.get_rng_state()
    assert recycle(_training(net, batch), _finding("2")) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, buffers, net.buffers()))


def test_the_same_seed_gives_the_same_weights():
    nets = [_mlp(16, 12, 10) for _ in range(3)]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        _kill(net[0], slice(0, 6))
        recycle(_training(net, _batch(16), seed=seed), _finding("1"))
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


def test_a_unit_that_fires_on_another_rank_is_not_dead():
    """The mean over two ranks, of which the other one sees every unit fire."""
    net, batch = _mlp(16, 12, 10), _batch(16)
    _kill(net[0], slice(0, 6))
    training = _training(net, batch, averaged=lambda values: values / 2 + 0.5)
    assert recycle(training, _finding("1")) is None


# -- in a training ----------------------------------------------------------------------------------------------------


def _digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1, dtype=torch.float32), torch.tensor(y)


def _fit(net, optimize, strike, *, cure, named):
    x, y = _digits()
    optimizer, generator = optimize(net.parameters()), torch.Generator().manual_seed(0)
    losses, done = [], None
    for step in range(220):
        at = torch.randint(len(x), (32,), generator=generator)
        batch = x[at], y[at]
        if step == 60:
            strike(net)
        if step == 70 and cure:
            done = recycle(_training(net, batch, optimizer, seed=step), _finding(*named))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, done


STRIKES = {
    "most of a layer": (lambda: _mlp(64, 48, 40, 10), lambda net: _kill(net[2], slice(0, 38)), ("3",)),
    "a whole layer": (lambda: _mlp(64, 48, 40, 10), lambda net: _kill(net[2]), ("3",)),
    "most channels": (_convnet, lambda net: _kill(net[1], slice(0, 7)), ("2",)),
    "all channels": (_convnet, lambda net: _kill(net[4]), ("6",)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRIKES)
def test_a_training_goes_on_without_a_jump_and_ends_better_than_without(name, optimizer):
    make, strike, named = STRIKES[name]
    sick, _ = _fit(make(), OPTIMIZERS[optimizer], strike, cure=False, named=named)
    cured, done = _fit(make(), OPTIMIZERS[optimizer], strike, cure=True, named=named)
    assert done.after["dead_fraction"] == 0
    assert cured[70] <= 1.1 * sick[70] + 1e-6
    assert np.mean(cured[-20:]) < 0.8 * np.mean(sick[-20:])
