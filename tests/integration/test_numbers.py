"""The numbers of a real run against a naive reference: another copy of the model, the same weights, plain autograd."""

import copy
import math
from functools import cache, partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_gradflow import GradFlow, GradFlowWarning, SaturationMonitor
from tests.benchmarks.zoo import quiet_trainer
from tests.benchmarks.zoo.data import loader

STEPS, WINDOW = 5, 3
PER_LAYER = ("grad_norm", "grad_rms", "grad_mean_abs", "grad_max_abs", "grad_zero_fraction", "weight_norm")


class MLP(nn.Module):
    """Modules in a row."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x):
        return self.net(x)

    def trace(self, x):
        """The outputs of a forward pass by the name of the point, written out by hand."""
        seen = {}
        for name, module in self.net.named_children():
            x = module(x)
            seen[f"net.{name}"] = [x]
        return x, seen


class ConvNet(nn.Module):
    """Convolutions with activations in place."""

    def __init__(self):
        super().__init__()
        self.c1, self.norm, self.c2, self.head = (
            nn.Conv2d(1, 5, 3),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 7, 2),
            nn.Linear(7, 4),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm(self.c1(x[:, :, None].repeat(1, 1, 6).unsqueeze(1) * 8 - 6)))
        return self.head(self.relu(self.c2(x)).mean((2, 3)))

    def trace(self, x):
        c1 = self.c1(x[:, :, None].repeat(1, 1, 6).unsqueeze(1) * 8 - 6)
        norm = self.norm(c1)
        r1 = F.relu(norm)
        c2 = self.c2(r1)
        r2 = F.relu(c2)
        head = self.head(r2.mean((2, 3)))
        names = {"c1": c1, "norm": norm, "relu": r1, "c2": c2, "c2/model.relu": r2, "head": head}
        return head, {name: [tensor] for name, tensor in names.items()}


class Functional(nn.Module):
    """Not a single activation module, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.b(F.relu(torch.sigmoid(self.a(x) * 6) - 0.9) * self.scale)

    def trace(self, x):
        a = self.a(x)
        s = torch.sigmoid(a * 6)
        r = F.relu(s - 0.9)
        b = self.b(r * self.scale)
        return b, {"a": [a], "a/sigmoid": [s], "a/relu": [r], "b": [b], "": [b]}


class Tied(nn.Module):
    """One weight, two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))

    def trace(self, x):
        up = self.up(x)
        t1 = torch.tanh(up)
        down = self.down(t1)
        t2 = torch.tanh(down)
        head = self.head(t2)
        return head, {"up": [up], "up/tanh": [t1], "down": [down], "down/tanh": [t2], "head": [head]}


class Twice(nn.Module):
    """A cell in a loop, and an activation behind it."""

    def __init__(self):
        super().__init__()
        self.cell, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)

    def forward(self, x):
        for _ in range(3):
            x = self.act(self.cell(x) * 3)
        return self.head(x)

    def trace(self, x):
        seen = {"cell": [], "act": []}
        for _ in range(3):
            seen["cell"].append(self.cell(x))
            x = torch.tanh(seen["cell"][-1] * 3)
            seen["act"].append(x)
        seen["head"] = [self.head(x)]
        return seen["head"][0], seen


class Task(L.LightningModule):
    """Cross entropy and plain descent."""

    def __init__(self, make):
        super().__init__()
        self.model = make()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Witness(L.Callback):
    """Keeps the weights and the batch before each step."""

    def __init__(self):
        self.kept = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kept.append((copy.deepcopy(pl_module.state_dict()), batch))


MODELS = {"mlp": MLP, "conv": ConvNet, "functional": Functional, "tied": Tied, "twice": Twice}
RUNS = {
    **{name: (make, 1, {}) for name, make in MODELS.items()},
    "accumulated": (MLP, 3, {"accumulate_grad_batches": 3}),
    "clipped": (MLP, 1, {"gradient_clip_val": 0.1}),
}


def _data(batches):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(8 * batches, 6, generator=generator), torch.randint(4, (8 * batches,), generator=generator)
    return loader(x, y, seed=0, batch_size=8)


def _flow():
    saturation = SaturationMonitor(window=WINDOW, max_dead=1.0, max_saturated=1.0)
    return GradFlow(every_n_steps=1, saturation=saturation, mitigate="off", report=False, console=False)


@cache
def _run(name):
    """The history of a run, and the naive numbers of each of its steps by metric and name."""
    make, accumulated, kwargs = RUNS[name]
    witness, flow = Witness(), _flow()
    L.seed_everything(1, verbose=False)
    task = Task(make)
    trainer = quiet_trainer(max_steps=STEPS, callbacks=[witness, flow], **kwargs)
    trainer.fit(task, _data(STEPS * accumulated))
    windows = [witness.kept[i : i + accumulated] for i in range(0, len(witness.kept), accumulated)]
    silent = {}
    return flow.history, [_reference(Task(make), window, silent) for window in windows]


def _reference(task, window, silent):
    """All metrics of one step: metric -> name -> value."""
    task.load_state_dict(window[0][0])
    parameters = dict(task.named_parameters())
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    deltas, outputs = {}, {}
    for _, (x, y) in window:
        output, seen = task.model.trace(x)
        flat = [tensor for tensors in seen.values() for tensor in tensors]
        found = torch.autograd.grad(F.cross_entropy(output, y) / len(window), [*parameters.values(), *flat])
        for name, gradient in zip(parameters, found, strict=False):
            gradients[name] += gradient
        rest = iter(found[len(parameters) :])
        for point, tensors in seen.items():
            outputs.setdefault(point, []).extend(tensor.detach() for tensor in tensors)
            deltas.setdefault(point, []).extend(next(rest) for _ in tensors)
    return _layer_numbers(parameters, gradients) | _point_numbers(outputs, deltas, silent)


def _layer_numbers(parameters, gradients):
    numbers = {metric: {} for metric in PER_LAYER}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in gradients):
        names = [name for name in gradients if name.rpartition(".")[0] == layer]
        g = np.concatenate([gradients[name].double().numpy().ravel() for name in names])
        w = np.concatenate([parameters[name].detach().double().numpy().ravel() for name in names])
        values = (
            np.sqrt((g**2).sum()),
            np.sqrt((g**2).mean()),
            np.abs(g).mean(),
            np.abs(g).max(),
            (g == 0).mean(),
            np.sqrt((w**2).sum()),
        )
        for metric, value in zip(PER_LAYER, values, strict=True):
            numbers[metric][layer] = value
    return numbers


def _point_numbers(outputs, deltas, silent):
    numbers = {"delta_norm": {}, "output_rms": {}, "saturated_fraction": {}, "dead_fraction": {}}
    for point, tensors in outputs.items():
        name = f"model.{point}".rstrip(".")
        numbers["delta_norm"][name] = math.sqrt(sum(float((d.double() ** 2).sum()) for d in deltas[point]))
        entries = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
        numbers["output_rms"][name] = np.sqrt((entries**2).mean())
        if point in ("net.1", "act") or point.endswith("tanh"):
            numbers["saturated_fraction"][name] = (np.abs(entries) > 0.99).mean()
        if point.endswith("sigmoid"):
            numbers["saturated_fraction"][name] = ((entries < 0.01) | (entries > 0.99)).mean()
        if point == "net.3" or point.endswith("relu"):
            fires = np.any([(t != 0).movedim(1, 0).flatten(1).any(1).numpy() for t in tensors], axis=0)
            silent.setdefault(point, []).append(~fires)
            if len(silent[point]) >= WINDOW:
                numbers["dead_fraction"][name] = np.all(silent[point][-WINDOW:], axis=0).mean()
    return numbers


@pytest.mark.parametrize("metric", [*PER_LAYER, "delta_norm", "output_rms", "saturated_fraction", "dead_fraction"])
@pytest.mark.parametrize("name", RUNS)
def test_every_number_is_that_of_plain_autograd(name, metric):
    history, reference = _run(name)
    assert len(history) == len(reference) == STEPS
    for row, numbers in zip(history[metric], reference, strict=True):
        measured = {n: v for n, v in zip(history.names(metric), row, strict=True) if not np.isnan(v)}
        assert measured == pytest.approx(numbers[metric], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("name", "metric"), [("functional", "saturated_fraction"), ("twice", "saturated_fraction")])
def test_the_runs_saturate_so_that_the_share_is_not_trivial(name, metric):
    _, reference = _run(name)
    assert all(0 < share < 1 for numbers in reference for share in numbers[metric].values())


def test_some_units_die_so_that_the_share_is_not_trivial():
    shares = [share for name in RUNS for numbers in _run(name)[1] for share in numbers["dead_fraction"].values()]
    assert any(0 < share < 1 for share in shares)


def test_the_total_is_the_norm_over_all_layers():
    history, reference = _run("conv")
    naive = [math.sqrt(sum(norm**2 for norm in numbers["grad_norm"].values())) for numbers in reference]
    assert history.scalar("grad_norm_total").tolist() == pytest.approx(naive, rel=1e-4)


def test_the_clipped_run_was_clipped():
    history, _ = _run("clipped")
    assert (history.scalar("grad_norm_total") > 0.1).all()


def test_points_stand_in_order_of_execution():
    history, _ = _run("functional")
    assert history.names("delta_norm") == ("model.a", "model.a/sigmoid", "model.a/relu", "model.b", "model")


def test_the_loss_is_the_mean_over_the_accumulated_batches():
    history, _ = _run("accumulated")
    witness = Witness()
    L.seed_everything(1, verbose=False)
    task = Task(MLP)
    quiet_trainer(max_steps=STEPS, callbacks=[witness], accumulate_grad_batches=3).fit(task, _data(STEPS * 3))
    losses = []
    for weights, batch in witness.kept:
        task.load_state_dict(weights)
        losses.append(task.training_step(batch, 0).item())
    naive = np.array(losses).reshape(STEPS, 3).mean(axis=1)
    np.testing.assert_allclose(history.losses, naive, rtol=1e-5)


class BreaksBackward(Task):
    """The gradient of two entries of a weight is no number."""

    def __init__(self, make):
        super().__init__(make)
        bad = torch.ones(9, 6)
        bad[0, :2] = math.nan
        self.model.net[0].weight.register_hook(lambda gradient: gradient * bad)


def test_the_share_of_nonfinite_entries_is_counted():
    flow = _flow()
    with pytest.warns(GradFlowWarning, match="step 0"):
        quiet_trainer(max_steps=1, callbacks=[flow]).fit(BreaksBackward(MLP), _data(1))
    row = dict(zip(flow.history.layers, flow.history["grad_nonfinite_fraction"][0], strict=True))
    assert row == pytest.approx({"model.net.0": 2 / 63, "model.net.2": 0.0, "model.net.4": 0.0})


class ManualGAN(L.LightningModule):
    """Two networks, two optimizers; what the other one leaves in `.grad` is stale."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1))

    def losses(self, x, judge):
        fake = self.generator(x.flip(0))
        return F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(x)).mean(), F.softplus(-judge(fake)).mean()

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch[0], self.discriminator)[i])
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.5) for part in (self.discriminator, self.generator)]


def _with_weights(net, weights, x):
    return functional_call(net, weights, (x,))


def test_under_manual_optimization_each_optimizer_has_its_own_gradients():
    witness, flow = Witness(), _flow()
    L.seed_everything(1, verbose=False)
    module = ManualGAN()
    quiet_trainer(max_steps=2 * STEPS, callbacks=[witness, flow]).fit(module, _data(STEPS))
    assert len(flow.history) == STEPS
    for (weights, (x, _)), row in zip(witness.kept, flow.history["grad_norm"], strict=True):
        module.load_state_dict(weights)
        judge, artist = dict(module.discriminator.named_parameters()), dict(module.generator.named_parameters())
        first = torch.autograd.grad(module.losses(x, module.discriminator)[0], judge.values())
        moved = {name: p - 0.5 * g for (name, p), g in zip(judge.items(), first, strict=True)}
        loss = module.losses(x, partial(_with_weights, module.discriminator, moved))[1]
        second = torch.autograd.grad(loss, artist.values())
        naive = {}
        for part, names, gradients in (("discriminator", judge, first), ("generator", artist, second)):
            for name, gradient in zip(names, gradients, strict=True):
                naive.setdefault(f"{part}.{name.split('.')[0]}", []).append(gradient.double().square().sum())
        naive = {layer: float(sum(squares)) ** 0.5 for layer, squares in naive.items()}
        assert dict(zip(flow.history.layers, row, strict=True)) == pytest.approx(naive, rel=1e-4)
