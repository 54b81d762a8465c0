"""Parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.shards import local

_TORCHS_OWN = {"_parameters", "_buffers", "_modules"}
_DEPTH = 2  # lists in lists
_SOME = 256  # entries that tell whether a parameter has changed
_MOST = 1000  # items of a list: more are data


class Unheld:
    """Tells how many entries of each layer get a gradient although no optimizer holds them.

    An optimizer that was made before a layer was replaced, or of a part of the model, leaves such parameters behind;
    so do layers in a list of Python's, which `parameters()` does not know. What was left out on purpose looks the same.
    What has changed since the sample before is trained by something else, as weights are that are copied from others
    in a wider format, and does not count.

    Args:
        model: whose parameters are looked at.
        layers: tells which layer they belong to.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> unheld = Unheld(model, LayerMap(model))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> unheld.measure(model[1].parameters()), unheld.measure(model[1].parameters())
        ({'0': 9}, {'0': 9})
    """

    def __init__(self, model: nn.Module, layers: LayerMap) -> None:
        self._model, self._layers = model, layers
        self._unregistered = find_unregistered(model)
        self._before: dict[int, Tensor] = {}

    @torch.no_grad()
    def measure(self, held: Iterable[Tensor]) -> dict[str, int]:
        """Layer -> entries.

        Args:
            held: the parameters of all optimizers.
        """
        known = {id(parameter) for parameter in held}
        before, self._before = self._before, {}
        found: dict[str, int] = {}
        named = ((self._layers.owner(p), p) for p in self._model.parameters() if id(p) not in known)
        beside = ((name, p) for name, tensors in self._unregistered.items() for p in tensors if id(p) not in known)
        for name, parameter in (*named, *beside):
            if name is None or not parameter.requires_grad or parameter.grad is None:
                continue
            part = local(parameter)
            some = torch.empty(0) if part is None else part.detach().flatten()[:_SOME].clone()
            self._before[id(parameter)] = some
            # waits for the device: but only where something is left out
            if id(parameter) not in before or torch.equal(some, before[id(parameter)]):
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
            tensors = []
            with contextlib.suppress(Exception):  # what is not torch's may be anything
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
        items = value.values() if isinstance(value, dict) else value
        for item in islice(items, _MOST):
            yield from _trainable(item, depth - 1)
