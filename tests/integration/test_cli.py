"""LightningCLI builds the callbacks from YAML."""

import sys

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_gradflow import GradFlow

CONFIG = """
trainer:
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_gradflow.GradFlow
      init_args:
        every_n_steps: 7
        mitigate: "off"
        report: false
        saturation:
          class_path: lightning_gradflow.SaturationMonitor
          init_args:
            max_dead: 0.7
    - class_path: lightning.pytorch.callbacks.TQDMProgressBar
"""


# what Lightning 2.6 calls jsonargparse by
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_gradflow_and_its_children_can_be_written_in_yaml(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=0)
    (flow,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, GradFlow)]
    assert (flow.every_n_steps, flow.report) == (7, False)
    detectors = [detector for part in flow.parts() for detector in part.detectors(alone=False)]
    assert [detector.max_dead for detector in detectors if hasattr(detector, "max_dead")] == [0.7]
