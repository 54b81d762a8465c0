"""What the numbers have to be: one process, the batches of all ranks, plain autograd in float64.

It knows nothing of the package under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .nets import BATCH, Traced, data
from .runs import WINDOW, Run

Numbers = dict[str, dict[str, float]]
"""Quantity -> name of a layer or point, or nothing for a scalar -> value."""

_SATURATED = ("tanh", "act", "sigmoid")


def reference(run: Run, weights: Sequence[Mapping[str, Tensor]]) -> list[Numbers]:
    """The numbers of each step.

    Args:
        run: what was trained.
        weights: all of them before each batch, and after the last one.
    """
    net = run.make().double()
    silent: dict[str, list[np.ndarray[Any, Any]]] = {}
    steps = []
    for window in run.windows:
        before, after = weights[window[0]], weights[window[-1] + 1]
        net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in before.items()})
        gradients, outputs, deltas, loss = _backward(run, net, window)
        numbers = _layer_numbers(gradients, before, after) | _point_numbers(net, outputs, deltas, silent)
        numbers |= _input_numbers(run, window)
        total = math.sqrt(sum(value**2 for value in numbers["grad_norm"].values()))
        limit = run.kwargs.get("gradient_clip_val", math.inf)
        clipped = min(1.0, limit / (total + 1e-6))  # the small number is what torch adds
        numbers |= {"loss": {"": loss}, "grad_norm_total": {"": total}, "clip_factor": {"": clipped}}
        steps.append(numbers)
    return steps


def _batches(run: Run, batch: int) -> list[tuple[Tensor, Tensor]]:
    """The parts of a batch that the ranks have."""
    size = run.replicas * BATCH
    x, y = (rows[batch * size : (batch + 1) * size] for rows in data(run.rows))
    return [(x[rank :: run.replicas], y[rank :: run.replicas]) for rank in range(run.replicas)]


def _backward(run: Run, net: Traced, window: range) -> tuple[Any, ...]:
    """Gradients by parameter, outputs and deltas by point and by turn, and the loss, of the mean over all batches."""
    parameters = dict(net.named_parameters())
    outputs: dict[str, list[list[Tensor]]] = {}
    losses = []
    for batch in window:
        for x, y in _batches(run, batch):
            out, seen = net.trace(x.double())
            losses.append(F.cross_entropy(out, y))
            for point, turns in seen.items():
                rows = outputs.setdefault(point, [])
                rows += [[] for _ in range(len(turns) - len(rows))]
                for row, tensor in zip(rows, turns, strict=False):
                    row.append(tensor)
    loss = torch.stack(losses).mean()
    flat = [tensor for rows in outputs.values() for row in rows for tensor in row]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [*parameters.values(), *flat], allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, found, strict=False) if g is not None}
    rest = iter(found[len(parameters) :])
    deltas = {point: [[next(rest) for _ in row] for row in rows] for point, rows in outputs.items()}
    return gradients, outputs, deltas, loss.item()


def _flat(tensors: Sequence[Tensor]) -> Any:
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


def _layer_numbers(gradients: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Numbers:
    numbers: Numbers = {}
    owners = {name: f"net.{name}".rpartition(".")[0] for name in gradients}
    for layer in dict.fromkeys(owners.values()):
        mine = [name for name in gradients if owners[name] == layer]
        g = _flat([gradients[name] for name in mine])
        w, moved = (_flat([kept[f"net.{name}"] for name in mine]) for kept in (before, after))
        values = {
            "grad_norm": np.sqrt((g**2).sum()),
            "grad_rms": np.sqrt((g**2).mean()),
            "grad_mean_abs": np.abs(g).mean(),
            "grad_max_abs": np.abs(g).max(),
            "grad_zero_fraction": (g == 0).mean(),
            "grad_nonfinite_fraction": (~np.isfinite(g)).mean(),
            "weight_norm": np.sqrt((w**2).sum()),
            "update_norm": np.sqrt(((moved - w) ** 2).sum()),
            "update_ratio": np.sqrt(((moved - w) ** 2).sum() / (w**2).sum()),
        }
        for quantity, value in values.items():
            numbers.setdefault(quantity, {})[layer] = float(value)
    return numbers


def _point_numbers(net: Traced, outputs: Any, deltas: Any, silent: dict[str, list[Any]]) -> Numbers:
    numbers: Numbers = {
        "delta_norm": {},
        "output_rms": {},
        "output_spread": {},
        "in_graph": {},
        "saturated_fraction": {},
        "dead_fraction": {},
        "call_delta": {},
    }
    layers = {name for name, module in net.named_modules() if list(module.parameters(recurse=False))}
    for point, rows in outputs.items():
        name = f"net.{point}".rstrip(".")
        entries = _flat([tensor for row in rows for tensor in row])
        by_turn = [float(np.linalg.norm(_flat(row))) for row in deltas[point]]
        numbers["delta_norm"][name] = float(np.linalg.norm(by_turn))
        if len(by_turn) > 1:
            numbers["call_delta"] |= {f"{name} {turn}": value for turn, value in enumerate(by_turn)}
        numbers["output_rms"][name] = float(np.sqrt((entries**2).mean()))
        if point in layers:
            spread = _flat([tensor - tensor.mean(0) for row in rows for tensor in row])
            numbers["output_spread"][name] = float(np.sqrt((spread**2).mean() / (entries**2).mean()))
            numbers["in_graph"][name] = 1.0
        if point.endswith(_SATURATED):
            low = 0.01 if point.endswith("sigmoid") else -0.99
            numbers["saturated_fraction"][name] = float(((entries < low) | (entries > 0.99)).mean())
        if point.endswith("relu"):
            fires = np.any([(t != 0).flatten(0, -2).any(0).numpy() for row in rows for t in row], axis=0)
            silent.setdefault(point, []).append(~fires)
            if len(silent[point]) >= WINDOW:
                numbers["dead_fraction"][name] = float(np.all(silent[point][-WINDOW:], axis=0).mean())
    return numbers


def _input_numbers(run: Run, window: range) -> Numbers:
    if run.input_is_cut:
        return {"input_rms": {}}
    x = torch.cat([x for batch in window for x, _ in _batches(run, batch)]).double()
    return {"input_rms": {str(i): float(column.square().mean().sqrt()) for i, column in enumerate(x.T)}}


def silent_units(run: Run, rank: int, weights: Mapping[str, Tensor]) -> set[int]:
    """The units behind the first layer of `Mixed` that no row of one rank's first batch moves."""
    net = run.make()
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in weights.items()})
    x, _ = _batches(run, 0)[rank]
    return set(np.flatnonzero((net.trace(x)[1]["relu"][0] == 0).all(0).numpy()).tolist())
