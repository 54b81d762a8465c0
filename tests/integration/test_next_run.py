"""What a cured run says of the next one."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo.data import digits

RATE = 8.0


class Hasty(LightningModule):
    """Kills its hidden units in a few steps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def codes(flow):
    """The rates that are advised."""
    advice = [s for finding in flow.findings for s in finding.suggestions if s.title == "Lower the learning rate"]
    return {s.code.splitlines()[-1].strip() for s in advice}


@pytest.fixture
def run(tmp_path):
    def train(mitigate):
        seed_everything(0, verbose=False)
        flow = GradFlow(mitigate=mitigate, console=False, report=False)
        trainer = Trainer(
            max_steps=100,
            accelerator="cpu",
            logger=False,
            callbacks=[flow],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with pytest.warns():
            trainer.fit(Hasty(), digits(0))
        return flow

    return train


def test_all_findings_of_a_rate_that_is_too_large_advise_the_same_one(run):
    flow = run("suggest")
    assert len({finding.kind for finding in flow.findings}) > 1
    assert len(codes(flow)) == 1


def test_the_rate_that_the_cure_found_is_the_one_that_is_advised(run):
    flow = run("apply")
    kept = [action for action in flow.actions if action.kind == "rollback" and action.outcome == "kept"]
    assert codes(flow) == {f'group["lr"] = {kept[-1].after["lr"]:.2g}  # it was {RATE:.3g}'}
