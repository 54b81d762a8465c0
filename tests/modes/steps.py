"""One step of a training by hand, and the numbers that follow from it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEAD_WINDOW = 3  # samples in a row in which a unit must be silent
PER_LAYER = (
    *("grad_norm", "grad_rms", "grad_mean_abs", "grad_max_abs", "grad_zero_fraction"),
    *("weight_norm", "update_norm", "update_ratio"),
)
PER_POINT = ("delta_norm", "output_rms", "output_spread", "in_graph", "saturated_fraction", "dead_fraction")
INPUT = "input_rms"
SCALARS = ("loss", "grad_norm_total", "clip_factor", "loss_scale", "step_skipped")
CALLS = "calls"
QUANTITIES = (*PER_LAYER, *PER_POINT, CALLS, INPUT, *SCALARS)

Weights = dict[str, Tensor]
Numbers = dict[str, dict[str, float]]  # quantity -> name of the layer, the point or the call -> value


# -- one forward and backward pass ------------------------------------------------------------------------------------


@dataclass
class Output:
    """What came out of one call of a layer or an activation."""

    point: str
    op: str
    tensor: Tensor
    delta: np.ndarray | None = None


class Pass:
    """A forward pass over given weights that notes every output, and the backward pass through it."""

    def __init__(self, weights: Weights):
        self.w = weights
        self.outputs: list[Output] = []
        self.input: Tensor | None = None  # (features, entries) of the first layer
        self._has_begun = False

    def begin(self, x, dim=-1):
        """Takes what goes into the first layer."""
        if not self._has_begun and x.is_floating_point():
            self.input = x.detach().movedim(dim, 0).flatten(1)
        self._has_begun = True
        return x

    def see(self, point, tensor, op=""):
        self.outputs.append(Output(point, op, tensor))
        return tensor

    def linear(self, name, x):
        return self.see(name, F.linear(self.begin(x), self.w[f"{name}.weight"], self.w[f"{name}.bias"]))

    def conv(self, name, x):
        return self.see(name, F.conv2d(self.begin(x, 1), self.w[f"{name}.weight"], self.w[f"{name}.bias"]))

    def rows(self, name, index, sparse):
        return self.see(name, F.embedding(self.begin(index), self.w[f"{name}.weight"], sparse=sparse))

    def tanh(self, point, x):
        return self.see(point, torch.tanh(x), "tanh")

    def sigmoid(self, point, x):
        return self.see(point, torch.sigmoid(x), "sigmoid")

    def relu(self, point, x):
        return self.see(point, F.relu(x), "relu")

    def backward(self, loss, names=None, unscale=1.0):
        """Adds to the gradients of the weights `names`; keeps the deltas, multiplied by `unscale`."""
        weights = [w for name, w in self.w.items() if w.requires_grad and (names is None or name in names)]
        outputs = [output for output in self.outputs if output.tensor.requires_grad]
        found = torch.autograd.grad(loss, [*weights, *(o.tensor for o in outputs)], allow_unused=True)
        for weight, gradient in zip(weights, found, strict=False):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        for output, delta in zip(outputs, found[len(weights) :], strict=True):
            if delta is not None:
                output.delta = entries(delta) * unscale


# -- one optimizer step -----------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What there is to know about one optimizer step, in double precision.

    Args:
        at: the number that Lightning logs it under.
    """

    at: int
    before: dict[str, np.ndarray] = field(default_factory=dict)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] | None = None
    backwards: list[list[Pass]] = field(default_factory=list)  # the passes that each backward of a batch belongs to
    losses: list[float] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)

    def new_pass(self, weights, backward=0):
        """A forward pass whose deltas count to the `backward`-th backward of its batch."""
        made = Pass(weights)
        while len(self.backwards) <= backward:
            self.backwards.append([])
        self.backwards[backward].append(made)
        return made

    def weights_before(self, weights):
        self.before |= {name: entries(w) for name, w in weights.items()}

    def take_gradients(self, weights, factor=1.0):
        self.gradients |= {name: entries(w.grad) * factor for name, w in weights.items() if w.grad is not None}

    def step_unless_overflown(self, weights, optimizer, scale):
        """The step of a gradient scaler: returns whether it was skipped."""
        self.take_gradients(weights, 1 / scale)
        if any(not np.isfinite(self.gradients[name]).all() for name in weights):
            return True
        for weight in weights.values():
            weight.grad = weight.grad / scale
        optimizer.step()
        self.weights_after(weights)
        return False

    def weights_after(self, weights):
        self.after = (self.after or {}) | {name: entries(w) for name, w in weights.items()}


def entries(tensor: Tensor) -> np.ndarray:
    """All entries in double precision; a complex number is two entries."""
    tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().numpy().copy()


def norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays))


def numbers(steps: Sequence[Step], sampled: Callable[[int], bool]) -> list[tuple[int, Numbers]]:
    """The row of each sampled step: its number, and what should stand in it. NaN and what is left out is missing."""
    rows, losses, silent = [], [], {}
    for step in steps:
        losses.append(np.mean(step.losses) if step.losses else math.nan)
        if sampled(step.at) and step.gradients:
            rows.append((step.at, _layers(step) | _points(step, silent) | _input(step) | _scalars(step, losses)))
            losses = []
    return rows


def _layers(step: Step) -> Numbers:
    found: Numbers = {quantity: {} for quantity in PER_LAYER}
    for layer in dict.fromkeys(_layer(name) for name in step.gradients):
        names = [name for name in step.gradients if _layer(name) == layer]
        g = np.concatenate([step.gradients[name].ravel() for name in names])
        values = {
            "grad_norm": np.sqrt((g**2).sum()),
            "grad_rms": np.sqrt((g**2).mean()),
            "grad_mean_abs": np.abs(g).mean(),
            "grad_max_abs": np.abs(g).max(),
            "grad_zero_fraction": (g == 0).mean(),
            "weight_norm": norm(step.before[name] for name in names),
        }
        if step.after is not None:
            values["update_norm"] = norm(step.after[name] - step.before[name] for name in names)
            values["update_ratio"] = values["update_norm"] / values["weight_norm"]
        for quantity, value in values.items():
            found[quantity][layer] = float(value) if np.isfinite(value) else math.inf
    return found


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _points(step: Step, silent: dict[str, list[np.ndarray]]) -> Numbers:
    found: Numbers = {quantity: {} for quantity in (*PER_POINT, CALLS)}
    everything = [output for passes in step.backwards for made in passes for output in made.outputs]
    for point in dict.fromkeys(output.point for output in everything):
        mine = [output for output in everything if output.point == point]
        out = np.concatenate([entries(output.tensor).ravel() for output in mine])
        found["output_rms"][point] = np.sqrt((out**2).mean())
        if not mine[0].op:
            spread = np.concatenate([(out - out.mean(0)).ravel() for out in (entries(o.tensor) for o in mine)])
            found["output_spread"][point] = np.sqrt((spread**2).mean() / (out**2).mean())
            found["in_graph"][point] = np.mean([output.tensor.requires_grad for output in mine])
        if mine[0].op == "tanh":
            found["saturated_fraction"][point] = (np.abs(out) > 0.99).mean()
        if mine[0].op == "sigmoid":
            found["saturated_fraction"][point] = ((out < 0.01) | (out > 0.99)).mean()
        if mine[0].op == "relu":
            fires = np.any([_by_unit(entries(output.tensor) != 0).any(axis=0) for output in mine], axis=0)
            silent.setdefault(point, []).append(~fires)
            if len(silent[point]) >= DEAD_WINDOW:
                found["dead_fraction"][point] = np.all(silent[point][-DEAD_WINDOW:], axis=0).mean()
    # only norms of one backward pass can be compared: the one that reached the most points comes first
    by_backward = [_deltas(passes) for passes in step.backwards]
    for calls in sorted(by_backward, key=lambda calls: -len({point for point, _ in calls})):
        for point in {point for point, _ in calls} - set(found["delta_norm"]):
            mine = {nth: deltas for (name, nth), deltas in calls.items() if name == point}
            found["delta_norm"][point] = norm(delta for deltas in mine.values() for delta in deltas)
            if len(mine) > 1:
                found[CALLS] |= {f"{point}[{nth}]": norm(deltas) for nth, deltas in mine.items()}
    # a delta that overflowed was measured
    return {quantity: {n: v if np.isfinite(v) else math.inf for n, v in row.items()} for quantity, row in found.items()}


def _input(step: Step) -> Numbers:
    # of a batch that goes through several networks in turn, what goes into the first
    parts = [made.input.double().numpy() for made in step.backwards[0] if made.input is not None]
    columns = np.concatenate(parts, axis=1) if parts else np.empty((0, 1))
    return {INPUT: {str(i): float(np.sqrt((column**2).mean())) for i, column in enumerate(columns)}}


def _deltas(passes: list[Pass]) -> dict[tuple[str, int], list[np.ndarray]]:
    """(point, n-th call of it in a forward pass) -> the deltas of all micro-batches."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for made in passes:
        for point in {output.point for output in made.outputs}:
            mine = [output for output in made.outputs if output.point == point]
            for nth, output in enumerate(mine):
                if output.delta is not None:
                    found.setdefault((point, nth), []).append(output.delta)
    return found


def _by_unit(values: np.ndarray) -> np.ndarray:
    """(..., U): the channels of a picture, else the last axis."""
    if values.ndim == 4:
        values = np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


def _scalars(step: Step, losses: list[float]) -> Numbers:
    total = norm(step.gradients.values())
    known = [loss for loss in losses if not math.isnan(loss)]
    found = {
        "loss": float(np.mean(known)) if known else math.nan,
        "grad_norm_total": total if math.isfinite(total) else math.inf,
        **step.scalars,
    }
    return {name: {"": found.get(name, math.nan)} for name in SCALARS}
