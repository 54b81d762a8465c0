"""The layers that read what recurrences give out, and where their inputs lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.probes.layers import module_named
from lightning_gradflow.remedies.adjustment import Centre, centre_of
from lightning_gradflow.remedies.through_time import comes_from
from lightning_gradflow.remedies.training import RehearsalError, Training


def centres_behind(training: Training, layers: Sequence[str]) -> dict[str, Centre]:
    """Where the inputs of the linear layers lie that read what recurrences give out.

    The states of sigmoid units have one sign, and those of tanh units that were kept for long a mean of their own. A
    layer that reads them from where they lie takes long to learn more than a bias; see `InputScaling.hold`.

    Args:
        training: the run.
        layers: the layers of the recurrences, which are left out themselves.

    Returns:
        By name, the layers whose inputs lie further from 0 than they spread; nothing where the training step can't be
        rehearsed.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.3.

    Example:
        >>> from contextlib import nullcontext
        >>> from lightning_gradflow.history import History
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> run = lambda: nullcontext((net, lambda: net(x)))
        >>> list(centres_behind(Training(net, [], History(), run), ["0"]))
        ['2']
    """
    if training.rehearse is None:
        return {}
    try:
        with training.rehearse() as (model, run):
            return _measured(model, run, layers)
    except RehearsalError:
        return {}


def _measured(model: nn.Module, run: Callable[[], None], layers: Sequence[str]) -> dict[str, Centre]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers}
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    last: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, layer in linears.items():
            handle = layer.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.extend(args[:1]))
            hooks.callback(handle.remove)
        for name in layers:
            module = module_named(model, name)
            handle = module.register_forward_hook(lambda _, __, output, name=name: last.update({name: output}))
            hooks.callback(handle.remove)
        run()
    states = [state for output in last.values() for state in _tensors(output)]
    found = {
        name: centre_of(linears[name], torch.cat([x.reshape(-1, x.shape[-1]) for x in given]))
        for name, given in inputs.items()
        if given and any(comes_from(given[-1], state) for state in states)
    }
    return {name: centre for name, centre in found.items() if centre is not None}


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those that have a gradient, such as the sequence and the state of a recurrence."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
