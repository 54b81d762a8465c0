"""Parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lightning_gradflow.probes.layers import LayerMap

_TORCHS_OWN = {"_parameters", "_buffers", "_modules"}
_DEPTH = 2  # lists in lists


def unheld(
    model: nn.Module, layers: LayerMap, unregistered: Mapping[str, list[Tensor]], held: Iterable[Tensor]
) -> dict[str, int]:
    """How many entries of each layer get a gradient although no optimizer holds them.

    An optimizer that was made before a layer was replaced, or of a part of the model, leaves such parameters behind;
    so do layers in a list of Python's, which `parameters()` does not know. What was left out on purpose looks the same.

    Args:
        model: whose parameters are looked at.
        layers: tells which layer they belong to.
        unregistered: what `find_unregistered` found.
        held: the parameters of all optimizers.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> unheld(model, LayerMap(model), {}, model[1].parameters())
        {'0': 9}
    """
    known = {id(parameter) for parameter in held}
    found: dict[str, int] = {}
    named = ((layers.owner(p), p) for p in model.parameters() if id(p) not in known)
    beside = ((name, p) for name, tensors in unregistered.items() for p in tensors if id(p) not in known)
    for name, parameter in (*named, *beside):
        if name is not None and parameter.requires_grad and parameter.grad is not None:
            found[name] = found.get(name, 0) + parameter.numel()
    return found


def find_unregistered(model: nn.Module) -> dict[str, list[Tensor]]:
    """What modules hold as attributes, by name, and is no parameter of theirs although it could be trained.

    Layers in lists and dicts of Python's are such, and tensors that require a gradient.

    Example:
        >>> model = nn.Module()
        >>> model.hidden = [nn.Linear(2, 3), nn.Linear(3, 3)]
        >>> {name: len(tensors) for name, tensors in find_unregistered(model).items()}
        {'hidden': 4}
    """
    known = {id(parameter) for parameter in model.parameters()}
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _TORCHS_OWN or not isinstance(value, (list, tuple, dict, Tensor)):
                continue
            tensors = [t for t in _trainable(value, _DEPTH) if id(t) not in known]
            if tensors:
                found[f"{name}.{attribute}" if name else attribute] = tensors
    return found


def _trainable(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _trainable(item, depth - 1)
