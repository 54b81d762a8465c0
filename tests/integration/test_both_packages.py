"""`lightning` and `pytorch_lightning` are two packages of one code: our callbacks do the same in both."""

import csv
import dataclasses
import sys
import warnings
from pathlib import Path

import lightning
import lightning.pytorch.loggers
import numpy as np
import pytest
import pytorch_lightning
import pytorch_lightning.cli
import pytorch_lightning.demos.boring_classes
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import (
    AutoMitigator,
    FindingKind,
    GradFlow,
    GradNormLogger,
    PlateauDetector,
    SaturationMonitor,
)
from tests.wandb_reader import read_run

PACKAGES = [lightning, pytorch_lightning]


def _library(package):
    """Where a package keeps its plugins and loggers."""
    return lightning.pytorch if package is lightning else package


def _scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def _module(package, automatic=True):
    """A network of sigmoids that does not learn, as a module of the given package."""

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.net = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            loss = self._loss(batch)
            if automatic:
                return loss
            self.log("train_loss", loss)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self._loss(batch))

        def _loss(self, batch):
            inputs, targets = batch
            return nn.functional.mse_loss(self.net(inputs), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Net()


def _data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)


def _trainer(package, **kwargs):
    defaults = {
        "max_steps": 24,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 5,
    }
    return package.Trainer(**{**defaults, **kwargs})


def _fit(package, callbacks, automatic=True, ckpt=None, **kwargs):
    package.seed_everything(0, verbose=False)
    trainer = _trainer(package, callbacks=callbacks, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(_module(package, automatic), _data(), _data(), ckpt_path=ckpt)
    return trainer


def _flow(**kwargs):
    return GradFlow(**{"report": False, "console": False, **kwargs})


WAYS = {
    "automatic": {},
    "manual": {"automatic": False},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 1e-3},
    "bf16": {"precision": "bf16-mixed"},
    "scaled": {"plugins": lambda package: _library(package).plugins.MixedPrecision("16-mixed", "cpu", _scaler())},
}


@pytest.mark.parametrize("way", WAYS)
def test_history_and_findings_are_the_same(way):
    flows = [_flow(mitigate="apply"), _flow(mitigate="apply")]
    for package, flow in zip(PACKAGES, flows, strict=True):
        _fit(package, [flow], **{name: v(package) if callable(v) else v for name, v in WAYS[way].items()})
    ours, theirs = flows
    assert FindingKind.VANISHING_GRADIENT in {finding.kind for finding in ours.findings}
    assert theirs.findings == ours.findings
    assert theirs.actions == ours.actions
    assert len(ours.history) > 5
    assert theirs.history.layers == ours.history.layers
    np.testing.assert_equal(*[[dataclasses.asdict(row) for row in flow.history.rows] for flow in (theirs, ours)])


@pytest.mark.parametrize("kind", [AutoMitigator, GradNormLogger, PlateauDetector, SaturationMonitor])
def test_each_callback_works_alone_in_both(kind):
    ours, theirs = kind(), kind()
    for package, monitor in zip(PACKAGES, (ours, theirs), strict=True):
        _fit(package, [monitor])
    assert len(ours.history) == 8
    assert theirs.findings == ours.findings
    np.testing.assert_equal(*[[dataclasses.asdict(row) for row in one.history.rows] for one in (theirs, ours)])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
def test_a_run_of_one_package_goes_on_in_the_other(tmp_path):
    first, second = _flow(), _flow()
    _fit(lightning, [first], max_steps=12).save_checkpoint(tmp_path / "half.ckpt")
    _fit(pytorch_lightning, [second], ckpt=tmp_path / "half.ckpt")
    assert second.history.steps.tolist() == [0, 1, 2, 4, 5, 10, 15, 20]
    assert second.findings[0] == first.findings[0]


def test_the_variable_watches_a_trainer_of_the_other_package(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_GRADFLOW", "1")
    trainer = _fit(pytorch_lightning, [], default_root_dir=tmp_path)
    (flow,) = [callback for callback in trainer.callbacks if isinstance(callback, GradFlow)]
    assert flow.history.steps.tolist() == [0, 1, 2, 4, 5, 10, 15, 20]
    assert flow.report_path == tmp_path / "gradflow_report.html"


def test_the_variable_does_nothing_beside_a_gradflow_in_the_other_package(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_GRADFLOW", "1")
    asked = _flow()
    trainer = _fit(pytorch_lightning, [asked], default_root_dir=tmp_path)
    lengths = [len(callback.history) for callback in trainer.callbacks if isinstance(callback, GradFlow)]
    assert lengths == [8, 0]


# what Lightning 2.6 calls jsonargparse by
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_other_package_s_cli_takes_a_callback_from_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--trainer.logger=false"])
    flow = _flow()
    cli = pytorch_lightning.cli.LightningCLI(
        pytorch_lightning.demos.boring_classes.BoringModel,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [flow]},
    )
    assert flow in cli.trainer.callbacks


@pytest.fixture(scope="module", params=PACKAGES, ids=lambda package: package.__name__)
def logged(request, tmp_path_factory):
    """A run with the three loggers of one package, and the folder that they wrote to."""
    loggers = _library(request.param).loggers
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(variable, str(folder / "home"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        board = loggers.TensorBoardLogger(folder, name="board")
        table = loggers.CSVLogger(folder, name="table")
        offline = loggers.WandbLogger(project="test", save_dir=folder, mode="offline")
        flow = _flow(report=True)
        _fit(request.param, [flow], logger=[board, table, offline])
        written = Path(offline.experiment.dir).parent
        wandb.finish()
    return flow, Path(board.log_dir), Path(table.log_dir), written


@pytest.fixture
def sampled(logged):
    return [row.step for row in logged[0].history.rows if "grad_norm" in row.values]


def test_tensorboard_of_both_gets_the_heatmap_and_the_histograms(logged, sampled):
    events = EventAccumulator(str(logged[1]), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    assert "gradflow/heatmap" in events.Tags()["images"]
    assert {"gradflow/grad_hist_early", "gradflow/grad_hist_late"} <= set(events.Tags()["histograms"])
    assert [event.step for event in events.Scalars("gradflow/grad_norm_total")] == sampled


def test_csv_of_both_gets_the_scalars(logged, sampled):
    with (logged[2] / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["gradflow/grad_norm_total"]] == sampled


def test_wandb_of_both_gets_the_heatmap_the_alert_and_the_findings(logged, sampled):
    run = read_run(logged[3])
    assert run.rows_with("gradflow/heatmap")
    assert run.rows_with("gradflow/findings")
    assert [row["trainer/global_step"] for row in run.rows_with("gradflow/layers")] == sampled
    assert any("Vanishing gradient" in title for title, _, _ in run.alerts)


def test_the_report_of_both_lies_in_the_folder_of_the_first_logger(logged):
    assert logged[0].report_path == logged[1] / "gradflow_report.html"
