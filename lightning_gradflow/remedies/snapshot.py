"""What a run can go back to: its weights, its buffers, and what its optimizers remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.remedies.copies import Copy, Put, is_unset, kept_of, nbytes_of, part_of
from lightning_gradflow.remedies.training import of_one_process


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run's weights, buffers and optimizer states at one moment, in the memory of the CPU.

    Every tensor is copied, tied ones once, buffers that no checkpoint holds too; of a tensor that is spread over ranks
    each rank keeps its own part, so that neither taking nor restoring one needs a word from the others. Not part of it
    are the settings of parameter groups (schedulers own those), random state, and what a model keeps outside of its
    parameters and buffers.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> snapshot = Snapshot.take(layer, [])
        >>> snapshot.nbytes
        16
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> snapshot.restore(layer, [])
        ()
        >>> layer.weight.sum().item()
        4.0
    """

    _parameters: Mapping[str, tuple[nn.Parameter, Copy]]
    _buffers: Mapping[str, Copy]
    _states: Sequence[tuple[type, Mapping[Any, Any]]]
    nbytes: int
    """How much memory it takes."""

    @classmethod
    @torch.no_grad()
    def take(cls, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Snapshot:
        """Copies everything as it is now; waits for the device."""
        copies: dict[int, Copy] = {}
        parameters = {name: (p, kept_of(p, copies)) for name, p in model.named_parameters() if not is_unset(p)}
        buffers = {name: kept_of(buffer, copies) for name, buffer in model.named_buffers() if not is_unset(buffer)}
        states = [(type(o), {key: kept_of(state, copies) for key, state in o.state.items()}) for o in optimizers]
        return cls(parameters, buffers, states, sum(nbytes_of(c.values) for c in copies.values()))

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[str, ...]:
        """Brings everything back, in place where there is a tensor to write to; may be done again and again.

        Gradients are dropped. Optimizer state that came later is removed, and what was removed since is made anew. A
        parameter that was added, replaced or given another shape since stays as it is, and without optimizer state.

        Args:
            model: the one that it was taken of.
            optimizers: the same ones, in the same order.

        Returns:
            The names of the parameters and buffers that could not be brought back.
        """
        put = Put()
        now = {name: p for name, p in model.named_parameters() if not is_unset(p)}
        lost = [name for name, p in now.items() if not self._knows(name, p)] + [
            n for n in self._parameters if n not in now
        ]
        for name, (parameter, kept) in self._parameters.items():
            if name not in lost:
                put.into(kept, parameter)
        lost += self._restore_buffers(model, put)

        own = {id(p) for p in now.values()}
        usable = {id(p) for name, (p, _) in self._parameters.items() if name not in lost}
        for i, optimizer in enumerate(optimizers):
            kind, states = self._states[i] if i < len(self._states) else (None, {})
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            # of what the model does not own nothing is known: it may be trained all the same
            allowed = {id(p) for p in trained if id(p) in usable or id(p) not in own}
            states = {k: s for k, s in states.items() if not isinstance(k, Tensor) or id(k) in allowed}
            before = dict(optimizer.state)
            optimizer.state.clear()
            if kind is type(optimizer):
                optimizer.state.update({key: put(kept, before.get(key)) for key, kept in states.items()})
            for parameter in trained:
                parameter.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        return tuple(lost)

    def _knows(self, name: str, parameter: nn.Parameter) -> bool:
        known, kept = self._parameters.get(name, (None, None))
        return known is parameter and kept is not None and kept.values.shape == part_of(parameter).shape

    def _restore_buffers(self, model: nn.Module, put: Put) -> list[str]:
        now = dict(model.named_buffers())
        lost = [name for name in now if name not in self._buffers]
        for name, kept in self._buffers.items():
            path, _, leaf = name.rpartition(".")
            try:
                owner = model.get_submodule(path)
            except AttributeError:
                lost.append(name)
                continue
            restored = put(kept, now.get(name))
            if restored is not now.get(name):
                setattr(owner, leaf, restored)  # models replace their buffers at will: one of another shape is put back
        return lost


def size(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """The bytes that a snapshot will take, before one is taken.

    Weights, buffers and optimizer state that is there are counted. State that is still to come, as before the first
    step, is foreseen: a parameter without state will have as much per byte as those that have it in the same
    optimizer; where none has, the settings of the group tell the number of values per weight (2 for Adam, 3 with
    amsgrad, 1 for SGD with momentum, `2 * history_size + 2` for LBFGS, ...), and 2 where they do not. Counters are left
    out, some bytes a parameter.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> size(layer, []), size(layer, [torch.optim.Adam(layer.parameters())])
        (16, 48)
    """
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers()) if not is_unset(t)}
    return sum(nbytes_of(t) for t in tensors.values()) + sum(map(_state_size, optimizers))


@torch.no_grad()
def is_finite(model: nn.Module, averaged: Callable[[Tensor], Tensor] = of_one_process) -> bool:
    """Whether no parameter and no buffer of a model is spoilt; the host waits for the device once.

    A parameter is spoilt by NaN and by infinity, a buffer by NaN and +inf: -inf is what attention masks are made of,
    and running statistics that have gone to it have a variance that is not finite either.

    Args:
        model: on any number of devices.
        averaged: mean over all ranks, a collective, so that all get the same answer: ranks hold different parts, and
            different running statistics under DDP.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> is_finite(layer)
        True
        >>> layer.running_var[1] = float("inf")
        >>> is_finite(layer)
        False
    """
    fine = [_readable(p).isfinite().all() for p in model.parameters() if not is_unset(p)]
    for buffer in model.buffers():
        if not is_unset(buffer) and (buffer.is_floating_point() or buffer.is_complex()):
            values = _readable(buffer)
            fine.append((values.isfinite() if values.is_complex() else values < math.inf).all())
    if not fine:
        return True
    device = fine[0].device
    return bool(averaged(torch.stack([flag.to(device) for flag in fine]).all().float()) == 1.0)


def _readable(tensor: Tensor) -> Tensor:
    """In a format that can be compared: those of 8 bit can't."""
    part = part_of(tensor)
    return part.float() if part.is_floating_point() and part.element_size() < 2 else part


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _state_size(optimizer: torch.optim.Optimizer) -> int:
    known = {id(t): t for t in _tensors(dict(optimizer.state))}
    found = sum(map(nbytes_of, known.values()))
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if "history_size" in optimizer.defaults:  # LBFGS: all of its state stands at one parameter, and grows
        return max(found, sum(nbytes_of(p) * _values_per_weight(group) for p, group in trained))
    per_byte = found / have if (have := sum(nbytes_of(p) for p, _ in trained if optimizer.state.get(p))) else None
    new = [(p, group) for p, group in trained if not optimizer.state.get(p)]
    return found + sum(
        round(nbytes_of(p) * (_values_per_weight(group) if per_byte is None else per_byte)) for p, group in new
    )


def _values_per_weight(group: dict[str, Any]) -> int:
    """By the names that torch's optimizers and most others give to their settings."""
    if "history_size" in group:
        return 2 * int(group["history_size"]) + 2
    if "beta2_decay" in group:  # Adafactor: a row and a column of a matrix; one per weight is the most it can be
        return 1
    if "betas" in group:
        return 2 + bool(group.get("amsgrad"))
    if "momentum" in group or "alpha" in group:
        return bool(group.get("momentum")) + ("alpha" in group) + bool(group.get("centered"))
    if "lr_decay" in group:  # Adagrad
        return 1
    return 2
