"""Learning rates that are too large or too small, gradients clipped away or lost in fp16, targets without signal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from .data import diabetes, digits
from .fault import IMAGES, SGD, fault
from .faulty_data import shuffled_labels, table
from .stacks import he, mlp, residual_mlp
from .task import ADAM, Task
from .vision import ResNet, RowTransformer, pooled_convnet


def _relu(depth: int = 3) -> nn.Module:
    return he(mlp(depth, nn.ReLU))


def _same(make: Callable[[], nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    return {"sick": make, "twin": make}


def _sgd(lr: float, **kwargs: float) -> partial[Task]:
    return partial(Task, optimize=partial(torch.optim.SGD, lr=lr, **kwargs))


def _adam(lr: float) -> partial[Task]:
    return partial(Task, optimize=partial(ADAM, lr=lr))


class PostNorm(nn.Module):
    """PyTorch's own encoder as it was first published: normalising after each addition, with nothing to warm it up."""

    def __init__(self, depth: int, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify flattened images (B, 64) from the features of their eight rows."""
        output: Tensor = self.head(self.encoder(self.embed(x.view(-1, 8, 8))).mean(1))
        return output


class HalfInput(nn.Module):
    """Converts the input to the type of the weights, as ``16-true`` wants it."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        output: Tensor = self.net(x.to(next(self.parameters()).dtype))
        return output


_large = partial(
    fault,
    family="learning_rate_large",
    kinds="nonfinite_gradient exploding_gradient loss_plateau dead_units update_ratio",
    causes="learning_rate_too_large",
)
_large_norm = partial(_large, family="learning_rate_large_norm")
_small = partial(
    fault,
    family="learning_rate_small",
    kinds="loss_plateau update_ratio",
    causes="learning_rate_too_small",
    max_steps=300,
)
_clipped = partial(_small, family="clipped_away", task=partial(Task, optimize=SGD), twin_kwargs={})
_signal = partial(
    fault,
    family="no_signal",
    kinds="loss_plateau",
    causes="no_signal_in_data",
    max_steps=400,
)
_fp16 = partial(
    fault,
    family="fp16",
    kinds="vanishing_gradient",
    causes="underflow",
    twin_kwargs={},
    data=digits,
    **_same(lambda: HalfInput(he(mlp(4, nn.ReLU)))),
)
_AUTOCAST = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", enabled=False))]}

CASES = [
    _large("sgd_lr_30", **_same(_relu), task=_sgd(30.0), twin_task=_sgd(0.05)),
    _large("sgd_lr_2_momentum", **_same(_relu), task=_sgd(2.0, momentum=0.9), twin_task=_sgd(0.05, momentum=0.9)),
    _large("adam_lr_1", **_same(_relu), task=_adam(1.0), twin_task=_adam(1e-3)),
    _large("adam_lr_0.1_conv", **_same(pooled_convnet), data=IMAGES, task=_adam(0.1), twin_task=_adam(1e-3)),
    _large("tanh_adam_lr_1", **_same(lambda: mlp(3, nn.Tanh)), task=_adam(1.0), twin_task=_adam(1e-3)),
    _large_norm(
        "transformer_adam_lr_0.3", **_same(RowTransformer), task=_adam(0.3), twin_task=_adam(1e-3), max_steps=150
    ),
    _large_norm(
        "residual_sgd_lr_20", **_same(lambda: residual_mlp(4, gamma=0.1)), task=_sgd(20.0), twin_task=_sgd(0.05)
    ),
    _large(
        "post_ln_12_no_warm_up",
        **_same(lambda: PostNorm(12)),
        task=_adam(6e-3),
        twin_task=_adam(1e-3),
        family="post_ln",
        # the steps are too large for so deep a stack without a warm-up, and what they do to it is that the signal dies
        kinds="nonfinite_gradient exploding_gradient loss_plateau dead_units update_ratio vanishing_gradient",
        causes="learning_rate_too_large depth",
        max_steps=180,
    ),
    _small("sgd_lr_1e-6", **_same(_relu), task=_sgd(1e-6, momentum=0.9), twin_task=_sgd(0.02, momentum=0.9)),
    _small("adam_lr_1e-7", **_same(_relu), task=_adam(1e-7), twin_task=_adam(1e-3)),
    _small("resnet_adam_lr_1e-7", **_same(ResNet), data=IMAGES, task=_adam(1e-7), twin_task=_adam(1e-3), max_steps=220),
    _small(
        "sgd_lr_1e-5_regression",
        **_same(lambda: mlp(2, nn.ReLU, inputs=10, outputs=1)),
        data=diabetes,
        task=partial(Task, optimize=partial(torch.optim.SGD, lr=1e-5), loss=F.mse_loss),
        twin_task=partial(Task, optimize=partial(torch.optim.SGD, lr=0.05), loss=F.mse_loss),
    ),
    _small(
        "schedule_decays_at_once",
        **_same(_relu),
        task=partial(Task, optimize=SGD, schedule=partial(ExponentialLR, gamma=0.3)),
        twin_task=partial(Task, optimize=SGD),
    ),
    _clipped("clipped_norm_1e-6", **_same(_relu), trainer_kwargs={"gradient_clip_val": 1e-6}),
    _clipped(
        "clipped_value_1e-9",
        **_same(pooled_convnet),
        data=IMAGES,
        trainer_kwargs={"gradient_clip_val": 1e-9, "gradient_clip_algorithm": "value"},
    ),
    _fp16(
        "fp16_true_loss_1e-6",
        task=partial(Task, optimize=partial(torch.optim.SGD, lr=6e4), scale=1e-6),
        trainer_kwargs={"precision": "16-true"},
    ),
    _fp16(
        "fp16_autocast_no_scaler",
        task=partial(Task, optimize=partial(torch.optim.SGD, lr=5e5), scale=1e-7),
        trainer_kwargs=_AUTOCAST,
    ),
    _fp16(
        "fp16_autocast_adam",
        task=partial(Task, optimize=partial(ADAM, eps=1e-18), scale=1e-7),
        trainer_kwargs=_AUTOCAST,
    ),
    _signal(
        "shuffled_labels",
        **_same(lambda: he(mlp(2, nn.ReLU, width=16))),
        data=shuffled_labels,
        twin_data=partial(digits, batch_size=32),
        task=_sgd(0.05),
    ),
    _signal(
        "shuffled_labels_batchnorm",
        **_same(lambda: mlp(3, nn.ReLU, norm=True, dropout=0.3)),
        data=shuffled_labels,
        twin_data=partial(digits, batch_size=32),
    ),
    _signal(
        "shuffled_tumours",
        **_same(lambda: mlp(1, nn.Tanh, inputs=30, outputs=2, width=16)),
        data=partial(table, name="breast_cancer", shuffled=True),
        twin_data=partial(table, name="breast_cancer"),
        task=_sgd(0.05),
    ),
]
