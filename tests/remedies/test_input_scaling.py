"""Inputs that are scaled inside the first layer: the run is the one on standardised inputs."""

import contextlib
import copy
import json
import os
import warnings
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.input_layers import around_mean, can_treat
from lightning_gradflow.remedies.input_scaling import InputScaling
from lightning_gradflow.remedies.input_statistics import RawInput, moments, standardising
from lightning_gradflow.remedies.training import Training
from tests.distributed.launcher import launch

UNITS = torch.tensor([1e3, 1.0, 1e-1], dtype=torch.float64)
OFFSETS = torch.tensor([-700.0, 5.0, 0.0], dtype=torch.float64)


def _data(*shape, at=-1, seed=0):
    """Three features of very different size along one dimension."""
    x = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * UNITS + OFFSETS
    return x.movedim(-1, at)


def _training(net, x, optimizers=None, history=None, averaged=lambda values: values):
    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    if optimizers is None:
        optimizers = [torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)]
    return Training(net, optimizers, history or History(), rehearse, averaged)


def _map_of(scaling, name):
    state = scaling.state_dict()["layers"][name]
    return state["scale"], state["shift"]


def _standardised(x, scale, shift, at=-1):
    return ((x.movedim(at, -1) - shift) / scale).movedim(-1, at)


def test_weights_that_look_trained_are_not_made_for_standardised_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    drawn, x = copy.deepcopy(net), 300 * torch.randn(32, 40, dtype=torch.float64)
    with torch.no_grad():  # a direction that stands out, as what was learnt does
        net[0].weight += torch.outer(torch.linspace(-1, 1, 64), torch.linspace(1, -1, 40)).double()
    assert InputScaling().start(_training(net, x)) is None
    assert InputScaling().start(_training(drawn, x)).layers == ("0",)


class Net(nn.Module):
    """A layer, something that is not linear, a readout."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.readout = nn.LazyLinear(1)

    def forward(self, x):
        out = self.first(x)
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, nn.utils.rnn.PackedSequence):
            out = out.data
        return self.readout(torch.tanh(out).flatten(1))


def _net(first, x, seed=0):
    torch.manual_seed(seed)
    net = Net(first()).double()
    with torch.no_grad():
        net(x)
    return net


def _steps(net, x, optimizer, scaling=None, steps=50, clip=None):
    """Descends on the squared distance from a target that moves."""
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = (net(x) - 1 - 0.1 * step).square().mean()
            loss.backward()
            if scaling is not None:
                scaling.before_step(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            return loss

        optimizer.step(closure)
        if scaling is not None:
            scaling.batch_end()


def _assert_same_run(scaled, plain):
    """The same outputs of all layers behind the first one come from the same weights, and so do the first one's."""
    torch.testing.assert_close(scaled, plain, atol=1e-10, rtol=1e-10)


# --- training is that on standardised inputs -------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum and decay": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adam with decay in the gradient": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001, momentum=0.5),
    "closure called again": partial(torch.optim.LBFGS, lr=0.1, max_iter=4),
}


def _compare(first, x, optimize, at=-1, clip=None, treat=None):
    """Trains with the remedy on x, and without it on standardised x; gives the outputs of both afterwards."""
    net = _net(first, x)
    twin = copy.deepcopy(net)
    optimizer = optimize(net.parameters())
    scaling = InputScaling()
    folded = scaling.start(_training(net, x, [optimizer]), ["first"])
    assert folded is not None
    scale, shift = _map_of(scaling, "first")
    inputs = treat(twin, scale, shift) if treat else _standardised(x, scale, shift, at)
    torch.testing.assert_close(net(x), twin(inputs), atol=1e-11, rtol=1e-11)  # the fresh layer on such inputs
    before = twin(inputs)
    _steps(net, x, optimizer, scaling, clip=clip)
    _steps(twin, inputs, optimize(twin.parameters()), clip=clip)
    assert (twin(inputs) - before).abs().max() > 0.05  # it did train
    _assert_same_run(net(x), twin(inputs))
    return net, twin, scale, shift


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_on_standardised_inputs(name):
    net, twin, scale, shift = _compare(lambda: nn.Linear(3, 4), _data(32), OPTIMIZERS[name])
    _assert_same_run(net.first.weight * scale, twin.first.weight)
    _assert_same_run(net.first.bias + net.first.weight @ shift, twin.first.bias)
    _assert_same_run(net.readout.weight, twin.readout.weight)


@pytest.mark.parametrize("name", ["momentum and decay", "adamw"])
def test_clipping_counts_norms_as_on_standardised_inputs(name):
    _compare(lambda: nn.Linear(3, 4), _data(32), OPTIMIZERS[name], clip=0.3)


SHAPES = {
    "linear on sequences": (lambda: nn.Linear(3, 4), _data(16, 5), -1),
    "without a bias": (lambda: nn.Linear(3, 4, bias=False), _data(16), -1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), _data(16, 6, at=1), 1),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2), _data(8, 6, 5, at=1), 1),
    "conv3d": (lambda: nn.Conv3d(3, 2, 2), _data(4, 4, 3, 3, at=1), 1),
    "grouped": (lambda: nn.Conv1d(3, 6, 2, groups=3), _data(16, 6, at=1), 1),
    "wrapped round": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), _data(16, 6, at=1), 1),
    "rnn": (lambda: nn.RNN(3, 4, batch_first=True), _data(16, 5), -1),
    "lstm of two layers, both ways": (
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        _data(16, 5),
        -1,
    ),
    "gru without a bias": (lambda: nn.GRU(3, 4, batch_first=True, bias=False), _data(16, 5), -1),
    "gru": (lambda: nn.GRU(3, 4, batch_first=True), _data(16, 5), -1),
    "rnn cell": (lambda: nn.RNNCell(3, 4), _data(16), -1),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), _data(16), -1),
    "gru cell": (lambda: nn.GRUCell(3, 4), _data(16), -1),
}


@pytest.mark.parametrize(("first", "x", "at"), SHAPES.values(), ids=SHAPES)
def test_every_kind_of_layer_trains_as_on_standardised_inputs(first, x, at):
    _compare(first, x, OPTIMIZERS["adamw"], at)


def test_a_packed_sequence_is_scaled_as_well():
    packed = pack_padded_sequence(_data(6, 5), torch.tensor([5, 5, 4, 3, 2, 2]), batch_first=True)
    _compare(
        lambda: nn.GRU(3, 4, batch_first=True),
        packed,
        OPTIMIZERS["adam"],
        treat=lambda twin, scale, shift: packed._replace(data=_standardised(packed.data, scale, shift)),
    )


def test_a_border_of_zeros_is_that_of_the_raw_inputs_and_never_far_off():
    """The run is that on raw inputs padded with 0 and then standardised; so the border has to look like an input."""
    x = _data(16, 6, at=1)
    x[:, 1] = 1000 + torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

    def treat(twin, scale, shift):
        twin.first.padding = (0,)
        return _standardised(F.pad(x, (1, 1)), scale, shift, 1)

    *_, scale, shift = _compare(lambda: nn.Conv1d(3, 4, 3, padding=1), x, OPTIMIZERS["adam"], treat=treat)
    assert shift[1] == pytest.approx(1000, abs=1)
    assert ((shift / scale).abs() <= 3 * 2**0.5).all()


# --- in a Trainer ----------------------------------------------------------------------------------------------------


class Task(L.LightningModule):
    """Standardises its inputs by what it is told, or not at all."""

    def __init__(self, optimize=OPTIMIZERS["adam"], manual=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.optimize = optimize
        self.automatic_optimization = not manual
        self.map = None
        self.outputs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.map is not None:
            x = _standardised(x, *self.map).to(x.dtype)
        loss = (self.net(x) - y).square().mean()
        self.outputs.append(loss.item())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        for _ in range(2):  # two steps in one batch
            optimizer.zero_grad()
            self.manual_backward((self.net(x) - y).square().mean())
            optimizer.step()
        return None

    def configure_optimizers(self):
        return self.optimize(self.parameters())


class Holds(L.Callback):
    """Starts the remedy before the first batch and holds it."""

    def __init__(self):
        self.scaling = InputScaling()
        self.state = None

    def on_train_start(self, trainer, pl_module):
        if self.state is not None:
            self.scaling.load_state_dict(self.state)
            self.scaling.attach(pl_module)
            return
        twin = copy.deepcopy(pl_module.net)
        training = _training(pl_module, None, trainer.optimizers)

        @contextlib.contextmanager
        def rehearse():
            model = nn.Module()
            model.net = twin
            yield model, lambda: twin(_table()[0].to(next(twin.parameters()).dtype))

        self.scaling.start(Training(pl_module, training.optimizers, training.history, rehearse))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.scaling.before_step(optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scaling.batch_end()

    def on_exception(self, trainer, pl_module, exception):
        self.scaling.release()

    def state_dict(self):
        return self.scaling.state_dict()

    def load_state_dict(self, state):
        self.state = state


def _table():
    x = _data(64)
    return x, (x[:, :1] - OFFSETS[0]) / UNITS[0]


def _loader(dtype=torch.float64):
    return DataLoader(TensorDataset(*(t.to(dtype) for t in _table())), 8)


def _fit(task, *callbacks, ckpt_path=None, **kwargs):
    from tests.benchmarks.zoo.case import quiet_trainer  # the ranks below do without the zoo

    trainer = quiet_trainer(**{"max_epochs": 4, "callbacks": list(callbacks), **kwargs})
    trainer.fit(task, _loader(next(task.parameters()).dtype), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("manual", "kwargs"),
    [
        (False, {}),
        (False, {"accumulate_grad_batches": 3}),
        (False, {"gradient_clip_val": 0.1}),
        (False, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (True, {}),
    ],
)
def test_a_run_of_a_trainer_is_that_on_standardised_inputs(manual, kwargs):
    task, twin, holds = Task(manual=manual), Task(manual=manual), Holds()
    _fit(task, holds, **kwargs)
    twin.map = _map_of(holds.scaling, "net.0")
    _fit(twin, **kwargs)
    assert task.outputs == pytest.approx(twin.outputs, rel=1e-9)
    assert task.outputs[-1] < 0.6 * task.outputs[0]


class Overflows(L.Callback):
    """Two batches give an infinite gradient, so that the scaler skips their steps."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in (2, 9):
            pl_module.net[2].weight.grad.fill_(torch.inf)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("manual", [False, True])
def test_steps_that_a_scaler_skips_leave_the_weights_for_raw_inputs(fused, manual):
    optimize = partial(torch.optim.AdamW, lr=0.01, fused=fused)

    def fit(task, *callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # 1024 times a raw input is inf
        _fit(task, Overflows(), *callbacks, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))

    make = partial(Task, optimize, manual, torch.float32)
    task, twin, holds = make(), make(), Holds()
    fit(task, holds)
    twin.map = _map_of(holds.scaling, "net.0")
    fit(twin)
    # float16 rounds x and (x - m) / s differently: a thousandth
    assert task.outputs == pytest.approx(twin.outputs, rel=0.03, abs=0.003)
    assert task.outputs[-1] < 0.8 * task.outputs[0]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    path = str(tmp_path / "half.ckpt")
    whole, first, second, holds = Task(), Task(), Task(), Holds()
    _fit(whole, Holds())
    _fit(first, Holds(), max_epochs=2).save_checkpoint(path)
    _fit(second, holds, ckpt_path=path)
    assert holds.state is not None
    assert first.outputs + second.outputs == pytest.approx(whole.outputs, rel=1e-12)


def test_a_checkpoint_needs_nothing_to_infer_from():
    task, holds = Task(), Holds()
    _fit(task, holds)
    x, y = _table()
    assert (task.net(x) - y).square().mean() < 0.6


def test_an_error_in_the_middle_of_a_step_leaves_the_weights_for_raw_inputs():
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            raise ZeroDivisionError

    task, holds = Task(partial(Breaks, lr=0.1)), Holds()
    with pytest.raises(ZeroDivisionError):
        _fit(task, holds)
    with torch.no_grad():
        scale, shift = _map_of(holds.scaling, "net.0")
        fresh = Task().net
        x = _table()[0]
        torch.testing.assert_close(task.net(x), fresh(_standardised(x, scale, shift)), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["sigmoid_wine_raw", "relu_wine_one_column_sgd"])
def test_a_training_on_raw_columns_ends_where_that_on_standardised_ones_does(name):
    from tests.benchmarks.zoo import SICK

    case = SICK[name]

    class Losses(L.Callback):
        def __init__(self):
            self.kept = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.kept.append(outputs["loss"].item())

        @property
        def last(self):
            return float(np.mean(self.kept[-20:]))

    class Cures(Holds):
        def on_train_start(self, trainer, pl_module):
            self.initial = copy.deepcopy([pl_module.state_dict(), trainer.optimizers[0].state_dict()])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.global_step == 1:
                pl_module.load_state_dict(self.initial[0])
                trainer.optimizers[0].load_state_dict(self.initial[1])
                training = _training(pl_module, batch[0], trainer.optimizers)
                assert self.scaling.start(training) is not None

    sick, cured, twin = Losses(), Losses(), Losses()
    case.fit(0, callbacks=[sick])
    case.fit(0, callbacks=[cured, Cures()])
    case.without_fault.fit(0, callbacks=[twin])
    assert cured.last < 1.1 * twin.last
    assert cured.last < 0.2 * sick.last


# --- which layers ----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches on parts of one input, one on an input that is normalised first, and a teacher."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.tame = nn.Linear(2, 4), nn.Linear(1, 4), nn.Linear(3, 4)
        self.deep = nn.Linear(12, 4)
        self.teacher = nn.Linear(3, 4)

    def forward(self, x):
        with torch.no_grad():
            self.teacher(x)
        normalised = (x - x.mean(0)) / x.std(0)
        return self.deep(torch.cat([self.left(x[:, :2]), self.right(x[:, :1]), self.tame(normalised)], 1) * 1e3)


def test_all_layers_that_take_the_raw_input_are_treated_and_no_others():
    scaling = InputScaling()
    folded = scaling.start(_training(Branches().double(), _data(32)))
    assert folded.layers == scaling.layers == ("left", "right")


def test_only_layers_that_were_named_are_treated():
    assert InputScaling().start(_training(Branches().double(), _data(32)), ["right", "deep"]).layers == ("right",)


def test_a_layer_that_also_takes_what_others_made_is_no_first_layer():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert InputScaling().start(_training(Again().double(), _data(32))) is None


class Table(nn.Module):
    """Embeddings beside raw numbers."""

    def __init__(self, scale=None, shift=None):
        super().__init__()
        self.lookup = nn.Embedding(7, 4)
        self.first = nn.Linear(7, 16)
        self.head = nn.Linear(16, 1)
        self.scale, self.shift = scale, shift

    def forward(self, numbers):
        if self.scale is not None:
            numbers = (numbers - self.shift) / self.scale
        keys = torch.arange(len(numbers)) % 7
        return self.head(torch.tanh(self.first(torch.cat([self.lookup(keys), numbers], 1))))


@pytest.mark.parametrize("name", ["momentum and decay", "adamw"])
def test_raw_columns_beside_embeddings_train_as_standardised_ones(name):
    torch.manual_seed(0)
    net, x = Table().double(), _data(64)
    twin = copy.deepcopy(net)
    optimizer, scaling = OPTIMIZERS[name](net.parameters()), InputScaling()
    assert scaling.start(_training(net, x, [optimizer])).layers == ("first",)
    scale, shift = _map_of(scaling, "first")
    assert scale[:4].tolist() == [1.0] * 4
    assert shift[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(scale[4:], x.std(0), rtol=0.5, atol=0.0)
    twin.scale, twin.shift = scale[4:], shift[4:]
    torch.testing.assert_close(net(x), twin(x), atol=1e-11, rtol=1e-11)
    before = twin.lookup.weight.clone()
    _steps(net, x, optimizer, scaling)
    _steps(twin, x, OPTIMIZERS[name](twin.parameters()))
    assert (twin.lookup.weight - before).abs().max() > 0.01  # it did train
    _assert_same_run(net(x), twin(x))
    torch.testing.assert_close(net.lookup.weight, twin.lookup.weight, atol=1e-10, rtol=1e-10)


def test_a_layer_whose_weights_were_made_for_such_inputs_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 4)).double()
    with torch.no_grad():
        net[0].weight /= UNITS
        net[0].bias -= net[0].weight @ OFFSETS
    before = net[0].weight.clone()
    assert InputScaling().start(_training(net, _data(32))) is None
    assert torch.equal(net[0].weight, before)


def test_weights_that_are_too_large_for_scaled_inputs_are_no_matter_of_inputs():
    net = nn.Sequential(nn.Linear(3, 4)).double()
    with torch.no_grad():
        net[0].weight *= 1000
    assert InputScaling().start(_training(net, (_data(32) - OFFSETS) / UNITS)) is None


def test_without_a_rehearsal_nothing_is_done():
    net = nn.Sequential(nn.Linear(3, 4))
    assert InputScaling().start(Training(net, [torch.optim.SGD(net.parameters())], History())) is None


def test_an_input_given_by_name_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(input=x)

    folded = InputScaling().start(_training(Named().double(), _data(32)))
    assert folded.after["preactivation_rms"] < 2


SMALL = {
    "tiny": (1e-4, 0.0),
    "far off": (0.01, 5.0),
}
FIRSTS = {
    "linear": (lambda: nn.Linear(3, 4), (32,), -1),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (8, 6, 6), 1),
    "gru": (lambda: nn.GRU(3, 4, batch_first=True), (8, 5), -1),
    "both ways": (lambda: nn.LSTM(3, 4, batch_first=True, bidirectional=True), (8, 5), -1),
}


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("name", FIRSTS)
def test_training_on_inputs_that_hardly_differ_is_that_on_standardised_ones(name, size):
    first, shape, at = FIRSTS[name]
    deviation, mean = SMALL[size]
    x = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * deviation + mean
    _, _, scale, shift = _compare(first, x.movedim(-1, at), OPTIMIZERS["adam"], at)
    assert (scale / deviation).log2().abs().max() < 1  # the sample's, rounded to a power of two
    torch.testing.assert_close(shift.double(), torch.full((3,), mean).double(), rtol=0.01, atol=3 * deviation)


@pytest.mark.parametrize(
    ("deviation", "mean"), [(1.0, 0.0), (0.3, 0.5), (0.009, 0.0), (1.0, 9.0)], ids=["usual", "pixels", "small", "off"]
)
def test_inputs_that_differ_enough_are_left_alone(deviation, mean):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * deviation + mean
    assert InputScaling().start(_training(nn.Sequential(nn.Linear(3, 4)).double(), x)) is None


def test_inputs_that_do_not_differ_at_all_are_left_alone():
    x = torch.full((64, 3), 0.5, dtype=torch.float64)
    assert InputScaling().start(_training(nn.Sequential(nn.Linear(3, 4)).double(), x)) is None


def test_a_layer_is_folded_once():
    net, x = nn.Sequential(nn.Linear(3, 4)).double(), _data(32)
    scaling = InputScaling()
    scaling.start(_training(net, x))
    with torch.no_grad():
        net[0].weight *= 100  # too large once more, but not for the inputs
    assert scaling.start(_training(net, x)) is None


def test_the_numbers_are_sizes_of_inputs_and_preactivations():
    net, x = nn.Sequential(nn.Linear(3, 400)).double(), _data(64)
    before = net(x).square().mean().sqrt().item()
    folded = InputScaling().start(_training(net, x))
    assert folded.before["input_rms"] == pytest.approx(x[:, 0].square().mean().sqrt().item())
    assert folded.before["preactivation_rms"] == pytest.approx(before)
    assert folded.after["preactivation_rms"] == pytest.approx(net(x).square().mean().sqrt().item())


@pytest.mark.parametrize("module", [nn.LSTM(3, 400, batch_first=True), nn.GRUCell(3, 400)])
def test_a_recurrence_is_judged_by_its_preactivations(module):
    net, x = nn.Sequential(copy.deepcopy(module)).double(), _data(64, 1) if isinstance(module, nn.LSTM) else _data(64)
    first = dict(net.named_parameters())
    weight, bias = (next(p for name, p in first.items() if f"{kind}_ih" in name) for kind in ("weight", "bias"))
    before = F.linear(x, weight, bias).square().mean().sqrt().item()
    folded = InputScaling().start(_training(net, x))
    assert folded.before["preactivation_rms"] == pytest.approx(before)
    assert folded.after["preactivation_rms"] == pytest.approx(F.linear(x, weight, bias).square().mean().sqrt().item())


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x.log1p())


def _frozen():
    layer = nn.Linear(3, 4)
    layer.weight.requires_grad_(False)
    return layer


REFUSED = {
    "another kind": lambda: nn.Embedding(3, 4),
    "a forward of its own": lambda: OwnForward(3, 4),
    "frozen": _frozen,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_treated_is_refused(make):
    assert not can_treat(_training(nn.Sequential(make()), None), "0")


def test_a_tied_weight_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert not can_treat(_training(net, None), "0")


def test_a_weight_that_no_optimizer_holds_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    training = _training(net, None, [torch.optim.SGD(net[1].parameters())])
    assert [can_treat(training, name) for name in "01"] == [False, True]


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_bias_that_does_not_move_with_its_weight_takes_no_shift(is_frozen):
    net, x = nn.Sequential(nn.Linear(3, 4)).double(), _data(32)
    net[0].bias.requires_grad_(not is_frozen)
    before = net[0].bias.clone()
    optimizers = [torch.optim.SGD([net[0].weight], lr=0.1)]
    if not is_frozen:
        optimizers.append(torch.optim.SGD([net[0].bias], lr=0.1))
    scaling = InputScaling()
    scaling.start(_training(net, x, optimizers))
    scale, shift = _map_of(scaling, "0")
    assert not shift.any()
    ratio = scale / x.square().mean(0).sqrt()
    assert ((ratio > 0.7) & (ratio < 1.42)).all()
    assert torch.equal(net[0].bias, before)


# --- statistics ------------------------------------------------------------------------------------------------------


def _standardising(x):
    layer = nn.Linear(x.shape[1], 1, dtype=x.dtype)
    with contextlib.ExitStack() as stack:
        raw = RawInput(layer)
        raw.watch(stack)
        layer(x)
    return standardising(moments({"": raw}, lambda values: values)[""], shiftable=True, padded=False)


def test_scales_are_standard_deviations_rounded_to_powers_of_two():
    x = _data(4096).float()
    scale, shift = _standardising(x)
    assert scale.tolist() == [1024.0, 1.0, 0.125]
    torch.testing.assert_close(shift, x.double().mean(0), atol=1e-12, rtol=1e-12)


def test_nan_and_inf_are_left_out():
    x = _data(64)
    scale, shift = _standardising(x)
    rows = torch.full((2, 3), torch.nan, dtype=torch.float64)
    rows[1] = torch.inf
    with_gaps = _standardising(torch.cat([x, rows]))
    assert torch.equal(with_gaps[0], scale)
    assert torch.equal(with_gaps[1], shift)


def test_a_column_that_is_not_known_from_the_batch_gets_no_small_scale():
    x = _data(32)
    x[:, 0] = 0.0  # nearly always 0, perhaps
    x[:, 2] = 0.0
    x[3, 2] = 5e-3  # one sample
    scale, shift = _standardising(x)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert shift[0] == shift[2] == 0.0


def test_a_constant_column_is_scaled_by_its_size():
    x = _data(32)
    x[:, 1] = 4e6
    scale, shift = _standardising(x)
    assert scale[1] == 2**22
    assert shift[1] == 0.0


def test_a_spread_that_is_lost_in_rounding_is_not_blown_up():
    x = 1000 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    assert _standardising(x)[0].tolist() == [1.0]
    with torch.autocast("cpu", torch.bfloat16):
        assert _standardising(x)[0].tolist() == [1024.0]


def test_a_single_sample_has_no_spread():
    scale, shift = _standardising(_data(1))
    assert (scale >= 512).all()
    assert not shift.any()


# --- optimizers, hooks, hosts ----------------------------------------------------------------------------------------


def test_the_state_of_treated_weights_is_removed_and_no_other():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), _data(32)
    optimizer = torch.optim.Adam(net.parameters())
    _steps(net, x, optimizer, steps=2)
    InputScaling().start(_training(net, x, [optimizer]))
    assert set(optimizer.state) == set(net[2].parameters())
    assert net[0].weight.grad is None


def test_between_steps_no_module_carries_a_hook_and_after_release_no_optimizer():
    net, x = nn.Sequential(nn.Linear(3, 4)).double(), _data(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaling = InputScaling()
    scaling.start(_training(net, x, [optimizer]))
    _steps(net, x, optimizer, scaling, steps=3)
    assert not net[0]._forward_pre_hooks
    assert len(optimizer._optimizer_step_post_hooks) == 1
    scaling.release()
    scaling.release()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("end", ["release", "batch_end"])
def test_a_step_that_never_came_leaves_weights_and_gradients_as_they_were(end):
    net, x = nn.Sequential(nn.Linear(3, 4)).double(), _data(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaling = InputScaling()
    scaling.start(_training(net, x, [optimizer]))
    net(x).square().mean().backward()
    before = [t.clone() for p in net.parameters() for t in (p.detach(), p.grad)]
    scaling.before_step(optimizer)
    assert not torch.equal(net[0].weight, before[0])
    getattr(scaling, end)()
    assert not net[0]._forward_pre_hooks
    after = [t for p in net.parameters() for t in (p.detach(), p.grad)]
    torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


def test_after_release_the_next_step_goes_on():
    x = _data(32)
    nets = [_net(lambda: nn.Linear(3, 4), x) for _ in range(2)]
    for net, is_released in zip(nets, (True, False), strict=True):
        optimizer, scaling = torch.optim.Adam(net.parameters(), lr=0.01), InputScaling()
        scaling.start(_training(net, x, [optimizer]), ["first"])
        _steps(net, x, optimizer, scaling, steps=5)
        if is_released:
            scaling.release()
        _steps(net, x, optimizer, scaling, steps=5)
    assert torch.equal(nets[0](x), nets[1](x))


def test_another_optimizer_does_not_touch_the_layer():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double(), _data(32)
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    scaling = InputScaling()
    scaling.start(_training(net, x, [first, second]))
    net(x).square().mean().backward()
    before = net[0].weight.clone()
    scaling.before_step(second)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_thousand_steps_of_nothing_change_no_weight(dtype):
    net = nn.Sequential(nn.Linear(3, 4, bias=False)).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scaling = InputScaling()
    scaling.start(_training(net, _data(32).to(dtype), [optimizer]))
    before = net[0].weight.clone()
    for _ in range(1000):
        net[0].weight.grad = torch.ones_like(net[0].weight)
        scaling.before_step(optimizer)
        optimizer.step()
    assert scaling.layers
    assert torch.equal(net[0].weight, before)


class Synchronisations(TorchDispatchMode):
    """Operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "_to_copy")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_held_step_copies_nothing_to_the_host():
    net, x = nn.Sequential(nn.Linear(3, 4)), _data(32).float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaling = InputScaling()
    scaling.start(_training(net, x, [optimizer]))
    with Synchronisations() as seen:
        for step in range(3):
            net(x).square().mean().backward()
            if step == 1:
                seen.seen.clear()  # vectors go to the device once
            scaling.before_step(optimizer)
            optimizer.step()
            scaling.batch_end()
    assert seen.seen == []


def test_a_state_goes_through_a_checkpoint_of_weights_only(tmp_path):
    scaling = InputScaling()
    scaling.start(_training(nn.Sequential(nn.Linear(3, 4)).double(), _data(32)))
    torch.save(scaling.state_dict(), tmp_path / "state")
    again = InputScaling()
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.layers == ("0",)
    torch.testing.assert_close(_map_of(again, "0"), _map_of(scaling, "0"))


# --- inputs that jump ------------------------------------------------------------------------------------------------


def _history(x, factors):
    history = History()
    history.add_features(x.shape[1])
    for step, factor in enumerate(factors):
        history.append(Row(step, {"input_rms": (x * factor).square().mean(0).sqrt().numpy()}))
    return history


@pytest.mark.parametrize("factor", [1e4, torch.tensor([1e4, 1.0, 300.0], dtype=torch.float64)])
def test_inputs_that_jumped_are_brought_back_and_what_was_learnt_goes_on(factor):
    x = _data(32) / UNITS
    net = _net(lambda: nn.Linear(3, 4), x)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    _steps(net, x, optimizer, steps=20)
    twin = copy.deepcopy(net)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scaling = InputScaling()
    training = _training(net, x * factor, [optimizer], _history(x, [1, 1, 1, factor]))
    assert scaling.start(training, keep_function=True).layers == ("first",)
    torch.testing.assert_close(net(x * factor), twin(x), atol=1e-9, rtol=1e-9)
    _steps(net, x * factor, optimizer, scaling)
    _steps(twin, x, twin_optimizer)
    _assert_same_run(net(x * factor), twin(x))


def test_a_jump_after_a_fold_keeps_the_coordinates():
    x = _data(32)
    net = _net(lambda: nn.Linear(3, 4), x)
    optimizer, scaling = torch.optim.Adam(net.parameters(), lr=0.01), InputScaling()
    scaling.start(_training(net, x, [optimizer]), ["first"])
    _steps(net, x, optimizer, scaling, steps=20)
    twin, twin_optimizer, twin_scaling = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=0.01), InputScaling()
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_scaling.load_state_dict(scaling.state_dict())
    twin_scaling.attach(twin)
    training = _training(net, x * 1e3, [optimizer], _history(x, [1, 1, 1, 1e3]))
    assert scaling.start(training, ["first"], keep_function=True) is not None
    _steps(net, x * 1e3, optimizer, scaling)
    _steps(twin, x, twin_optimizer, twin_scaling)
    _assert_same_run(net(x * 1e3), twin(x))


def test_without_a_jump_no_function_is_kept():
    x = _data(32)
    training = _training(nn.Sequential(nn.Linear(3, 4)).double(), x, history=_history(x, [1, 1, 1, 1]))
    assert InputScaling().start(training, keep_function=True) is None


# --- rows over ranks -------------------------------------------------------------------------------------------------


def _rank():
    """One of two ranks: the net in rows, its own half of the batch."""
    warnings.simplefilter("ignore")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    rank, x = int(os.environ["RANK"]), _data(32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    twin = copy.deepcopy(net)
    own = x.split(16)[rank]
    probe = copy.deepcopy(net)
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def averaged(values):
        values = values.clone()
        dist.all_reduce(values)
        return values / 2

    @contextlib.contextmanager
    def rehearse():
        yield probe, lambda: probe(own)

    scaling = InputScaling()
    scaling.start(Training(net, [optimizer], History(), rehearse, averaged))
    scale, shift = _map_of(scaling, "0")
    _steps(net, own, optimizer, scaling, steps=20)
    _steps(twin, _standardised(x, scale, shift), torch.optim.Adam(twin.parameters(), lr=0.01), steps=20)
    output = net(own).detach()
    expected = twin(_standardised(own, scale, shift)).detach()
    whole = _standardising(x)
    cut = nn.Sequential(nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (2,))
    cut[0].weight = nn.Parameter(distribute_tensor(cut[0].weight.detach(), mesh, [Shard(1)]))
    treatable = [can_treat(_training(net, None, [optimizer]), "0"), can_treat(_training(cut, None), "0")]
    dist.destroy_process_group()
    same = torch.equal(scale, whole[0]) and torch.allclose(shift, whole[1], atol=1e-10)
    difference = (output - expected).abs().max().item()
    print(json.dumps([type(net[0].weight).__name__, treatable, same, difference, scale.tolist()]))


def test_layers_in_rows_over_two_ranks_train_as_one_on_standardised_inputs():
    """Five rows on two ranks are parts of three and two."""
    first, second = launch("tests.remedies.test_input_scaling")
    for kind, treatable, is_of_all, difference, _ in (first, second):
        assert kind == "DTensor"
        assert treatable == [True, False]  # rows, and columns
        assert is_of_all
        assert difference < 1e-10
    assert first[4] == second[4]


if __name__ == "__main__":
    _rank()


# --- inputs that lie far from 0 --------------------------------------------------------------------------------------


class Transformed(nn.Module):
    """A padded convolution whose weight is a trained one times a fixed matrix over the channels of its input."""

    def __init__(self, layer, matrix):
        super().__init__()
        self.groups, self.matrix = layer.groups, matrix
        self.trained = nn.Parameter(self._times(layer.weight.detach(), torch.linalg.inv(matrix)))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def _times(self, weight, matrix):
        parts = weight.movedim(1, -1).chunk(self.groups)
        return torch.cat([part @ matrix[group] for group, part in enumerate(parts)]).movedim(-1, 1)

    def forward(self, x):
        weight = self._times(self.trained, self.matrix)
        return nn.functional.conv1d(x, weight, self.bias, padding=1, groups=self.groups)


def _far_from_zero(groups):
    """A padded convolution, inputs far from 0, and 1/2 over the square root of their second moments, by group."""
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 4, 3, padding=1, groups=groups).double()
    mean, spread = torch.tensor([1.0, 2.0, -1.0, 0.5]), 0.25
    x = mean.double().view(1, 4, 1) + spread * torch.randn(16, 4, 6, dtype=torch.float64)
    roots = []
    for part in mean.double().chunk(groups):
        values, vectors = torch.linalg.eigh(spread**2 * torch.eye(len(part)) + torch.outer(part, part))
        roots.append(vectors @ torch.diag(spread * values.rsqrt() / 0.5) @ vectors.T)
    return layer, x, Centre(mean, spread), torch.stack(roots)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "closure called again"])
def test_a_layer_with_a_border_of_zeros_trains_as_if_its_inputs_were_alike_in_all_directions(name, groups):
    layer, x, centre, root = _far_from_zero(groups)
    net, twin = nn.Sequential(layer), nn.Sequential(Transformed(layer, root))
    optimizer, scaling = OPTIMIZERS[name](net.parameters()), InputScaling()
    before = net(x)
    assert scaling.hold(_training(net, x, [optimizer]), {"0": centre}) == ("0",)
    _steps(net, x, optimizer, scaling, clip=5.0)
    _steps(twin, x, OPTIMIZERS[name](twin.parameters()), clip=5.0)
    assert (net(x) - before).abs().max() > 0.05
    torch.testing.assert_close(net(x), twin(x), atol=1e-5, rtol=1e-5)  # the direction is kept in single precision


def test_what_a_bias_can_take_up_is_subtracted():
    net = nn.Sequential(nn.Linear(2, 3))
    scale, shift, along = around_mean(_training(net, None), net[0], Centre(torch.tensor([3.0, 4.0]), 0.0625))
    assert (scale.tolist(), shift.tolist(), along) == ([0.25, 0.25], [3.0, 4.0], None)


@pytest.mark.parametrize("make", [partial(nn.Linear, 2, 3, bias=False), partial(nn.Conv1d, 2, 3, 3, padding=1)])
def test_where_no_bias_can_take_the_mean_up_its_direction_is_made_smaller(make):
    net = nn.Sequential(make())
    scale, shift, along = around_mean(_training(net, None), net[0], Centre(torch.tensor([3.0, 4.0]), 1.0))
    left = torch.eye(2) - torch.outer(along, along)
    torch.testing.assert_close(left @ torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]) / 26**0.5)
    torch.testing.assert_close(left @ torch.tensor([4.0, -3.0]), torch.tensor([4.0, -3.0]))
    assert (scale.tolist(), shift.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_in_single_precision_a_thousand_steps_of_nothing_hardly_change_a_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(64, 8, 3, padding=1))
    optimizer, scaling = torch.optim.SGD(net.parameters(), lr=0.0), InputScaling()
    scaling.hold(_training(net, None, [optimizer]), {"0": Centre(torch.full((64,), 0.5), 1 / 16)})
    before = net[0].weight.detach().clone()
    for _ in range(1000):
        net[0].weight.grad, net[0].bias.grad = torch.ones_like(net[0].weight), torch.ones(8)
        scaling.before_step(optimizer)
        optimizer.step()
    sums = net[0].weight.detach().sum(1)  # along the mean, where rounding adds up
    torch.testing.assert_close(sums, before.sum(1), atol=1e-4, rtol=1e-4)


def test_in_half_precision_no_direction_is_made_smaller():
    net = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1)).bfloat16()
    assert InputScaling().hold(_training(net, None), {"0": Centre(torch.ones(2), 0.25)}) == ()


def test_a_direction_goes_through_a_checkpoint_and_copies_nothing_to_the_host(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1))
    optimizer, first, again = torch.optim.SGD(net.parameters(), lr=0.1), InputScaling(), InputScaling()
    first.hold(_training(net, None, [optimizer]), {"0": Centre(torch.ones(2), 0.25)})
    torch.save(first.state_dict(), tmp_path / "state")
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again.attach(net)
    gradient = torch.arange(12.0).view(2, 2, 3)
    ends, start = [], net[0].weight.detach().clone()
    for scaling in (first, again):
        with torch.no_grad():
            net[0].weight.copy_(start)
        for step in range(2):
            net[0].weight.grad, net[0].bias.grad = gradient.clone(), torch.ones(2)
            with Synchronisations() as seen:
                scaling.before_step(optimizer)
                optimizer.step()
            assert step == 0 or seen.seen == []  # vectors go to the device once
        scaling.release()
        ends.append(net[0].weight.detach().clone())
    assert torch.equal(*ends)
    assert not torch.allclose(ends[0], start - 0.2 * gradient, atol=0.1)
