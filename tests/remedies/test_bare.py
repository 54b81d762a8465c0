"""Matrices of modules of the user's own: how they are used, and that they are drawn as linear layers are."""

import contextlib
import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.findings import Finding, FindingKind, Severity, VanishingGradientWarning
from lightning_gradflow.history import History, Point
from lightning_gradflow.remedies.bare import Bare, initialise_bare, with_bare
from lightning_gradflow.remedies.critical import make_critical
from lightning_gradflow.remedies.gains import by_unit
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.training import RehearsalError, Training


class Own(nn.Module):
    """One bare matrix, used by a function that is given."""

    def __init__(self, shape, call):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        self.call = call

    def forward(self, x):
        return self.call(x, self.w)


def _x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


FORMS = {
    "matmul": ((3, 5), _x(8, 3), lambda x, w: x @ w),
    "transposed": ((5, 3), _x(8, 3), lambda x, w: x.matmul(w.T)),
    "left": ((5, 3), _x(3, 8), lambda x, w: w @ x),
    "left of a batch": ((5, 3), _x(2, 3, 8), torch.Tensor.__rmatmul__),
    "mm": ((3, 5), _x(8, 3), torch.mm),
    "linear": ((5, 3), _x(8, 2, 3), F.linear),
    "linear by keyword": ((5, 3), _x(8, 3), lambda x, w: F.linear(x, weight=w)),
    "addmm": ((3, 5), _x(8, 3), lambda x, w: torch.addmm(torch.ones(5), x, w)),
    "bmm": ((4, 3, 5), _x(4, 8, 3), torch.bmm),
    "repeated": ((3, 5), _x(4, 8, 3), lambda x, w: torch.bmm(x, w.expand(4, -1, -1))),
    "batch of matrices": ((4, 3, 5), _x(8, 3), lambda x, w: x @ w),
    "convolution": ((6, 2, 3), _x(8, 2, 9), F.conv1d),
    "grouped convolution": ((6, 2, 3, 3), _x(8, 4, 5, 5), lambda x, w: F.conv2d(x, w, None, 1, 0, 1, 2)),
    "experts": ((4, 3, 5), _x(8, 3), lambda x, w: torch.einsum("bi,eio->beo", x, w)),
    "own inputs of experts": ((4, 3, 5), _x(8, 4, 3), lambda x, w: torch.einsum("bei, eio -> beo", x, w)),
    "heads": ((3, 2, 5), _x(8, 7, 3), lambda x, w: torch.einsum("btd,dhk->bhtk", x, w)),
    "back from heads": ((2, 5, 3), _x(8, 2, 7, 5), lambda x, w: torch.einsum("bhtk,hkd->btd", [x, w])),
    "over neighbours": ((3, 5), _x(8, 4, 3), lambda x, w: torch.einsum("bvw,bwi,io->bvo", _x(8, 4, 4), x, w)),
    "weighted": ((3, 5), _x(8, 3), lambda x, w: torch.einsum("b,io,bi,b->bo", _x(8), w, x, _x(8))),
    "ellipsis": ((3, 5), _x(8, 7, 3), lambda x, w: torch.einsum("io,...i->...o", w, x)),
}


def _layer(net, forward):
    bare = Bare(net, forward)
    layers = bare.layers(net)
    (layer,) = layers.maps.values()
    return layers, layer


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_the_layer_is_what_one_unit_of_the_product_is_made_of(form):
    shape, x, call = FORMS[form]
    net = Own(shape, call)
    layers, layer = _layer(net, lambda: net(x))
    before = net(x)
    seen = []
    layers.routed(lambda: seen.append(net(x)))()
    assert torch.equal(seen[0], before)
    assert layer.weight.numel() == net.w.numel()
    assert layer.weight.detach().flatten().sort().values.equal(net.w.detach().flatten().sort().values)
    row = len(layer.weight) - 2
    with torch.no_grad():
        layer.weight[row] += 1
    layers.routed(lambda: None)()
    changed = (by_unit(layer, net(x)) - by_unit(layer, before)).abs().amax(0) > 1e-6
    assert changed.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(
    ("form", "inputs", "groups"),
    [
        ("left", 3, 1),
        ("repeated", 3, 1),
        ("batch of matrices", 3, 4),
        ("convolution", 6, 1),
        ("grouped convolution", 18, 2),
        ("experts", 3, 1),
        ("own inputs of experts", 3, 4),
        ("back from heads", 10, 1),
        ("over neighbours", 3, 1),
    ],
)
def test_inputs_are_what_is_summed_over_and_groups_have_inputs_of_their_own(form, inputs, groups):
    shape, x, call = FORMS[form]
    net = Own(shape, call)
    _, layer = _layer(net, lambda: net(x))
    assert (layer.weight[0].numel(), layer.groups) == (inputs, groups)


@pytest.mark.parametrize(
    ("shape", "x", "call"),
    [
        ((3, 5), _x(8, 3), lambda x, w: torch.einsum("bi,io,bo->b", x, w, torch.ones(8, 5))),
        ((3, 5), _x(8, 3), lambda x, w: torch.einsum("bi,io->b", x, w)),
        ((3, 3, 5), _x(8, 3), lambda x, w: torch.einsum("bi,bj,ijo->bo", x, x, w)),  # in both factors
        ((4, 3, 5), _x(8, 3), lambda x, w: torch.einsum("be,bi,eio->bo", _x(8, 4), x, w)),
        ((3, 5), _x(8, 4, 3), lambda x, w: torch.einsum("bvw,bwi,io->bvo", _x(8, 4, 4).requires_grad_(), x, w)),
        ((3, 3), _x(8, 3), lambda x, w: torch.einsum("bi,ii->b", x, w)),
        ((8, 3), _x(8, 3), lambda x, w: x * w),
        ((5, 3), _x(8, 3), lambda x, w: w @ w.T),
    ],
)
def test_what_is_no_linear_map_of_something_else_is_left_out(shape, x, call):
    net = Own(shape, call)
    assert Bare(net, lambda: net(x)).uses == ()


def test_a_stack_that_sums_over_neighbours_is_made_critical():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.ws = nn.ParameterList([torch.randn(32, 32) / 4 for _ in range(5)])
            self.out = nn.Linear(32, 2)

        def forward(self, x, near):
            for w in self.ws:
                x = F.relu(torch.einsum("bvw,bwi,io->bvo", near, x, w))
            return self.out(x.mean(1))

    net, x, near = Graph(), _x(16, 8, 32), (_x(16, 8, 8) > 0).float()
    bare = Bare(net, lambda: net(x, near))
    layers = bare.layers(net)
    treated = make_critical(layers, layers.routed(lambda: net(x, near)))
    assert [use.op for use in bare.uses] == ["relu"] * 5
    assert set(treated.changed) >= {"ws.0", "ws.1", "ws.2", "ws.3", "ws.4"}
    before, after = treated.spans
    assert before > 2
    assert abs(after) < 0.3


def test_layers_of_torch_and_frozen_or_shared_matrices_are_not_drawn():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.tied, self.table, self.parts = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
            self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)

        def forward(self, x):
            x = self.linear(x) @ self.tied @ self.tied.T + self.table[torch.tensor([0, 1])]
            return x @ self.frozen @ self.table.T @ self.parts[:, :2] @ self.parts[:2]

    net = Net()
    bare = Bare(net, lambda: net(_x(2, 4)))
    maps = bare.layers(net).maps
    assert [*maps] == ["tied", "tied[1]", "frozen", "table", "parts", "parts[1]"]
    assert not any(layer.weight.requires_grad for layer in maps.values())


def test_matrices_that_are_stacked_in_one_parameter_are_layers_of_their_own():
    net = Own((3, 4, 4), lambda x, w: x @ w[0] @ w[1] @ w[2])
    layers = Bare(net, lambda: net(_x(2, 4))).layers(net)
    assert [*layers.maps] == ["w", "w[1]", "w[2]"]
    with torch.no_grad():
        layers.maps["w[1]"].weight.zero_()
    assert layers.write() == ["w[1]"]
    assert [bool(part.any()) for part in net.w] == [True, False, True]


@pytest.mark.parametrize(
    ("call", "loops"),
    [
        (lambda x, w: torch.tanh(torch.tanh(x @ w) @ w), True),
        (lambda x, w: torch.tanh(x @ w) + torch.tanh(-x @ w), False),
    ],
    ids=["one after the other", "side by side"],
)
def test_a_loop_is_a_matrix_that_gets_its_own_output_back(call, loops):
    net = Own((4, 4), call)
    (use,) = Bare(net, lambda: net(_x(2, 4))).uses
    assert (use.loops, use.calls, use.op) == (loops, 2, "tanh")


# -- against layers of torch's


class OwnLayer(nn.Module):
    def __init__(self, linear, form):
        super().__init__()
        self.form = form
        weight = linear.weight.detach().clone()
        self.weight = nn.Parameter(weight if form == "linear" else weight.T.contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        if self.form == "linear":
            return F.linear(x, self.weight, self.bias)
        return torch.addmm(self.bias, x, self.weight) if self.form == "addmm" else x @ self.weight + self.bias


def _nets(form, activation=nn.Sigmoid, gain=1.0):
    """The same network of torch's layers and of the user's own."""
    torch.manual_seed(0)
    linears = [nn.Linear(20, 20) for _ in range(6)]
    for linear in linears:
        linear.weight.data *= gain
    theirs = [part for linear in linears for part in (linear, activation())]
    own = [part for linear in linears for part in (OwnLayer(linear, form), activation())]
    return nn.Sequential(*theirs, nn.Linear(20, 3)), nn.Sequential(*own, nn.Linear(20, 3))


def _training(net, x, optimizer=None, names=()):
    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    history = History()
    history.add_points([Point(name, name) for name in names])
    return Training(net, [] if optimizer is None else [optimizer], history, rehearse, seed=3)


SICK = Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 0, ("0",), "saturation")


@pytest.mark.parametrize("form", ["linear", "matmul", "addmm"])
@pytest.mark.parametrize(
    ("activation", "gain"), [(nn.Sigmoid, 1.0), (nn.ReLU, 0.01), (nn.Tanh, 30.0)], ids=["deep", "small", "large"]
)
def test_own_layers_are_drawn_as_those_of_torch_are(form, activation, gain):
    x = _x(64, 20)
    theirs, own = _nets(form, activation, gain)
    own[-1].load_state_dict(theirs[-1].state_dict())
    before = own[2].weight.detach().clone()
    done = [reinitialise(_training(net, x), SICK) for net in (theirs, own)]
    assert done[0].layers == done[1].layers
    assert not torch.equal(own[2].weight, before)
    for one, other in zip(theirs[:-1:2], own[:-1:2], strict=True):
        weight = other.weight if form == "linear" else other.weight.T
        torch.testing.assert_close(weight, one.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other.bias, one.bias, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_a_matrix_that_looks_trained_stays_as_it_is():
    _, own = _nets("matmul", nn.ReLU, 0.01)
    with torch.no_grad():
        own[4].weight += 0.1 * torch.outer(torch.linspace(-1, 1, 20), torch.linspace(1, 2, 20))
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    done = reinitialise(_training(own, _x(64, 20)), SICK)
    assert "2" in done.layers
    assert "4" not in done.layers
    assert torch.equal(own[4].weight, before["4.weight"])
    assert not torch.equal(own[2].weight, before["2.weight"])


def test_healthy_matrices_are_left_alone_and_nothing_is_left_behind():
    _, own = _nets("matmul", nn.Tanh, 1.7)
    state, modules = copy.deepcopy(own.state_dict()), [name for name, _ in own.named_modules()]
    assert reinitialise(_training(own, _x(64, 20)), SICK) is None
    assert all(torch.equal(state[name], value) for name, value in own.state_dict().items())
    assert [name for name, _ in own.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


def test_without_a_rehearsal_bare_matrices_are_drawn_by_glorot():
    _, own = _nets("matmul", nn.Tanh, 30.0)
    history = History()
    history.add_points(
        [p for i in range(6) for p in (Point(f"{2 * i}", f"{2 * i}"), Point(f"{2 * i + 1}", "", "tanh"))]
    )

    @contextlib.contextmanager
    def fails():
        raise RehearsalError("no batch")
        yield

    before = own[4].weight.detach().clone()
    saturated = Finding(FindingKind.SATURATED_ACTIVATION, Severity.WARNING, 0, ("0",), "weight_scale")
    done = reinitialise(Training(own, [], history, fails, seed=0), saturated)
    assert done.layers == ("0",)
    assert float(own[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / 40), rel=0.15)
    assert torch.equal(own[4].weight, before)


def test_matrices_of_zeros_and_layers_of_torch_are_not_drawn_by_the_book():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 4))

    assert initialise_bare(Zeros(), torch.Generator()) == []
    assert initialise_bare(nn.GRU(2, 2), torch.Generator()) == []


# -- recurrences


class StateSpace(nn.Module):
    def __init__(self, radius, op=None):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(16, 16) * radius / 4)
        self.b = nn.Linear(3, 16)
        self.op = op or (lambda h: h)

    def forward(self, u):
        h = torch.zeros(len(u), 16)
        for t in range(u.shape[1]):
            h = self.op(h @ self.a + self.b(u[:, t]))
        return h


IN_TIME = Finding(FindingKind.EXPLODING_GRADIENT, Severity.WARNING, 0, ("b",), "recurrence")


@pytest.mark.parametrize(("radius", "op"), [(2.0, None), (0.1, torch.tanh), (3.0, torch.tanh)])
def test_the_matrix_of_a_state_is_drawn_orthogonally_and_forgotten_by_the_optimizer(radius, op):
    net = StateSpace(radius, op)
    optimizer = torch.optim.Adam(net.parameters())
    net(_x(4, 12, 3)).sum().backward()
    optimizer.step()
    done = reinitialise(_training(net, _x(4, 12, 3), optimizer, ["b"]), IN_TIME)
    assert set(done.layers) == {"(root)", "b"}
    square = (net.a.T @ net.a).detach()
    gain = float(square.diagonal().mean())
    torch.testing.assert_close(square, gain * torch.eye(16), rtol=0, atol=1e-4)
    assert 1 - 1e-4 <= math.sqrt(gain) <= 1.15 + 1e-4
    assert net.a not in optimizer.state
    assert net.a.grad is None
    assert done.after["time_decades"] > -1


def test_a_state_that_only_grows_is_drawn_anew_whatever_the_finding_is_about():
    net = StateSpace(2.0)
    done = reinitialise(_training(net, _x(4, 20, 3)), SICK)
    assert done.layers == ("(root)",)
    torch.testing.assert_close(net.a.T @ net.a, torch.eye(16), rtol=0, atol=1e-4)


def test_a_state_with_small_weights_of_one_sign_is_drawn_anew_for_their_radius_is_large():
    net = StateSpace(1.0, torch.tanh)
    net.a.data = torch.rand(16, 16)
    assert net.a.square().mean().sqrt() * 4 < 4 < torch.linalg.eigvals(net.a.detach()).abs().max()
    done = reinitialise(_training(net, _x(4, 20, 3)), SICK)
    assert done.layers == ("(root)",)
    torch.testing.assert_close(net.a.T @ net.a, torch.eye(16), rtol=0, atol=1e-4)


def test_a_state_that_fades_as_it_may_stays():
    net = StateSpace(0.6)
    before = net.a.detach().clone()
    assert reinitialise(_training(net, _x(4, 20, 3)), SICK) is None
    assert torch.equal(net.a, before)


def test_a_run_without_bare_matrices_is_given_as_it_is():
    training = _training(nn.Linear(2, 2), _x(4, 2))
    with with_bare(training) as (same, uses):
        assert same is training
        assert uses == {}


# -- in a fit


class Fit(pl.LightningModule):
    def __init__(self, std):
        super().__init__()
        sizes = [8, 24, 24, 24, 3]
        self.w = nn.ParameterList([torch.randn(a, b) * (std or math.sqrt(2 / a)) for a, b in pairwise(sizes)])
        self.b = nn.ParameterList([torch.zeros(b) for b in sizes[1:]])

    def training_step(self, batch, _):
        x, y = batch
        for w, b in zip(self.w[:-1], self.b[:-1], strict=True):
            x = torch.relu(x @ w + b)
        return F.cross_entropy(x @ self.w[-1] + self.b[-1], y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _fit(std, *callbacks):
    torch.manual_seed(0)
    module = Fit(std)
    x = _x(512, 8)
    y = (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1)
    losses = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(float(outputs["loss"]))

    pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(), *callbacks],
    ).fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
    return losses


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_fit_of_bare_matrices_that_are_too_small_is_cured_and_one_that_is_well_is_not_touched():
    flow = GradFlow(every_n_steps=10, mitigate="apply", report=False, console=False)
    sick = _fit(0.003)
    with pytest.warns(VanishingGradientWarning):
        cured = _fit(0.003, flow)
    assert sick[-1] > 0.9 * sick[0]
    assert cured[-1] < 0.5 * cured[0]
    assert [action.kind for action in flow.actions][:1] == ["reinit"]
    watching = GradFlow(every_n_steps=10, mitigate="apply", report=False, console=False)
    assert _fit(None) == _fit(None, watching)
    assert not watching.actions
