"""What a fit must not leave behind, a tiny model with a fixed order of data, and how two histories are compared."""

from __future__ import annotations

import sys

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import quiet_trainer

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_ALL_OPTIMIZERS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def process_traces() -> list[str]:
    """What is switched on in the whole process: hooks on all modules and optimizers, function modes, a stance."""
    everywhere = torch.nn.modules.module
    found = [name for kind in _OF_MODULES if getattr(everywhere, name := f"_global{kind}")]
    found += [kind for kind in _OF_ALL_OPTIMIZERS if getattr(sys.modules["torch.optim.optimizer"], kind)]
    found += [type(mode).__name__ for mode in _get_current_function_mode_stack()]
    found += [type(mode).__name__ for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()]
    if "torch._dynamo" in sys.modules and torch._dynamo.eval_frame._stance.stance != "default":
        found.append(torch._dynamo.eval_frame._stance.stance)
    return found


def traces(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[str]:
    """The same, and the hooks on a model, its parameters and optimizers."""
    found = process_traces()
    found += [f"{name}{kind}" for name, m in model.named_modules() for kind in _OF_MODULES if getattr(m, kind)]
    found += [f"{name}{kind}" for name, p in model.named_parameters() for kind in _OF_PARAMETERS if getattr(p, kind)]
    found += [kind for optimizer in optimizers for kind in _OF_OPTIMIZERS if getattr(optimizer, kind)]
    return found


class Tiny(L.LightningModule):
    """Three linear layers, the same ones each time."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Validated(Tiny):
    """The same with a validation loss."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())


def data(batches: int = 12, batch_size: int = 4) -> DataLoader:
    """The same batches in the same order, each time."""
    x = torch.randn(batches * batch_size, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size)


def flow(**kwargs) -> GradFlow:
    """A monitor of every step that shows nothing."""
    return GradFlow(**{"every_n_steps": 1, "report": False, "console": False, **kwargs})


def fit(callbacks, model=None, *, train=None, val=None, ckpt_path=None, **kwargs) -> L.Trainer:
    """Fits once, from the same seed each time."""
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(**{"max_epochs": 1, "callbacks": callbacks, **kwargs})
    trainer.fit(Tiny() if model is None else model, data() if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def assert_same_run(one: GradFlow, other: GradFlow) -> None:
    """All rows with all that is in them, all losses, findings and actions are the same, to the bit."""
    np.testing.assert_equal(one.history.state_dict(), other.history.state_dict())
    assert one.findings == other.findings
    assert one.actions == other.actions
