"""Real trainings under `mitigate="apply"`: healthy ones stay the same, sick ones learn, resumed ones go on."""

from functools import cache
from itertools import pairwise
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow.findings import FindingKind
from lightning_gradflow.remedies import slowing
from tests.benchmarks.zoo import quiet_trainer
from tests.benchmarks.zoo.exact import EXACT, EXACT_DATA
from tests.callbacks.treated import Doctor, Says, weights
from tests.integration.test_exact import _same
from tests.integration.traces import Tiny, data, fit, flow, traces

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

HEALTHY = ["dropout", "batch_norm", "tied_embedding", "weight_norm", "manual_gan"]


def _left(name, callbacks):
    L.seed_everything(0, verbose=False)
    module = EXACT[name](0)
    trainer = quiet_trainer(max_steps=24, callbacks=callbacks)
    trainer.fit(module, EXACT_DATA[name](0))
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {"state": module.state_dict(), "rng": torch.get_rng_state(), "optimizers": optimizers}


@pytest.mark.parametrize("name", HEALTHY)
def test_without_an_alarm_the_run_is_the_plain_one_to_the_bit(name):
    monitor = flow(every_n_steps=2, mitigate="apply")
    watched, plain = _left(name, [monitor]), _left(name, [])
    assert len(monitor.history) >= 7
    assert monitor.actions == ()
    assert _same(watched, plain)


# -- a network that does not learn


class Deep(L.LightningModule):
    """Six layers of sigmoids on digits, through which hardly any gradient comes."""

    def __init__(self, scale=1.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Linear(64, 16), nn.Sigmoid()]
            for _ in range(5):
                layers += [nn.Linear(16, 16), nn.Sigmoid()]
            self.net = nn.Sequential(*layers, nn.Linear(16, 10))
        self.scale = scale

    def training_step(self, batch, batch_idx):
        return self.scale * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3, eps=1e-30)


@cache
def _digits():
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:512], dtype=torch.float32) / 16, torch.tensor(y[:512]))


def _learn(mitigate="apply", scale=1.0, **kwargs):
    monitor, model = flow(every_n_steps=4, mitigate=mitigate), Deep(scale)
    defaults = {"train": DataLoader(_digits(), 32), "max_epochs": -1, "max_steps": 110}
    trainer = fit([monitor], model, **{**defaults, **kwargs})
    assert not traces(model, *trainer.optimizers)
    told = [(a.kind, a.outcome, a.step, a.decided_step) for a in monitor.actions]
    return told, np.mean(monitor.history.losses[-10:]) / scale


@pytest.fixture(scope="module")
def cured():
    return _learn()


def test_a_network_that_did_not_learn_is_made_to(cured):
    told, loss = cured
    _, untreated = _learn("suggest")
    assert [(kind, outcome) for kind, outcome, *_ in told] == [("reinit", "kept")]
    assert untreated > 2.2
    assert loss < 1.9


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_unit_of_the_loss_does_not_matter(cured, scale):
    told, loss = _learn(scale=scale)
    assert told == cured[0]
    assert loss == pytest.approx(cured[1], rel=0.02)


def test_it_is_made_to_in_half_precision_too():
    told, loss = _learn(precision="bf16-mixed")
    assert [(kind, outcome) for kind, outcome, *_ in told] == [("reinit", "kept")]
    assert loss < 2.0


def test_it_is_made_to_with_accumulated_gradients_too():
    told, loss = _learn(accumulate_grad_batches=2)
    assert [(kind, outcome) for kind, outcome, *_ in told] == [("reinit", "kept")]
    assert loss < 1.9


# -- two faults at once, each of which alone holds a run up


class Twice(L.LightningModule):
    """Three hidden layers on digits, with weights, inputs and a rate as a test says."""

    def __init__(self, activation, lr=3e-3, size=1.0, bias=0.0, unit=1.0, offset=0.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            widths = [64, 32, 32, 32, 10]
            layers = []
            for i, o in pairwise(widths):
                layers += [nn.Linear(i, o), activation()]
            self.net = nn.Sequential(*layers[:-1])
            for layer in self.net[::2]:
                nn.init.kaiming_normal_(layer.weight)
                layer.weight.data.mul_(size)
                nn.init.constant_(layer.bias, bias)
        self.lr, self.unit, self.offset = lr, unit, offset

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * self.unit + self.offset, batch[1]

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (lambda: Twice(nn.Tanh, size=12.0, unit=1000.0, offset=500.0), "scale_inputs"),
        (lambda: Twice(nn.Tanh, size=12.0, lr=0.3), "reinit"),
        (lambda: Twice(nn.ReLU, bias=-20.0, lr=1.0), "reinit"),
    ],
    ids=["raw inputs and large weights", "large weights and rate", "dead units and a large rate"],
)
def test_two_faults_at_once_are_cured_by_one_action(model, first):
    ends = []
    for mitigate in ("suggest", "apply"):
        monitor, net = flow(every_n_steps=4, mitigate=mitigate), model()
        fit([monitor], net, train=DataLoader(_digits(), 32), max_epochs=-1, max_steps=110)
        ends.append(float(np.median(monitor.history.losses[-20:])))
    assert [(a.kind, a.outcome) for a in monitor.actions] == [(first, "kept")]
    assert ends[0] > 1.5
    assert ends[1] < 0.6


# -- a run that is stopped and resumed

STEPS = 40


class Fixed(Tiny):
    """Takes its batch by the number of the step, whatever the loader gives: a resumed epoch begins with the first."""

    def __init__(self, scale=1.0, shrink=1.0):
        super().__init__(lr=0.002)
        with torch.no_grad():
            self.net[2].weight.mul_(shrink)
        self.batches = [(scale * x, y) for x, y in data()]

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batches[self.trainer.fit_loop.total_batch_idx % len(self.batches)], batch_idx)


REMEDIES = {
    "clip": (Says(FindingKind.EXPLODING_GRADIENT, "unknown"), 1.0, 1.0),
    "rollback": (Says(FindingKind.UPDATE_RATIO, "learning_rate_too_large"), 1.0, 1.0),
    "scale_inputs": (Says(FindingKind.DEAD_UNITS, "unscaled_inputs"), 300.0, 1.0),
    "reinit": (Says(FindingKind.VANISHING_GRADIENT, "weight_scale"), 1.0, 0.01),
}


def _go(remedy, folder, **kwargs):
    says, scale, shrink = REMEDIES[remedy]
    doctor, model = Doctor(says, allow=(remedy,)), Fixed(scale, shrink)
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    with mock.patch.object(slowing, "USUAL_RATIO", 1e-4):  # what is made up is that the first step was too large
        fit([doctor, keeps], model, max_epochs=-1, max_steps=STEPS, enable_checkpointing=True, **kwargs)
    return doctor, weights(model)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Remedy -> the run that was not stopped, and the folder of its checkpoints; each is made once."""

    @cache
    def get(remedy):
        folder = tmp_path_factory.mktemp("whole")
        return *_go(remedy, folder), folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        yield get


@pytest.mark.parametrize("remedy", REMEDIES)
def test_there_is_something_to_go_on_with(unbroken, remedy):
    """Without it the tests below would claim little."""
    doctor, ends, _ = unbroken(remedy)
    plain = Fixed(*REMEDIES[remedy][1:])
    fit([], plain, max_epochs=-1, max_steps=STEPS)
    assert [(a.kind, a.outcome, a.step, a.decided_step) for a in doctor.actions] == [(remedy, "kept", 4, 20)]
    assert not torch.equal(ends, weights(plain))


@pytest.mark.parametrize("step", [10, 30])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_what_is_in_force_goes_on_in_a_resumed_run(unbroken, remedy, step, tmp_path):
    """In the middle of the trial, and after it."""
    _, ends, folder = unbroken(remedy)
    _, resumed = _go(remedy, tmp_path, ckpt_path=next(folder.glob(f"step={step}.ckpt")))
    assert torch.equal(resumed, ends)


@pytest.mark.parametrize("step", [10, 30])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_run_that_is_resumed_in_or_after_a_trial_has_the_same_actions(unbroken, remedy, step, tmp_path):
    doctor, _, folder = unbroken(remedy)
    resumed, _ = _go(remedy, tmp_path, ckpt_path=next(folder.glob(f"step={step}.ckpt")))
    assert resumed.actions == doctor.actions
    assert resumed.history.losses.tolist() == doctor.history.losses.tolist()


@pytest.mark.parametrize("remedy", REMEDIES)
def test_each_checkpoint_loads_with_weights_only(unbroken, remedy):
    _, _, folder = unbroken(remedy)
    paths = list(folder.glob("*.ckpt"))
    assert len(paths) == STEPS // 5
    for path in paths:
        assert torch.load(path, weights_only=True)["callbacks"]


def test_a_checkpoint_holds_the_weights_for_the_inputs_as_they_come(unbroken):
    """Whoever loads it for inference needs nothing else."""
    _, ends, folder = unbroken("scale_inputs")
    state = torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([tensor.flatten() for tensor in state.values()]), ends)
