"""Every way of training that the numbers are checked in: a module, what the Trainer is told, and the reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision

from . import modules
from . import references as plain
from .modules import ADAM, ADAMW, SGD, Task
from .steps import Step, Weights

HALF = 1e-2  # bar of the relative error in half precision
SELECTED = {"output_spread": 0.05}  # of an output with more entries than are selected
EXACT = 1e-5  # and in single precision
STEPS = 6

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Mode:
    """One way of training.

    Args:
        module: builds the LightningModule, from the global generator.
        reference: initial weights and the batches of each epoch -> the steps as they should be.
        versus: the reference, in words.
        trainer: builds what the Trainer is told.
        batches: the batches of an epoch.
        epochs: how often they are gone through.
        bar: the largest relative error that is allowed.
        bars: quantity -> that of what is known less well.
        every_n_steps: how often the run is sampled.
        wrap: what is done with the module before it is fitted.
        compiled: whether anything is compiled.
    """

    module: Callable[[], L.LightningModule]
    reference: Callable[[Weights, Sequence[Batches]], list[Step]]
    versus: str = "own loop, fp32"
    trainer: Callable[[], Mapping[str, Any]] = dict
    batches: Callable[[], Batches] = field(default_factory=lambda: vectors)
    epochs: int = 1
    bar: float = EXACT
    bars: Mapping[str, float] = field(default_factory=dict)
    every_n_steps: int = 1
    wrap: Callable[[L.LightningModule], Any] = lambda module: module
    compiled: bool = False


# -- data -------------------------------------------------------------------------------------------------------------


@cache
def vectors(number=STEPS, rows=8):
    """Batches of (rows, 6) vectors and their class among 4."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(rows, 6, generator=generator) * 2, torch.randint(4, (rows,), generator=generator))
        for _ in range(number)
    ]


@cache
def indices(columns):
    """Batches of (8, columns) indices below 12 and their class among 4."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(12, (8, columns), generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(STEPS)
    ]


# -- the table --------------------------------------------------------------------------------------------------------


def _half(scale, backoff=0.5):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


def _automatic(net=plain.mlp, optimize=ADAMW, **how):
    return partial(plain.automatic, network=net, optimize=optimize, **how)


def _told(**arguments):
    return lambda: arguments


def _compiled(module, wrap=lambda module: module):
    batches = partial(vectors, 9)
    return Mode(
        module, _automatic(), "own loop, fp32, not compiled", batches=batches, every_n_steps=2, wrap=wrap, compiled=True
    )


_fp16, _bf16 = plain.to(torch.float16), plain.to(torch.bfloat16)
_LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
_FUSED = "own loop, fp16 autocast, own loss scale, optimizer not fused"

MODES: dict[str, Mode] = {
    "fp32": Mode(Task, _automatic()),
    # -- precision
    "bf16-mixed": Mode(
        Task, _automatic(context=_bf16), "own loop, bf16 autocast", _told(precision="bf16-mixed"), bar=HALF
    ),
    "bf16-true": Mode(
        Task, _automatic(dtype=torch.bfloat16), "own loop in bf16", _told(precision="bf16-true"), bar=HALF
    ),
    "16-true": Mode(
        partial(Task, optimize=SGD),
        _automatic(optimize=SGD, dtype=torch.float16),
        "own loop in fp16",
        _told(precision="16-true"),
        bar=HALF,
    ),
    "16-mixed": Mode(
        Task,
        _automatic(context=_fp16, scale=2.0**10),
        "own loop, fp16 autocast, own loss scale",
        lambda: _half(2.0**10),
        bar=HALF,
    ),
    "16-mixed, fused SGD": Mode(
        partial(Task, optimize=partial(SGD, fused=True)),
        _automatic(optimize=SGD, context=_fp16, scale=2.0**10),
        _FUSED,
        lambda: _half(2.0**10),
        bar=HALF,
    ),
    "16-mixed, fused Adam": Mode(
        partial(Task, optimize=partial(ADAM, fused=True)),
        _automatic(optimize=ADAM, context=_fp16, scale=2.0**10),
        _FUSED,
        lambda: _half(2.0**10),
        bar=HALF,
    ),
    "16-mixed, skipped steps": Mode(
        Task,
        _automatic(context=_fp16, scale=2.0**30, backoff=2.0**-8),
        "own loop, fp16 autocast, own loss scale",
        lambda: _half(2.0**30, 2.0**-8),
        bar=HALF,
    ),
    "16-mixed, skipped steps, fused Adam": Mode(
        partial(Task, optimize=partial(ADAM, fused=True)),
        _automatic(optimize=ADAM, context=_fp16, scale=2.0**30, backoff=2.0**-8),
        _FUSED,
        lambda: _half(2.0**30, 2.0**-8),
        bar=HALF,
    ),
    "16-mixed, accumulated and clipped": Mode(
        Task,
        _automatic(context=_fp16, scale=2.0**10, planned=3, clip=plain.norm_above(0.1)),
        "own loop, fp16 autocast, own loss scale, torch's clip_grad_norm_",
        lambda: _half(2.0**10) | {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        partial(vectors, 8),
        epochs=2,
        bar=HALF,
    ),
    # -- accumulation and clipping
    "accumulated, short last window": Mode(
        Task,
        _automatic(planned=3),
        "own loop, fp32, gradient of the mean loss",
        _told(accumulate_grad_batches=3),
        partial(vectors, 8),
        epochs=2,
    ),
    "accumulated, short last window, clipped": Mode(
        Task,
        _automatic(planned=3, clip=plain.norm_above(0.1)),
        "own loop, fp32, gradient of the mean loss",
        _told(accumulate_grad_batches=3, gradient_clip_val=0.1),
        partial(vectors, 8),
        epochs=2,
    ),
    "clipped by norm": Mode(
        Task,
        _automatic(clip=plain.norm_above(0.25)),
        "own loop, fp32, torch's clip_grad_norm_",
        _told(gradient_clip_val=0.25),
    ),
    "clipped by value": Mode(
        Task,
        _automatic(clip=plain.values_above(0.01)),
        "own loop, fp32, torch's clip_grad_value_",
        _told(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    ),
    "clipped by the module": Mode(modules.ClipsByItself, _automatic(clip=plain.halves)),
    # -- optimizers
    "manual": Mode(modules.Manual, partial(plain.manual, network=plain.mlp, optimize=ADAMW)),
    "manual, accumulated": Mode(
        partial(modules.Manual, 2), partial(plain.manual, network=plain.mlp, optimize=ADAMW, every=(2,))
    ),
    "manual, 16-mixed": Mode(
        modules.Manual,
        partial(plain.manual, network=plain.mlp, optimize=ADAMW, context=_fp16, scale=2.0**10),
        "own loop, fp16 autocast, own loss scale",
        lambda: _half(2.0**10),
        bar=HALF,
    ),
    "manual, optimizers at different rates": Mode(
        modules.Rates,
        partial(
            plain.manual, network=plain.mlp, optimize=ADAMW, every=(1, 2), parts=("net.a", ("net.middle", "net.c"))
        ),
    ),
    "GAN": Mode(modules.GAN, partial(plain.gan, optimize=ADAM)),
    "GAN, 16-mixed, skipped steps": Mode(
        modules.GAN,
        partial(plain.gan, optimize=ADAM, context=_fp16, scale=2.0**30, backoff=2.0**-8),
        "own loop, fp16 autocast, own loss scale",
        lambda: _half(2.0**30, 2.0**-8),
        bar=HALF,
    ),
    "LBFGS": Mode(
        partial(Task, optimize=_LBFGS),
        partial(plain.lbfgs, network=plain.mlp, optimize=_LBFGS),
        "own loop, fp32, first call of the closure; the loss of the last one",
    ),
    # -- parameters
    "training_step returns None": Mode(modules.SkipsBatches, _automatic(without=(1, 2, 5))),
    "accumulated, training_step returns None": Mode(
        modules.SkipsBatches,
        _automatic(planned=2, without=(1, 2, 5)),
        "own loop, fp32, gradient of the mean loss",
        _told(accumulate_grad_batches=2),
        partial(vectors, 8),
    ),
    "16-mixed, accumulated, training_step returns None": Mode(
        modules.SkipsBatches,
        _automatic(planned=2, without=(1, 2, 5), context=_fp16, scale=2.0**10),
        "own loop, fp16 autocast, own loss scale",
        lambda: _half(2.0**10) | {"accumulate_grad_batches": 2},
        partial(vectors, 8),
        bar=HALF,
    ),
    "unused and frozen parameters": Mode(partial(Task, modules.WithSpare), _automatic(thaw=("net.c.bias", STEPS))),
    "thawed parameters": Mode(modules.Thaws, _automatic(thaw=("net.a.", 2))),
    "tied weights": Mode(partial(Task, modules.Tied), _automatic(plain.tied)),
    "sparse embedding, SGD": Mode(
        partial(Task, modules.Words, partial(torch.optim.SGD, lr=0.2)),
        _automatic(plain.words, partial(torch.optim.SGD, lr=0.2)),
        batches=partial(indices, 3),
    ),
    "sparse embedding, SparseAdam": Mode(
        partial(Task, modules.Factors, torch.optim.SparseAdam),
        _automatic(plain.factors, torch.optim.SparseAdam),
        batches=partial(indices, 2),
    ),
    "large parameters, Adam": Mode(
        partial(Task, modules.Large, ADAM), _automatic(plain.large, ADAM), batches=partial(indices, 3), bars=SELECTED
    ),
    "large parameters, SGD": Mode(
        partial(Task, modules.Large, SGD), _automatic(plain.large, SGD), batches=partial(indices, 3), bars=SELECTED
    ),
    "complex parameters": Mode(partial(Task, modules.Complex, ADAM), _automatic(plain.complex_numbers, ADAM)),
    "channels last": Mode(
        partial(Task, modules.Convolutions), _automatic(plain.convolutions), "own loop, fp32, channels first"
    ),
    # -- calls
    "cell in a loop": Mode(partial(Task, modules.Loop), _automatic(plain.loop)),
    "cell in a loop, accumulated": Mode(
        partial(Task, modules.Loop),
        _automatic(plain.loop, planned=3),
        "own loop, fp32, gradient of the mean loss",
        _told(accumulate_grad_batches=3),
        partial(vectors, 8),
    ),
    "module used twice": Mode(partial(Task, modules.Twice), _automatic(plain.twice)),
    "shared layer": Mode(partial(Task, modules.Shared), _automatic(plain.shared)),
    "checkpointing, not reentrant": Mode(
        partial(Task, partial(modules.Checkpointed, False)), _automatic(), "own loop, fp32, no checkpointing"
    ),
    "checkpointing, reentrant": Mode(
        partial(Task, partial(modules.Checkpointed, True)), _automatic(), "own loop, fp32, no checkpointing"
    ),
    "checkpointing, reentrant, turn by turn": Mode(
        partial(Task, modules.LoopOfCheckpoints), _automatic(plain.loop), "own loop, fp32, no checkpointing"
    ),
    "checkpointing, reentrant, all turns at once": Mode(
        partial(Task, modules.LoopInCheckpoint), _automatic(plain.loop), "own loop, fp32, no checkpointing"
    ),
    # -- compiled; sampled steps run eagerly, so that there have to be others
    "compiled in place": _compiled(partial(modules.CompilesItself, "aot_eager")),
    "compiled submodule": _compiled(partial(modules.CompilesIntoWrapper, "aot_eager")),
    "compiled module": _compiled(Task, partial(torch.compile, backend="aot_eager")),
    # to find out which vector instructions there are takes the compiler most of its time
    "compiled module, inductor": _compiled(Task, partial(torch.compile, options={"cpp.vec_isa_ok": False})),
}
