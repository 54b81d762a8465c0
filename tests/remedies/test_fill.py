"""Weights without numbers get some."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.remedies.fill import fill_missing

NAN = math.nan


class Own(nn.Module):
    """A layer that cannot draw itself."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.full(shape, NAN)))

    def forward(self, x):
        return x @ self.weight.T


def _spoilt(module, names=("weight",)):
    for name in names:
        getattr(module, name).data.view(-1)[0] = NAN
    return module


def test_what_is_fine_stays_as_it_is():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Embedding(4, 3))
    before = [p.clone() for p in net.parameters()]
    assert fill_missing(net, 0) == {}
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(30, 20), nn.Conv2d(3, 8, 3), nn.GRU(4, 5), nn.Embedding(9, 4), nn.LayerNorm(6), nn.BatchNorm1d(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_torch_draw_themselves(layer):
    first = next(name for name, _ in layer.named_parameters())
    torch.manual_seed(5)
    layer.reset_parameters()
    expected = [p.clone() for p in layer.parameters()]
    assert [*fill_missing(nn.Sequential(_spoilt(layer, [first])), 5)] == ["0"]
    assert all(map(torch.equal, expected, layer.parameters()))


def test_the_weight_of_an_own_layer_keeps_the_size_of_a_signal():
    layer = Own(weight=(300, 400))
    fill_missing(layer, 0)
    assert float(layer.weight.detach().square().mean()) == pytest.approx(1 / 400, rel=0.02)
    assert float(layer(torch.randn(200, 400)).detach().std()) == pytest.approx(1, rel=0.05)


def test_what_is_multiplied_by_becomes_one_and_what_is_added_zero():
    layer = Own(scale=(3,), gamma=(3,), in_bias=(3,), beta=(3,), shift=(1,))
    assert [*fill_missing(layer, 0)] == [""]
    assert {name: set(p.tolist()) for name, p in layer.named_parameters()} == {
        "scale": {1.0}, "gamma": {1.0}, "in_bias": {0.0}, "beta": {0.0}, "shift": {0.0}
    }  # fmt: skip


def test_of_an_own_layer_the_parameters_that_are_fine_stay():
    layer = Own(weight=(3, 3))
    layer.gain = nn.Parameter(torch.full((3,), 7.0))
    assert len(fill_missing(layer, 0)[""]) == 2
    assert layer.gain.tolist() == [7.0] * 3


def test_of_one_dimension_the_entries_that_are_fine_stay():
    layer = Own(scale=(3,))
    layer.scale.data[0] = 7.0
    fill_missing(layer, 0)
    assert layer.scale.tolist() == [7.0, 1.0, 1.0]


def test_frozen_parameters_stay_even_where_the_layer_draws_itself():
    layer = _spoilt(nn.Linear(3, 3), ["weight", "bias"])
    layer.bias.requires_grad_(False)
    fill_missing(layer, 0)
    assert bool(layer.weight.isfinite().all())
    assert math.isnan(layer.bias[0])


def test_layers_that_stand_in_another_one_are_not_drawn_by_it():
    class Holder(Own):
        def __init__(self):
            super().__init__(scale=(2,))
            self.trained = nn.Linear(2, 2)

        def reset_parameters(self):
            self.trained.reset_parameters()

    layer = Holder()
    before = layer.trained.weight.clone()
    assert [*fill_missing(layer, 0)] == [""]
    assert torch.equal(layer.trained.weight, before)
    assert layer.scale.tolist() == [1.0, 1.0]


def test_a_parameter_that_a_layer_puts_in_place_of_the_old_one_goes_into_the_old_one():
    class Replacing(Own):
        def reset_parameters(self):
            self.weight = nn.Parameter(torch.full((2, 2), 3.0))

    layer = Replacing(weight=(2, 2))
    weight = layer.weight
    assert fill_missing(layer, 0)[""][0] is weight
    assert layer.weight is weight
    assert weight.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_a_layer_that_fails_to_draw_itself_is_drawn():
    class Broken(Own):
        def reset_parameters(self):
            raise RuntimeError

    layer = Broken(weight=(3, 3))
    fill_missing(layer, 0)
    assert bool(layer.weight.isfinite().all())


def test_the_global_generator_stays_and_a_seed_gives_the_same():
    drawn = []
    for _ in range(2):
        net = nn.Sequential(Own(weight=(4, 4)), _spoilt(nn.Linear(4, 4)))
        torch.manual_seed(3)
        before = torch.get_rng_state()
        fill_missing(net, 11)
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*drawn)


class Ring(L.LightningModule):
    """Tells points inside of a ring from those outside."""

    def __init__(self, own):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), own, nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(batch_idx))
        return F.cross_entropy(self.net(x), (x.norm(dim=1) > 1.2).long())

    def train_dataloader(self):
        return range(150)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class OwnRing(Ring):
    """The same with the weight, and a scale, in the LightningModule itself."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.weight = nn.Parameter(torch.full((32, 32), NAN))
        self.scale = nn.Parameter(torch.ones(32))
        self.scale.data[3] = NAN

    def training_step(self, batch, batch_idx):
        self.net[2].forward = lambda x: x @ self.weight * self.scale
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("own", "layer"),
    [(Own(weight=(32, 32)), "net.2"), (_spoilt(nn.Linear(32, 32)), "net.2"), (None, r"\(root\)")],
    ids=["own", "linear", "in the LightningModule"],
)
def test_a_run_whose_weights_were_never_initialised_is_told_and_learns(own, layer, tmp_path):
    torch.manual_seed(0)
    flow = GradFlow(mitigate="apply", report=False, console=False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[flow], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.warns(match=f"{layer} were NaN or infinite before the first step"):
        trainer.fit(OwnRing() if own is None else Ring(own))
    assert [(f.cause, f.layers, f.step) for f in flow.findings] == [("initialisation", (layer.replace("\\", ""),), 0)]
    assert [(a.kind, a.outcome) for a in flow.actions] == [("reinit", "kept")]
    assert flow.history.losses[-10:].mean() < 0.2
