"""A run that was cured goes on from a checkpoint, with the cure and without it."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow, GradFlowWarning


class _Net(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _fit(folder, steps, mode, lr=1.0, checkpoint=None):
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=32)
    flow = GradFlow(every_n_steps=4, mitigate=mode, report=False, console=False)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[flow],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(_Net(lr), data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return flow, [str(w.message) for w in told if w.category is GradFlowWarning and "mitigate" in str(w.message)]


@pytest.mark.parametrize(("mode", "is_told"), [("apply", False), ("suggest", True), ("off", True)])
def test_who_goes_on_without_the_cure_is_told_what_ends(tmp_path, mode, is_told):
    flow, _ = _fit(tmp_path, 48, "apply")
    assert [(action.kind, action.outcome) for action in flow.actions] == [("rollback", "kept")]
    resumed, told = _fit(tmp_path, 60, mode, checkpoint=tmp_path / "last.ckpt")
    assert [action.outcome for action in resumed.actions][:1] == ["kept"]
    assert any("was cured" in text for text in told) is is_told


def test_nothing_is_told_where_nothing_is_in_force(tmp_path):
    flow, _ = _fit(tmp_path, 24, "apply", lr=1e-3)
    assert flow.actions == ()
    assert _fit(tmp_path, 32, "suggest", lr=1e-3, checkpoint=tmp_path / "last.ckpt")[1] == []
