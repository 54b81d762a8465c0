"""Faults that can only be told: what no step can change, and what never reaches the optimizer."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.advice import suggest

STEPS = 120


class Net(LightningModule):
    """Ten classes of points around ten centres."""

    def __init__(self, dtype=torch.float32, lr=1e-3, width=48):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)
        self.lr, self.format = lr, dtype
        self.to(dtype)

    def forward(self, x):
        return self.head(self.body(x)).float()

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x.to(self.format)), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Replaced(Net):
    """The optimizer is made before the layers are."""

    def __init__(self):
        super().__init__()
        self.made = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.head = nn.Linear(32, 10)

    def configure_optimizers(self):
        return self.made


class Listed(Net):
    """All layers but a bias stand in a list of Python's, unless they are registered."""

    def __init__(self, register=False):
        super().__init__()
        body = [nn.Linear(16, 32), nn.Linear(32, 10)]
        del self.body
        self.body = nn.ModuleList(body) if register else body
        self.head = nn.Module()
        self.head.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        for layer in self.body:
            x = torch.tanh(layer(x))
        return x + self.head.bias


class HeadOnly(Net):
    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=1e-2)


class Penalty(Net):
    """The outputs were detached for a metric."""

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x).detach(), y) + 1e-5 * sum(p.square().sum() for p in self.parameters())


class Probabilities(Net):
    """A softmax too many."""

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x).softmax(1), y)


class Bounded(Net):
    """A sigmoid too many."""

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x).sigmoid(), y)


class Counted(Net):
    """A number is asked for, and it is rounded before the loss."""

    def training_step(self, batch, _):
        x, y = batch
        return F.mse_loss(self(x).sum(1).round(), y.float())


def data():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(640) % 10
    centres = 1.5 * torch.randn(10, 16, generator=generator)
    x = centres[y] + 0.5 * torch.randn(640, 16, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def fit(model, tmp_path, steps=STEPS, flow=True):
    callbacks = [GradFlow(every_n_steps=10, report=False, console=False, mitigate="apply")] if flow else []
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    trainer.fit(model, data())
    return callbacks[0] if flow else None


def told(flow, severity="warning"):
    return [(str(f.kind), f.cause, set(f.layers)) for f in flow.findings if f.severity.value == severity]


ALL = {"body.0", "body.2", "head"}


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Replaced, ("no_gradient", "not_optimized", {"body.0", "head"})),
        (Listed, ("no_gradient", "not_optimized", {"body"})),
        (Penalty, ("no_gradient", "detached", ALL)),
        (Counted, ("no_gradient", "detached", ALL)),
        (Probabilities, ("loss_mismatch", "softmax_twice", set())),
        (Bounded, ("loss_mismatch", "bounded_scores", set())),
        (lambda: Net(torch.bfloat16, lr=2e-5), ("update_ratio", "rounding", ALL)),
        (lambda: Net(torch.bfloat16, lr=1e-9), ("update_ratio", "rounding", ALL)),
    ],
)
def test_it_is_told_once_and_nothing_is_done(make, found, tmp_path):
    flow = fit(make(), tmp_path)
    assert told(flow) == [found]
    assert flow.actions == ()


@pytest.mark.parametrize("make", [Net, lambda: Net(torch.bfloat16), HeadOnly, lambda: Listed(register=True)])
def test_a_run_that_learns_is_left_in_peace_to_the_bit(make, tmp_path):
    watched, alone = make(), make()
    if isinstance(watched, Listed):
        alone.load_state_dict(watched.state_dict())
    flow = fit(watched, tmp_path)
    fit(alone, tmp_path, flow=False)
    assert told(flow) == []
    assert flow.actions == ()
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_backbone_that_is_left_out_is_an_info(tmp_path):
    assert told(fit(HeadOnly(), tmp_path), "info") == [("no_gradient", "not_optimized", {"body.0", "body.2"})]


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_the_advice_for_layers_in_a_list_registers_them_and_has_the_optimizer_hold_all(tmp_path):
    (finding,) = [f for f in fit(Listed(), tmp_path).findings if f.severity.is_alarm]
    model = Listed()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    exec(finding.suggestions[0].code, {"self": model, "optimizer": optimizer})
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert isinstance(model.body, nn.ModuleList)
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_the_advice_of_float32_copies_lets_the_same_run_learn(tmp_path):
    flow = fit(Net(torch.bfloat16, lr=5e-5), tmp_path, steps=300)
    finding = next(f for f in flow.findings if f.cause == "rounding")
    made = {"torch": torch}
    exec(next(s.code for s in suggest(finding, flow.history) if "def configure_optimizers" in s.code), made)
    hooks = {name: made[name] for name in ("configure_optimizers", "on_before_optimizer_step")}
    cured = fit(type("Cured", (Net,), hooks)(torch.bfloat16), tmp_path, steps=300)
    lost, kept = flow.history.losses, cured.history.losses
    assert lost[:20].mean() - lost[-20:].mean() < 0.5 * (kept[:20].mean() - kept[-20:].mean())
