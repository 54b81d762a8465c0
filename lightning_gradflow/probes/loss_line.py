"""Would another step length help? The loss along the next update, and whether batches agree on where to go."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import LOSS_LINE, PAIRING
from lightning_gradflow.probes.pairing import agreement

Losses = Sequence[Callable[[], Tensor]]
Tensors = list[Tensor]

FACTORS = (0.1, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7)
FAR = 1000.0
"""From this factor on a gain tells of steps that are too small.

A run that stands still has made 200 steps in vain, and one a hundred times as long can help a few samples by chance.
"""
PACKED = (*LOSS_LINE, *PAIRING)
"""What is sent together, in order."""

_GIVEN_UP = -1.0  # a gain: where the loss has doubled on both sides, longer steps need not be tried
_SAMPLED = 1 << 18  # gradient entries that batches are compared by: 32 MiB for 16 batches
_ITERATIONS = 12  # of the power iteration: enough for two digits where the largest eigenvalue stands out
_COARSE = 1e-4  # of the weights: a smaller step is rounded by float32 to three digits or fewer


def loss_line(
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    clip: Callable[[], None] | None = None,
    loss_scale: float = 1.0,
    normalised: bool = False,
) -> dict[str, float]:
    """What the loss does along the next update, on the batches that the update is made of and on others.

    The first half of the batches gives the gradient g and, through the optimizer, the step d. Then with w the weights

        gain(a) = 1 - loss(w + a d) / loss(w),    a in 0.1, 1, 10, 30, 100, 1000, ..., 1e7

    is taken on that half (`own`) and on the second one (`other`), outwards until the loss has doubled on both. A gain
    on the other half is learning; one on the own half alone is learning by heart.

    Whether the batches agree is told by the gradients g_i of all K of them: the cosine between the means of the halves,
    and the sum of g_i . g_j over all pairs, divided by its own standard deviation if the signs were random (near
    standard normal where there is no common direction, up to sqrt(K (K - 1) / 2) where all agree).

    Where a step raises the loss of its own half, its curvature is measured: lr * lambda_max of the Hessian, by power
    iteration; for optimizers that scale each entry by itself, whose steps lambda_max says nothing about, the same along
    d: -d.Hd / g.d. Both are stable up to 2.

    Everything is changed in the course of it: give it copies.

    Args:
        losses: (K,) each gives the training loss of one batch, always with the same random numbers; K >= 2.
        optimizer: of the copy; its state is used up.
        clip: clips the gradients, as is done before a real step.
        loss_scale: factor on the loss in the backward pass, for fp16; taken out of the gradients again.
        normalised: whether the optimizer scales its updates by the size of the gradient.

    Returns:
        `LOSS_LINE` by name; NaN where one cannot be told.

    References:
        Goodfellow, Vinyals and Saxe 2015, Qualitatively characterizing neural network optimization problems; Cohen et
        al. 2021, Gradient descent on neural networks typically occurs at the edge of stability.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> found = loss_line([lambda: w.square().sum()] * 2, torch.optim.SGD([w], lr=0.005))
        >>> round(found["line_gain_1x"], 4), found["line_best_factor"]  # 1 - 0.99^2; the minimum is at 100 steps
        (0.0199, 100.0)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    half = len(losses) // 2
    mean, sketches = _gradients(losses, half, parameters, loss_scale)
    found = dict.fromkeys(LOSS_LINE, math.nan) | _agreement(torch.stack(sketches), half)
    start = [p.detach().clone() for p in parameters]
    before = _means(losses, half)
    direction = _step(optimizer, parameters, start, mean, clip)
    if direction is None or not all(math.isfinite(loss) and loss != 0 for loss in before):
        return found
    found |= _walk(losses, half, parameters, start, direction, before)
    if found["line_gain_1x"] < 0:
        rate = max(float(group.get("lr", math.nan)) for group in optimizer.param_groups)
        along = direction if normalised else None
        found["sharpness"] = _sharpness(losses[:half], parameters, mean, along, rate)
    return found


def pack(found: Mapping[str, float]) -> list[float]:
    """The numbers as a vector that may be summed over ranks: (2, N) values and counts, and how many ranks there were.

    Example:
        >>> import numpy as np
        >>> unpack(np.add(pack({"sharpness": 2.0}), pack({"sharpness": 4.0})))["sharpness"]
        3.0
    """
    values = [found.get(name, math.nan) for name in PACKED]
    known = [math.isfinite(value) for value in values]
    numbers = [value if is_known else 0.0 for value, is_known in zip(values, known, strict=True)]
    return [*numbers, *map(float, known), 1.0]


def unpack(packed: Floats) -> dict[str, float]:
    """The means over the ranks that could tell, NaN where none could; `loss_line` is 1. Empty if nobody measured."""
    if not packed[-1]:
        return {}
    values, known = packed[:-1].reshape(2, -1)
    means = [value / n if n else math.nan for value, n in zip(values.tolist(), known.tolist(), strict=True)]
    return {**dict(zip(PACKED, means, strict=True)), "loss_line": 1.0}


def _gradients(losses: Losses, half: int, parameters: Tensors, scale: float) -> tuple[list[Tensor | None], Tensors]:
    """The mean gradient of the first half, and evenly spread entries of each batch's gradient, (K, N) in all."""
    mean: list[Tensor | None] = [None] * len(parameters)
    sketches = []
    stride = max(1, sum(p.numel() for p in parameters) // _SAMPLED)
    for i, loss in enumerate(losses):
        grads = _grad(loss() * scale, parameters)
        entries = []
        for at, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            if grad is None:
                entries.append(parameter.new_zeros(len(range(0, parameter.numel(), stride))).float())
                continue
            grad = grad.detach() / scale
            entries.append((grad.to_dense() if grad.is_sparse else grad).flatten()[::stride].float())
            if i < half:
                known = mean[at]
                mean[at] = grad / half if known is None else known + grad / half
        sketches.append(torch.cat(entries))
    return mean, sketches


def _grad(value: Tensor, parameters: Tensors, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """Its gradient, None for what takes no part, which the type of torch's own function does not tell."""
    return torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)


def _agreement(gradients: Tensor, half: int) -> dict[str, float]:
    """From (K, N) gradients."""
    gradients = gradients / gradients.abs().amax().clamp_min(torch.finfo(gradients.dtype).tiny)
    own, other = gradients[:half].mean(0), gradients[half:].mean(0)
    cosine = float(own @ other / (own.norm() * other.norm()))  # both norms may be zero, which gives NaN
    is_told = len(gradients) > 2  # of a single pair the deviation is its own size
    return {"gradient_cosine": cosine, "gradient_agreement": agreement(gradients) if is_told else math.nan}


@torch.no_grad()
def _means(losses: Losses, half: int) -> tuple[float, float]:
    """The mean loss of either half."""
    own, other = (torch.stack([loss().detach().float() for loss in part]) for part in (losses[:half], losses[half:]))
    first, second = torch.stack([own.mean(), other.mean()]).tolist()
    return first, second


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Tensors,
    start: Tensors,
    mean: Sequence[Tensor | None],
    clip: Callable[[], None] | None,
) -> Tensors | None:
    """The step that the optimizer makes of a gradient; None where it does not move."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict())
    factor = 1.0
    for _ in range(2):
        for parameter, grad in zip(parameters, mean, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        if clip is not None:
            clip()
        optimizer.step()
        step = [(p.detach() - w).float() / factor for p, w in zip(parameters, start, strict=True)]
        _move(parameters, start)
        length, size = _norm(step), _norm(start)
        if not math.isfinite(length) or length >= _COARSE * size or any(rate is None for rate in rates):
            break
        # the weights swallow most of so small a step: it is made again, larger, and taken as linear in the rate
        optimizer.load_state_dict(state)
        factor = 10 * _COARSE * size / max(length, 1e-12 * size)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate * factor
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
    return step if 0 < _norm(step) < math.inf else None


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([t.float().norm() for t in tensors]).norm())


@torch.no_grad()
def _move(parameters: Tensors, start: Tensors, step: Tensors | None = None, factor: float = 0.0) -> None:
    """Puts the parameters at `start + factor * step`."""
    for i, (parameter, value) in enumerate(zip(parameters, start, strict=True)):
        parameter.copy_(value if step is None else value.float() + factor * step[i])


def _walk(
    losses: Losses, half: int, parameters: Tensors, start: Tensors, step: Tensors, before: tuple[float, float]
) -> dict[str, float]:
    gains: dict[float, tuple[float, float]] = {}
    for factor in FACTORS:
        _move(parameters, start, step, factor)
        now = _means(losses, half)
        own, other = ((b - n) / abs(b) if math.isfinite(n) else -math.inf for b, n in zip(before, now, strict=True))
        gains[factor] = (own, other)
        if max(own, other) < _GIVEN_UP:
            break
    _move(parameters, start)
    best = max(gains, key=lambda factor: gains[factor][1])
    return {
        "line_gain_tenth": _finite(gains[0.1][0]),
        "line_gain_1x": _finite(gains.get(1.0, gains[0.1])[0]),
        "line_gain_own": max(0.0, *(own for own, _ in gains.values())),
        "line_gain_other": max(0.0, gains[best][1]),
        "line_gain_far": max([0.0, *(other for factor, (_, other) in gains.items() if factor >= FAR)]),
        "line_best_factor": best if gains[best][1] > 0 else math.nan,
    }


def _finite(gain: float) -> float:
    return max(gain, -1e6)  # an overflow on the way is a loss without bounds


def _sharpness(
    losses: Losses, parameters: Tensors, gradient: Sequence[Tensor | None], along: Tensors | None, rate: float
) -> float:
    """Curvature of the mean loss, in units of the step: stable up to 2."""
    product = _Hessian(losses, parameters)
    if along is not None:
        slope = -sum(float((g * d).sum()) for g, d in zip(gradient, along, strict=True) if g is not None)
        bend = sum(float((h * d).sum()) for h, d in zip(product(along), along, strict=True))
        return bend / slope if slope > 0 else math.nan
    vector = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(parameters, gradient, strict=True)]
    eigenvalue = math.nan
    for _ in range(_ITERATIONS):
        length = _norm(vector)
        if not 0 < length < math.inf:
            return math.nan
        vector = [v / length for v in vector]
        image = product(vector)
        eigenvalue = sum(float((h * v).sum()) for h, v in zip(image, vector, strict=True))
        vector = image
    return rate * eigenvalue


class _Hessian:
    """Products of the mean loss's Hessian with vectors: by a second backward pass, or by differences without one."""

    def __init__(self, losses: Losses, parameters: Tensors) -> None:
        self._losses = losses
        self._parameters = parameters
        self._is_exact = True

    def __call__(self, vector: Tensors) -> Tensors:
        if self._is_exact:
            try:
                return self._exact(vector)
            except RuntimeError:  # fused attention and cuDNN's recurrences have no second derivative
                self._is_exact = False
        return self._by_differences(vector)

    def _exact(self, vector: Tensors) -> Tensors:
        total = [torch.zeros_like(p) for p in self._parameters]
        for loss in self._losses:
            grads = _grad(loss(), self._parameters, create_graph=True)
            pairs = [(g, v) for g, v in zip(grads, vector, strict=True) if g is not None and g.requires_grad]
            inner = torch.stack([(g * v).sum() for g, v in pairs]).sum()
            seconds = _grad(inner, self._parameters)
            total = [t if h is None else t + h / len(self._losses) for t, h in zip(total, seconds, strict=True)]
        return total

    def _by_differences(self, vector: Tensors) -> Tensors:
        start = [p.detach().clone() for p in self._parameters]
        reach = 1e-3 * max(_norm(start), 1e-6) / _norm(vector)  # the cube root of float32's precision, near enough
        sides = []
        for sign in (1.0, -1.0):
            _move(self._parameters, start, vector, sign * reach)
            mean = [torch.zeros_like(p) for p in self._parameters]
            for loss in self._losses:
                grads = _grad(loss(), self._parameters)
                mean = [m if g is None else m + g / len(self._losses) for m, g in zip(mean, grads, strict=True)]
            sides.append(mean)
        _move(self._parameters, start)
        return [(up - down) / (2 * reach) for up, down in zip(*sides, strict=True)]
