"""With LIGHTNING_GRADFLOW=1 every Trainer is watched, and one that is watched already stays as it is."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch

from lightning_gradflow import (
    AutoMitigator,
    GradFlow,
    GradNormLogger,
    PlateauDetector,
    SaturationMonitor,
    VanishingGradientWarning,
)
from lightning_gradflow.callbacks.base import Monitor
from tests.benchmarks.zoo import HEALTHY, SICK, quiet_trainer

PARTS = [AutoMitigator, GradNormLogger, PlateauDetector, SaturationMonitor]
PROGRAM = """
import sys
import torch
import lightning as L

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(*[m for _ in range(12) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.ones(16, 8), batch_size=4)
L.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=sys.argv[1]).fit(Net(), data)
"""


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GRADFLOW", "1")


def _monitors(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]


def _fit(folder, callbacks=(), steps=6, case="tanh_4_default_init", ckpt=None, configured=None):
    case = (HEALTHY | SICK)[case]
    L.seed_everything(0, verbose=False)
    model = case.build(0)
    if configured is not None:
        model.configure_callbacks = lambda: configured
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, callbacks=list(callbacks), default_root_dir=folder, log_every_n_steps=5
    )
    trainer.fit(model, case.data(0), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("package", [L, pytorch_lightning], ids=lambda package: package.__name__)
@pytest.mark.parametrize("value", [None, "", "0", "true", "01", " 1", "2"])
def test_anything_but_1_adds_nothing(monkeypatch, package, value):
    monkeypatch.delenv("LIGHTNING_GRADFLOW", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_GRADFLOW", value)
    assert _monitors(package.Trainer(accelerator="cpu", logger=False)) == []


@pytest.mark.parametrize("package", [L, pytorch_lightning], ids=lambda package: package.__name__)
def test_1_adds_a_gradflow_to_each_trainer(switched_on, package):
    trainers = [package.Trainer(accelerator="cpu", logger=False) for _ in range(2)]
    ((first,), (second,)) = map(_monitors, trainers)
    assert isinstance(first, GradFlow)
    assert isinstance(second, GradFlow)
    assert first is not second


def test_it_finds_warns_prints_and_writes_like_one_in_the_code(switched_on, tmp_path, capsys):
    with pytest.warns(VanishingGradientWarning):
        (flow,) = _monitors(_fit(tmp_path, case="sigmoid_30"))
    assert "Vanishing gradient" in capsys.readouterr().out
    assert flow.report_path == tmp_path / "gradflow_report.html"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = GradFlow(report=False, console=False)
        _fit(tmp_path, [asked], case="sigmoid_30")
    assert flow.findings == asked.findings
    np.testing.assert_array_equal(flow.history["grad_norm"], asked.history["grad_norm"])


def test_a_program_that_does_not_know_of_it_is_watched(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "LIGHTNING_GRADFLOW": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "The gradient vanishes" in said.stderr
    assert (tmp_path / "gradflow_report.html").is_file()


@pytest.mark.parametrize("kind", [GradFlow, *PARTS])
def test_beside_a_monitor_in_the_code_it_does_nothing(switched_on, tmp_path, kind):
    asked = GradFlow(report=False, console=False) if kind is GradFlow else kind()
    trainer = _fit(tmp_path, [asked])
    (automatic,) = [monitor for monitor in _monitors(trainer) if monitor is not asked]
    assert asked.history.steps.tolist() == [0, 1, 2, 4, 5]
    assert len(automatic.history) == 0
    assert not list(tmp_path.iterdir())


def test_beside_monitors_in_the_code_a_sick_run_is_told_of_once(switched_on, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _fit(tmp_path, [GradNormLogger(), SaturationMonitor()], case="sigmoid_30")
    assert [warning.category for warning in told].count(VanishingGradientWarning) == 1


def test_beside_a_monitor_that_the_module_brings_it_does_nothing(switched_on, tmp_path):
    asked = GradFlow(report=False, console=False)
    trainer = _fit(tmp_path, configured=[asked])
    (automatic,) = [monitor for monitor in _monitors(trainer) if monitor is not asked]
    assert (len(asked.history), len(automatic.history)) == (5, 0)


def test_one_list_of_callbacks_does_for_several_trainers(switched_on, tmp_path):
    callbacks = [L.Callback()]
    model = HEALTHY["tanh_4_default_init"]
    for _ in range(3):
        trainer = quiet_trainer(max_steps=2, callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(model.build(0), model.data(0))
        *others, last = _monitors(trainer)
        assert last.history.steps.tolist() == [0, 1]
        assert not any(other is last or other.history is last.history for other in others)


def test_a_monitor_that_comes_later_takes_over(switched_on, tmp_path):
    trainer = _fit(tmp_path)
    (automatic,) = _monitors(trainer)
    asked = GradFlow(report=False, console=False)
    trainer.callbacks.append(asked)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(trainer.lightning_module, HEALTHY["tanh_4_default_init"].data(0))
    assert automatic.history.steps.tolist() == [0, 1, 2, 4, 5]
    assert asked.history.steps.tolist() == [10]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
class TestResume:
    @pytest.fixture
    def checkpoint(self, monkeypatch, tmp_path):
        """Makes a checkpoint after six steps and switches the variable for what comes then."""

        def make(automatic, callbacks=(), then="1"):
            monkeypatch.setenv("LIGHTNING_GRADFLOW", "1" if automatic else "0")
            path = tmp_path / "half.ckpt"
            _fit(tmp_path, callbacks).save_checkpoint(path)
            monkeypatch.setenv("LIGHTNING_GRADFLOW", then)
            return path

        return make

    def test_it_goes_on_with_its_history(self, checkpoint, tmp_path):
        (flow,) = _monitors(_fit(tmp_path, steps=12, ckpt=checkpoint(automatic=True)))
        assert flow.history.steps.tolist() == [0, 1, 2, 4, 5, 10]

    def test_without_the_variable_nothing_is_missed(self, checkpoint, tmp_path):
        trainer = _fit(tmp_path, steps=12, ckpt=checkpoint(automatic=True, then="0"))
        assert (trainer.global_step, _monitors(trainer)) == (12, [])

    def test_a_run_that_was_not_watched_can_be_from_here_on(self, checkpoint, tmp_path):
        (flow,) = _monitors(_fit(tmp_path, steps=12, ckpt=checkpoint(automatic=False)))
        assert flow.history.steps.tolist() == [10]

    @pytest.mark.parametrize("variable", ["0", "1"])
    def test_a_gradflow_in_the_code_goes_on_where_it_left_off(self, checkpoint, tmp_path, variable):
        flow = GradFlow(report=False, console=False)
        _fit(tmp_path, [flow], steps=12, ckpt=checkpoint(automatic=True, then=variable))
        assert flow.history.steps.tolist() == [0, 1, 2, 4, 5, 10]

    def test_it_goes_on_where_a_gradflow_in_the_code_left_off(self, checkpoint, tmp_path):
        path = checkpoint(automatic=False, callbacks=[GradFlow(report=False, console=False)])
        (flow,) = _monitors(_fit(tmp_path, steps=12, ckpt=path))
        assert flow.history.steps.tolist() == [0, 1, 2, 4, 5, 10]

    def test_a_single_monitor_in_the_code_starts_its_own_history(self, checkpoint, tmp_path):
        alone = GradNormLogger()
        _fit(tmp_path, [alone], steps=12, ckpt=checkpoint(automatic=True))
        assert alone.history.steps.tolist() == [10]

    def test_its_checkpoint_loads_with_weights_only(self, checkpoint):
        state = torch.load(checkpoint(automatic=True), weights_only=True)
        assert state["callbacks"] == {}
        assert state["lightning_gradflow"]["recorder"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_a_copy_can_be_used_in_another_trainer(switched_on, tmp_path, copied):
    (flow,) = _monitors(_fit(tmp_path))
    again = copied(flow)
    trainer = _fit(tmp_path, [again])
    assert len(again.history) == 0
    assert len(_monitors(trainer)[-1].history) == 5


def test_a_trainer_that_only_validates_is_not_watched(switched_on, tmp_path):
    class Evaluates(L.LightningModule):
        def validation_step(self, batch, batch_idx):
            return batch.sum()

    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.validate(Evaluates(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2), verbose=False)
    assert [len(monitor.history) for monitor in _monitors(trainer)] == [0]
