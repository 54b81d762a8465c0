"""Imports run one way, and each room knows only what it may."""

from pathlib import Path

import pytest

import lightning_gradflow
from tests.contract.layering import PACKAGE, violations

SOURCES = Path(lightning_gradflow.__file__).parent


def _module(path: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(SOURCES).with_suffix("").parts])


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=_module)
def test_the_imports_of_a_file_keep_the_contract(path):
    assert violations(path.read_text(encoding="utf-8"), _module(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("history", "import torch"),
        ("metrics", "from lightning_gradflow.history import Row"),
        ("history", "from lightning_gradflow.findings import Finding"),
        ("findings", "def f():\n    import scipy.stats"),
        ("detectors.vanishing", "from lightning_gradflow.recorder import Recorder"),
        ("detectors.vanishing", "from lightning_gradflow import recorder"),
        ("detectors.vanishing", "from ..recorder import Recorder"),
        ("detectors.vanishing", "from lightning_gradflow.advice import explain"),
        ("detectors.__init__", "from ..advice import explain"),
        ("detectors.vanishing", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("advice.explanations", "def f():\n    from lightning_gradflow.recorder import Recorder"),
        ("probes.gradients", "import lightning as L"),
        ("probes.gradients", "def f():\n    from pytorch_lightning import Trainer"),
        ("probes.gradients", "from lightning_gradflow.sinks.base import Sink"),
        ("remedies.clip", "import lightning.pytorch"),
        ("recorder", "from lightning.pytorch import Trainer"),
        ("recorder", "from lightning_gradflow.callbacks.base import Base"),
        ("figures", "import matplotlib.pyplot as plt"),
        ("figures", "import torch"),
        ("sinks.wandb", "import wandb"),
        ("sinks.wandb", "class A:\n    import wandb"),
        ("sinks.console", "try:\n    from rich.console import Console\nexcept ImportError:\n    pass"),
        ("sinks.tensorboard", "from torch.utils.tensorboard import SummaryWriter"),
        ("sinks.report", "import torch"),
        ("sinks.report", "from lightning.pytorch.loggers import Logger"),
        ("callbacks.base", "from torch.utils import tensorboard"),
        ("callbacks.base", "import lightning_gradflow"),
        ("gradflow", "import plotly.graph_objects"),
        ("somewhere_new", "import math"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert len(violations(source, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("history", "import math\nimport numpy as np\nfrom lightning_gradflow.metrics import METRICS"),
        ("detectors.vanishing", "from .trend import theil_sen\nfrom lightning_gradflow.findings import Finding"),
        ("probes.gradients", "import torch, torchmetrics\nfrom lightning_gradflow.history import Point"),
        ("figures", "def f():\n    import matplotlib.pyplot"),
        ("sinks.wandb", "def f():\n    import wandb, torch"),
        ("sinks.wandb", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from wandb import Run"),
        ("recorder", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning.pytorch import Trainer"),
        ("callbacks.base", "import lightning as L\nfrom lightning_gradflow.recorder import Recorder"),
        ("gradflow", "import lightning as L\nfrom lightning_gradflow.callbacks.base import Base"),
        ("__init__", "from lightning_gradflow.gradflow import GradFlow"),
    ],
)
def test_an_import_that_may_stand_is_let_pass(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []
