"""The user's training step, called on a copy of the model of which nobody hears."""

from __future__ import annotations

import copy
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._pytree import tree_leaves

_SEED = 0
_DEVICES = ("cpu", "cuda")  # whose random state can be put back
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONNECTIONS = (
    "torch.distributed.device_mesh",
    "torch.distributed.distributed_c10d",
    "torch.distributed.fsdp",
    "torch._C._distributed_c10d",
)
"""Where the objects come from that connect processes."""


def can_rehearse(module: LightningModule) -> bool:
    """Whether the training step can be called by itself: it takes a batch, and random state can be put back."""
    takes_batches = "dataloader_iter" not in inspect.signature(module.training_step).parameters
    return takes_batches and module.device.type in _DEVICES


@contextmanager
def apart(module: LightningModule) -> Iterator[None]:
    """Random state is afterwards what it was, autograd is on, and compiled modules run eagerly."""
    error: Exception | None = None
    with ExitStack() as stack:
        # it restores the random state only where no error comes through
        stack.enter_context(isolate_rng(include_cuda=module.device.type == "cuda"))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        except Exception as raised:
            error = raised.with_traceback(None)
    if error is not None:
        raise error


def quiet_copy(trainer: Trainer, module: LightningModule, *others: Any) -> tuple[Any, ...]:
    """A deep copy of the module, and of what refers to it, that logs nothing and calls no hook of anyone's."""
    copied: tuple[Any, ...] = copy.deepcopy((module, *others), memo_of(module))
    _silence(copied[0], trainer)
    return copied


def step_of(
    trainer: Trainer, twin: LightningModule, batch: Any, batch_idx: int, check: Callable[[], None] = lambda: None
) -> Callable[[], Any]:
    """A function that makes one training step of a batch and gives what it returns, always the same.

    Args:
        trainer: whose precision it runs in.
        twin: the module to call; a quiet copy, on which optimizers and backward passes of a manual step do nothing.
        batch: it is not changed.
        batch_idx: its number.
        check: called before each pass; may raise.
    """
    takes_index = len(inspect.signature(twin.training_step).parameters) > 1

    def step() -> Any:
        check()
        # torch.manual_seed would seed devices too that the run has not used yet
        torch.default_generator.manual_seed(_SEED)
        if twin.device.type == "cuda":
            torch.cuda.manual_seed_all(_SEED)
        own = copy_of(batch)  # a step may change its batch in place
        with trainer.precision_plugin.train_step_context():
            return twin.training_step(own, batch_idx) if takes_index else twin.training_step(own)

    return step


def bytes_of(batches: Iterable[Any]) -> int:
    """The memory that the tensors of batches take."""
    return sum(leaf.nbytes for batch in batches for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def copy_of(batch: Any) -> Any:
    """A copy of a batch: of its tensors in the collections that Lightning knows, of any other object as a whole."""
    copied = apply_to_collection(batch, Tensor, Tensor.clone)
    return copy.deepcopy(batch) if copied is batch else copied


def loss_of(
    trainer: Trainer, twin: LightningModule, batch: Any, batch_idx: int, check: Callable[[], None] = lambda: None
) -> Callable[[], Tensor]:
    """The same, for the loss that a training step returns; see `step_of`."""
    step = step_of(trainer, twin, batch, batch_idx, check)

    def loss() -> Tensor:
        outputs = step()
        value = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if not isinstance(value, Tensor):
            raise ValueError("training_step returned no loss for a batch")
        return value.reshape(())

    return loss


def clip_of(trainer: Trainer, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
    """What the Trainer does to the gradients of an optimizer before each step; None for nothing."""
    limit = trainer.gradient_clip_val
    if not limit:
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip() -> None:
        if trainer.gradient_clip_algorithm == "value":
            clip_grad_value_(parameters, limit)
        else:
            clip_grad_norm_(parameters, limit)

    return clip


def check_memory(module: nn.Module, copies: int, device: torch.device | None = None) -> None:
    """Raises a `MemoryError` where so many copies of the parameters would need more than half of what is free.

    Args:
        module: whose parameters are counted; whole, where they are spread over ranks.
        copies: how many.
        device: where they would be; where the parameters are, if it is None.
    """
    parameters = list(module.parameters())
    need = copies * sum(p.numel() * p.element_size() for p in parameters)
    if device is None:
        device = next((p.device for p in parameters), torch.device("cpu"))
    free = math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * need > free:
        raise MemoryError(f"copies of the model would take {need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB")


def memo_of(module: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy that knows what a module keeps and torch refuses to copy.

    The results of a graph are cloned. What connects processes, such as meshes and groups, is not copied: there is one.
    """
    kept = [leaf for child in module.modules() for leaf in tree_leaves(list(vars(child).values()))]
    results = {id(x): x.detach().clone() for x in kept if isinstance(x, Tensor) and not x.is_leaf}
    return results | {id(x): x for x in kept if _connects(x)}


def _connects(value: Any) -> bool:
    return str(type(value).__module__).startswith(_CONNECTIONS) and not isinstance(value, (nn.Module, Tensor))


def _silence(twin: LightningModule, trainer: Trainer) -> None:
    """It sees the Trainer, logs nothing, and has no hooks but torch's own."""
    for child in twin.modules():
        if hasattr(child, "automatic_optimization") and hasattr(child, "log_dict"):
            child.__dict__["_trainer"] = trainer
            child.__class__ = _silent(type(child))
        for kind in _HOOKS:
            hooks = getattr(child, kind, {})
            for key in [key for key, hook in hooks.items() if not _is_of_torch(hook)]:
                del hooks[key]


def _is_of_torch(hook: Any) -> bool:
    """Whether it is one of torch's own, such as weight_norm, which the forward pass needs."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).startswith("torch.")


class _NoOptimizer:
    """Stands for an optimizer in a manual training step that is rehearsed: it steps nowhere."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = [dict(group) for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Nothing: there is no gradient."""

    @contextmanager
    def toggle_model(self, *_: Any, **__: Any) -> Iterator[None]:
        yield


def _silent(kind: type[nn.Module]) -> type[nn.Module]:
    dummy = DummyLogger()

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def optimizers(module: Any, *_: Any, **__: Any) -> Any:
        found = [_NoOptimizer(optimizer) for optimizer in module.__dict__["_trainer"].optimizers]
        return found[0] if len(found) == 1 else found

    members = {
        "log": nothing,
        "log_dict": nothing,
        "print": nothing,
        "logger": property(lambda _: dummy),
        "loggers": property(lambda _: [dummy]),
        "optimizers": optimizers,
        "lr_schedulers": nothing,
        "manual_backward": nothing,
        "clip_gradients": nothing,
        "toggle_optimizer": nothing,
        "untoggle_optimizer": nothing,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), members)
