"""Trainings that learn, many of which look sick to a rule that reads sizes: no alarm may come from any of them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from .adapters import Experts, FrozenTrunk, pretrained, with_lora
from .case import Case, seeded
from .data import bags_of_words, breast_cancer, characters, diabetes, digit_pairs, digits, digits_val, noisy_digits
from .healthy_deep import CASES as DEEP
from .healthy_images import CASES as IMAGE_CASES
from .healthy_objectives import CASES as OBJECTIVES
from .healthy_runs import CASES as RUNS
from .healthy_sequences import CASES as SEQUENCES
from .stacks import TwoHeads, UnusedHead, highway, mlp, residual_mlp
from .task import ADAM, Task, ThawingTask, ValidatedTask, WeakHeadTask, reconstruction_loss, sequence_loss
from .text import GPT, WordBag
from .vision import GAN, Autoencoder, ResNet, RowLSTM, RowTransformer, energy_distance, pooled_convnet

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)
FASTER = partial(ADAM, lr=3e-3)
FASTEST = partial(ADAM, lr=5e-3)
IMAGES = partial(digits, image=True)
TRANSPOSED = partial(digits, transposed=True)
IN_PLACE = partial(nn.ReLU, inplace=True)


def _from_zero(step: int) -> float:
    """Linear warm-up over 40 steps whose first step has a learning rate of exactly 0."""
    return min(step / 40, 1.0)


_PLAIN = [
    Case(
        "relu_mlp",
        seeded(lambda: ValidatedTask(mlp(4, nn.ReLU), log=True)),
        digits,
        120,
        val=digits_val,
        family="plain",
    ),
    Case(
        "batchnorm_mlp_10",
        seeded(lambda: ValidatedTask(mlp(10, nn.ReLU, norm=True))),
        digits,
        120,
        val=digits_val,
        family="normalised",
    ),
    Case(
        "relu_in_place_dropout",
        seeded(lambda: Task(mlp(3, IN_PLACE, dropout=0.2), log=True)),
        digits,
        150,
        family="dropout",
    ),
    Case("sigmoid_shallow", seeded(lambda: Task(mlp(2, nn.Sigmoid), FASTER)), digits, 150, family="moderate_depth"),
    Case("tanh_4_default_init", seeded(lambda: Task(mlp(4, nn.Tanh), SGD)), digits, 120, family="moderate_depth"),
    Case("adamw_weight_decay", seeded(lambda: Task(mlp(4, nn.ReLU), ADAMW, log=True)), digits, 120, family="plain"),
    Case("unused_head", seeded(lambda: Task(UnusedHead())), digits, 120, family="unused_parts"),
    Case("weak_head_first", seeded(lambda: WeakHeadTask(TwoHeads())), digits, 120, family="several_losses"),
    Case("layer_scale", seeded(lambda: Task(residual_mlp(8, gamma=1e-6))), digits, 120, family="zero_branch"),
    Case("highway_20", seeded(lambda: Task(highway(20))), digits, 100, family="gates"),
    Case("idle_experts", seeded(lambda: Task(Experts())), digits, 120, family="unused_parts"),
    Case(
        "regression",
        seeded(lambda: Task(mlp(2, nn.ReLU, inputs=10, outputs=1), loss=F.mse_loss)),
        diabetes,
        100,
        family="regression",
    ),
    Case(
        "autoencoder",
        seeded(lambda: Task(Autoencoder(), loss=reconstruction_loss, log=True)),
        digit_pairs,
        150,
        family="autoencoder",
    ),
]

_IMAGES_AND_TEXT = [
    Case(
        "resnet",
        seeded(lambda: ValidatedTask(ResNet(), log=True)),
        IMAGES,
        60,
        val=partial(digits_val, image=True),
        family="residual",
    ),
    Case("resnet_zero_gamma", seeded(lambda: Task(ResNet(zero_gamma=True), SGD)), IMAGES, 60, family="zero_branch"),
    Case("convnet_max_pool", seeded(lambda: Task(pooled_convnet())), IMAGES, 100, family="plain"),
    Case("lstm_rows", seeded(lambda: Task(RowLSTM(), FASTER)), digits, 120, family="recurrent_images"),
    Case("transformer_encoder", seeded(lambda: Task(RowTransformer(), log=True)), digits, 100, family="pre_ln"),
    Case(
        "gpt_tied", seeded(lambda: Task(GPT(), FASTEST, loss=sequence_loss, log=True)), characters, 130, family="pre_ln"
    ),
    Case(
        "sparse_bag",
        seeded(lambda: Task(WordBag(), partial(torch.optim.SGD, lr=1.0))),
        bags_of_words,
        200,
        family="unused_parts",
    ),
    Case("gan", seeded(GAN), digits, 400, score=energy_distance, family="adversarial"),
]

_TUNED = [
    Case("lora", seeded(lambda: Task(with_lora(pretrained()), FASTER)), TRANSPOSED, 100, family="zero_branch"),
    Case(
        "frozen_trunk",
        seeded(lambda: Task(FrozenTrunk(pretrained()), FASTER, only_trainable=True)),
        TRANSPOSED,
        150,
        family="frozen",
    ),
    Case("thawing", seeded(lambda: ThawingTask(mlp(3, nn.ReLU), thaw_at=50)), digits, 120, family="frozen"),
]

_UNUSUAL_RUNS = [
    Case(
        "loss_times_1e-6",
        # Adam's default eps of 1e-8 would stop gradients as small as these.
        seeded(lambda: Task(mlp(3, nn.ReLU), partial(ADAM, eps=1e-16), scale=1e-6, log=True)),
        digits,
        120,
        family="loss_scale",
    ),
    Case("loss_times_1e6", seeded(lambda: Task(mlp(3, nn.ReLU), scale=1e6)), digits, 120, family="loss_scale"),
    Case(
        "accumulation",
        seeded(lambda: Task(mlp(3, nn.ReLU), FASTER)),
        # 25 batches: the last window of an epoch has one batch where the others have four.
        partial(digits, batch_size=60),
        60,
        trainer_kwargs={"accumulate_grad_batches": 4},
        family="accumulation",
    ),
    Case(
        "converged_cosine",
        seeded(
            lambda: Task(
                mlp(2, nn.ReLU, inputs=30, outputs=2), FASTER, schedule=partial(CosineAnnealingLR, T_max=300), log=True
            )
        ),
        breast_cancer,
        300,
        family="converged",
    ),
    Case(
        "warm_up_from_zero",
        seeded(lambda: Task(mlp(3, nn.ReLU), schedule=partial(LambdaLR, lr_lambda=_from_zero))),
        digits,
        150,
        family="schedule",
    ),
    Case("label_noise", seeded(lambda: Task(mlp(3, nn.ReLU), log=True)), noisy_digits, 150, family="label_noise"),
]

_CASES = [*_PLAIN, *_IMAGES_AND_TEXT, *_TUNED, *_UNUSUAL_RUNS, *DEEP, *IMAGE_CASES, *OBJECTIVES, *RUNS, *SEQUENCES]
HEALTHY: dict[str, Case] = {case.name: case for case in _CASES}
