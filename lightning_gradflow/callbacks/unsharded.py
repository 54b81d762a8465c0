"""A model that FSDP2 has spread over ranks, put together in each of them, and the way back into the parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_gradflow.callbacks.copies import memo_of
from lightning_gradflow.probes.shards import is_sharded, whole
from lightning_gradflow.remedies.copies import is_unset
from lightning_gradflow.remedies.textbook import assign

M = TypeVar("M", bound=nn.Module)

_FSDP = "torch.distributed.fsdp"
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # for torch.compile, on all modules below


def as_parts(module: nn.Module) -> None:
    """Lets a model have its parts for parameters, where a validation has left whole ones; no rank waits for another."""
    for child in module.modules():
        if _is_wrapped(child):
            child.reshard()  # type: ignore[operator]


@torch.no_grad()
def gathered(module: nn.Module, device: torch.device, meets_on: torch.device) -> dict[int, Tensor]:
    """All parameters and buffers of a model, whole; a collective for each, in the same order on every rank.

    What FSDP2 does not know of, such as buffers and the parameters that it was told to ignore, each rank has for
    itself: that of rank zero is taken.

    Args:
        module: the model.
        device: where they are wanted.
        meets_on: where collectives run.

    Returns:
        id of a parameter or buffer -> a copy of it, in its own precision.
    """
    found: dict[int, Tensor] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if id(tensor) in found or is_unset(tensor):
            continue
        values = (whole(tensor) if is_sharded(tensor) else of_first_rank(tensor, meets_on)).to(device, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
    return found


def of_first_rank(tensor: Tensor, meets_on: torch.device) -> Tensor:
    """What rank zero has of a tensor that is not spread: a collective."""
    values = tensor.detach().to(meets_on, copy=True).contiguous()
    dist.broadcast(values, src=0)
    return values


def whole_copy(module: M, tensors: Mapping[int, Tensor]) -> M:
    """A deep copy of a model without a trace of FSDP2; no rank waits for another.

    FSDP2 gives modules a class that refuses to be copied. Each such module is made anew here, of the class that it had
    before, and filled with a copy of what it holds. The model stays as it is.

    Args:
        module: the model.
        tensors: what stands in the place of its parameters and buffers; see `gathered`.
    """
    memo: dict[int, Any] = {**memo_of(module), **tensors}
    wrapped = [child for child in module.modules() if _is_wrapped(child)]
    for child in wrapped:
        own = _own_class(child)
        memo[id(child)] = own.__new__(own)
    copied = copy.deepcopy(module, memo)
    for child in wrapped:
        memo[id(child)].__setstate__(copy.deepcopy(_state_of(child), memo))
    for child in copied.modules():
        _clean(child)
    return copied


@torch.no_grad()
def write(parameters: Iterable[tuple[nn.Parameter, Tensor]], meets_on: torch.device) -> None:
    """Writes whole values into parameters, those of rank zero on all ranks: a collective for each.

    Args:
        parameters: in parts or not, each with its new values; the same ones on every rank. Their gradients are dropped.
        meets_on: where collectives run.
    """
    for parameter, values in parameters:
        assign(parameter, values if is_sharded(parameter) else of_first_rank(values, meets_on))


def _is_wrapped(module: nn.Module) -> bool:
    return any(map(_is_kind_of_fsdp, type(module).__mro__))


def _is_kind_of_fsdp(kind: type) -> bool:
    return kind.__name__ == "FSDPModule" and kind.__module__.startswith(_FSDP)


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was wrapped."""
    kinds = type(module).__mro__
    # the last one: a class of the user's that is called Module is wrapped in one of this name, too
    at = max(i for i, kind in enumerate(kinds) if _is_kind_of_fsdp(kind))
    own: type[nn.Module] = kinds[at + 1]
    return own


def _state_of(module: nn.Module) -> Any:
    """What a deep copy of it would be filled with."""
    if hasattr(_own_class(module), "__deepcopy__"):  # parametrized modules refuse to be asked
        return vars(module)
    return module.__reduce_ex__(4)[2]


def _clean(module: nn.Module) -> None:
    """Takes off the hooks of FSDP2, its state, and the methods that it has put in the place of others."""
    for key, value in list(vars(module).items()):
        if isinstance(value, dict):
            for name in [name for name, item in value.items() if _is_of_fsdp(item)]:
                del value[name]
        elif key in _MARKS or _is_of_fsdp(value):
            del vars(module)[key]


def _is_of_fsdp(item: Any) -> bool:
    if isinstance(item, (nn.Module, Tensor)):
        return False
    item = getattr(item, "hook", item)  # in some dictionaries of hooks these are wrapped
    function = getattr(item, "__func__", item)
    places = [
        type(item).__module__,
        type(getattr(item, "__self__", None)).__module__,
        getattr(function, "__globals__", {}).get("__name__", ""),
    ]
    return any(str(place).startswith(_FSDP) for place in places)
