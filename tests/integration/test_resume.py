"""A run that was stopped and resumed is the run that was never stopped: rows, losses, findings, weights.

What holds for remedies is in `test_cure`.
"""

import shutil

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gradflow import AutoMitigator, FindingKind, GradNormLogger, PlateauDetector, SaturationMonitor
from tests.benchmarks.zoo.stacks import mlp, normal
from tests.integration.traces import Tiny, Validated, assert_same_run, data, fit, flow

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

STEPS = 36
EVERY = 5


class Fixed(Tiny):
    """Takes its batch by the number of the step: Lightning starts a resumed epoch with the first batch of its data."""

    def __init__(self, lr=0.05):
        super().__init__(lr)
        self.batches = list(data())

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batches[self.trainer.fit_loop.total_batch_idx % len(self.batches)], batch_idx)


class Shaky(Fixed):
    """Its gradient explodes on the way to the first layer, until its weights are made small at step 16."""

    def __init__(self):
        super().__init__(lr=1e-9)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = normal(mlp(8, torch.nn.ReLU, inputs=4, outputs=1), 0.6)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 16:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.mul_(0.3)


class Healing(Fixed):
    """Dead units that come back at step 20; with a validation loss."""

    validation_step = Validated.validation_step

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net[2].bias.fill_(-100.0)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 20:
            with torch.no_grad():
                self.net[2].bias.fill_(0.1)


def _run(make_monitors, model, folder, **kwargs):
    """An unbroken run that leaves checkpoints, and what watched it."""
    monitors = make_monitors()
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1)
    fit([*monitors, keeps], model, max_epochs=-1, max_steps=STEPS, enable_checkpointing=True, **kwargs)
    return monitors


def _resume(make_monitors, model, folder, step, **kwargs):
    monitors = make_monitors()
    # there has to be one for the state that the checkpoint holds of it
    keeps = ModelCheckpoint(folder / "again", every_n_train_steps=EVERY)
    checkpoint = next(folder.glob(f"step={step}.ckpt"))
    fit(
        [*monitors, keeps],
        model,
        max_epochs=-1,
        max_steps=STEPS,
        enable_checkpointing=True,
        ckpt_path=checkpoint,
        **kwargs,
    )
    return monitors


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SETS = {
    "GradFlow": lambda: [flow(every_n_steps=4)],
    "sparse": lambda: [flow(every_n_steps=8)],  # at step 15 a validation loss waits for the next row
    "each_step": lambda: [flow()],
    "gradients": lambda: [GradNormLogger(1)],
    "four": lambda: [GradNormLogger(4), SaturationMonitor(4), PlateauDetector(4), AutoMitigator(every_n_steps=4)],
}
RUNS = [
    ("GradFlow", Shaky),
    ("four", Shaky),
    ("each_step", Healing),
    ("GradFlow", Healing),
    ("sparse", Healing),
    ("gradients", Shaky),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(set, model) -> monitors, weights and checkpoints of the unbroken run; each is made once."""
    made = {}

    def get(name, kind):
        if (name, kind) not in made:
            folder, model = tmp_path_factory.mktemp("whole"), kind()
            val = data(2) if kind is Healing else None
            monitors = _run(SETS[name], model, folder, val=val)
            made[name, kind] = monitors, _weights(model), folder
        return made[name, kind]

    yield get
    for _, _, folder in made.values():
        shutil.rmtree(folder)


# with a row every four steps, the first and the last of these checkpoints are written in the step of a row
@pytest.mark.parametrize("step", [5, 10, 15, 25])
@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_resumed_run_is_the_unbroken_one(unbroken, name, kind, step):
    (whole, *_), weights, folder = unbroken(name, kind)
    model = kind()
    resumed, *_ = _resume(SETS[name], model, folder, step, val=data(2) if kind is Healing else None)
    assert_same_run(resumed, whole)
    assert torch.equal(_weights(model), weights)


def test_the_run_has_findings_that_were_opened_and_resolved(unbroken):
    """Without them the test above would claim little."""
    (shaky, *_), _, _ = unbroken("GradFlow", Shaky)
    (healing, *_), _, _ = unbroken("each_step", Healing)
    (explosion, *_) = (finding for finding in shaky.findings if finding.kind is FindingKind.EXPLODING_GRADIENT)
    assert explosion.resolved_step > 5  # after the first checkpoint
    assert {finding.kind for finding in healing.findings} == {FindingKind.DEAD_UNITS}
    assert np.isfinite(healing.history.scalar("val_loss")).any()


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_each_checkpoint_loads_with_weights_only(unbroken, name, kind):
    _, _, folder = unbroken(name, kind)
    paths = list(folder.glob("*.ckpt"))
    assert len(paths) == STEPS // EVERY
    for path in paths:
        assert torch.load(path, weights_only=True)["callbacks"]


def test_a_run_that_ended_and_is_trained_further_keeps_what_came_after_its_last_sample(tmp_path):
    whole, first, second = (flow(every_n_steps=4) for _ in range(3))
    fit([whole], Fixed(), max_epochs=-1, max_steps=STEPS)
    fit([first], Fixed(), max_epochs=-1, max_steps=15).save_checkpoint(tmp_path / "end.ckpt")
    fit([second], Fixed(), max_epochs=-1, max_steps=STEPS, ckpt_path=tmp_path / "end.ckpt")
    assert second.history.losses.tolist() == whole.history.losses.tolist()
    assert second.history.loss_steps.tolist() == whole.history.loss_steps.tolist()


def test_a_finished_run_that_is_loaded_again_shows_its_history(tmp_path):
    first, second = flow(), flow()
    fit([first]).save_checkpoint(tmp_path / "end.ckpt")
    fit([second], ckpt_path=tmp_path / "end.ckpt")
    assert second.history.steps.tolist() == first.history.steps.tolist()


def test_a_checkpoint_in_the_middle_of_a_window_can_be_resumed(tmp_path):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 5:  # the second batch of the second window of four
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = flow(), flow()
    fit([whole, Saves()], Fixed(), accumulate_grad_batches=4, max_epochs=2)
    fit([resumed], Fixed(), accumulate_grad_batches=4, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.history.steps.tolist() == whole.history.steps.tolist()
    np.testing.assert_array_equal(resumed.history["grad_norm"][0], whole.history["grad_norm"][0])
    assert np.isfinite(resumed.history["grad_norm"]).all()
    assert len(resumed.history.losses) == len(whole.history.losses)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_checkpoint_between_two_windows_continues_as_the_unbroken_run(tmp_path, every):
    keeps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    kwargs = {"accumulate_grad_batches": 5, "max_epochs": 3, "enable_checkpointing": True}
    whole, resumed = flow(every_n_steps=2), flow(every_n_steps=2)
    fit([whole, keeps], Fixed(), **kwargs)
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=every)
    fit([resumed, again], Fixed(), ckpt_path=next(tmp_path.glob(f"step={2 * every}.ckpt")), **kwargs)
    assert_same_run(resumed, whole)


def test_a_set_in_another_order_goes_on_too(tmp_path):
    first, second = [GradNormLogger(4), SaturationMonitor(4)], [SaturationMonitor(4), GradNormLogger(4)]
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "end.ckpt")
    fit(second, max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    assert second[0].history.steps.tolist() == [0, 1, 2, 4, 8, 12, 16, 20]


def test_a_checkpoint_without_a_monitor_can_be_resumed_with_one(tmp_path):
    fit([]).save_checkpoint(tmp_path / "end.ckpt")
    monitor = flow()
    fit([monitor], max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    assert monitor.history.steps.tolist() == list(range(12, 24))


def test_a_checkpoint_from_inside_a_sampled_step_holds_the_rows_before_it(tmp_path):
    class Saves(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
            return super().training_step(batch, batch_idx)

    monitor = flow()
    fit([monitor], Saves())
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)["callbacks"]["GradFlow"]
    assert len(state["recorder"]["history"]["rows"]) == 3
    assert len(monitor.history) == 12
