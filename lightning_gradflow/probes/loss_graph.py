"""What goes into the loss function, read off the autograd graph."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import MISMATCHES, measured
from lightning_gradflow.probes.comparisons import Comparisons, around_mean, scores_of
from lightning_gradflow.probes.observer import is_measurable
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_MOST = 64  # nodes behind the loss: a loss function is made of few
_SOME = 16384  # entries that tell how large an error is
_FEWEST = 8  # targets of a rank that tell their deviation
_MOST_PAIRS = 8  # of outputs and targets in a sample
_NUMBERS = 5  # of each: squares of the error, of outputs, of targets around their mean and out of reach; how many
_PASS_ON = frozenset(
    {"View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T", "Clone", "ToCopy"}
    | {"Alias", "Slice", "Select", "Index", "IndexSelect", "Split", "Unbind"}
)
_PAIRED = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss"})
_LINEAR = frozenset({"Addmm", "Mm", "Bmm", "Baddbmm", "Convolution"})
_BOUNDED = frozenset({"Sigmoid", "Tanh"})
_RANGES = {"Relu": (0.0, math.inf), "Softplus": (0.0, math.inf), "Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
_NO_LOGARITHM = _LINEAR | {"Relu", "Sigmoid", "Softmax"}


class LossProbe:
    """What is seen of the losses of one sample; nothing of them is kept alive."""

    def __init__(self) -> None:
        self._comparisons = Comparisons(self._compared)
        self.clear()

    def clear(self) -> None:
        """Another sample begins."""
        self._comparisons.clear()
        self._mismatches: set[str] = set()
        self._sizes: list[Tensor] = []
        self._scores: list[Tensor] = []

    def see(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes a call in the forward pass; see `Comparisons`."""
        scores = scores_of(func, args, kwargs)
        if scores is None:
            self._comparisons.see(func, result, args, kwargs)
        elif scores.requires_grad and is_measurable(scores) and scores.numel():
            self._scores.append(_squares_around(scores.detach()))

    @torch.no_grad()
    def _compared(self, outputs: Tensor, targets: Tensor) -> None:
        if not is_measurable(outputs) or not outputs.numel() or len(self._sizes) == _MOST_PAIRS:
            return
        low, high = _range_of(outputs)
        outputs, targets = (_some(values) for values in (outputs, targets))
        # few tell little of a deviation, and one tells nothing
        around = targets - targets.mean() if len(targets) >= _FEWEST else torch.full_like(targets, math.nan)
        beyond = targets - targets.clamp(low, high)
        squares = [values.square().sum() for values in (outputs - targets, outputs, around, beyond)]
        self._sizes.append(torch.stack([*squares, torch.full_like(outputs[0], len(outputs))]))

    def before_backward(self, loss: Tensor) -> None:
        """Takes a loss that is about to go back."""
        self._comparisons.clear()
        self._mismatches |= mismatches(loss)

    def share(self, transfer: Transfer) -> None:
        """Hands it over; what any rank has seen counts for all."""
        for name in sorted(self._mismatches):
            transfer.share_numbers(name, [1.0])
        if self._sizes:
            found = torch.cat(self._sizes)
            # a loss that is left out of some steps, or on some ranks, must not change what they agree on
            transfer.share("compared", torch.nn.functional.pad(found, (0, _NUMBERS * _MOST_PAIRS - len(found))))
        if self._scores:
            transfer.share("scores", torch.stack(self._scores).sum(0))
        self.clear()


def _some(values: Tensor) -> Tensor:
    """Entries of the first samples, without a copy of them all."""
    values = values.detach().reshape(1) if values.dim() == 0 else values.detach()
    rows = values[: max(1, _SOME * len(values) // values.numel())].flatten()[:_SOME]
    return rows.to(wide_dtype(rows.device))


def _range_of(outputs: Tensor) -> tuple[float, float]:
    """Between which bounds they are, by the activation that gave them; infinite ones where none did."""
    node = outputs.grad_fn
    for _ in range(_MOST):
        if node is None or _operation(node) not in _PASS_ON:
            break
        node = node.next_functions[0][0]
    return _RANGES.get(_operation(node), (-math.inf, math.inf))


def _squares_around(scores: Tensor) -> Tensor:
    """(3,) sum and number of squared scores of the first samples, each less the mean over its classes, and the samples.

    Classes that are masked have no score.
    """
    classes = scores.shape[-1]
    rows = scores[: max(1, _SOME * len(scores) // scores.numel())].reshape(-1, classes)[: max(1, _SOME // classes)]
    deviations, there = around_mean(rows.to(wide_dtype(rows.device)))
    numbers = [there.sum().to(deviations), there.any(-1).sum().to(deviations)]
    return torch.stack([deviations.square().sum(), *numbers])


def told(host: Mapping[Hashable, Sequence[float] | Floats]) -> dict[str, float]:
    """The scalars of the row, from what came to the host: of several errors the largest beside its outputs.

    Of what is out of reach the least counts: a bounded code beside the outputs may be meant.

    Example:
        >>> told({"compared": (36.0, 4.0, 16.0, 8.0, 4.0), "broadcast": (1.0,)})
        {'broadcast': 1.0, 'residual_rms': 3.0, 'compared_rms': 1.0, 'target_deviation': 2.0, 'targets_beyond': 0.5}
    """
    # several ranks keep a name once one of them had it: of what none has seen in this sample there are zeros
    found = {name: 1.0 for name in MISMATCHES if name in host and host[name][0] > 0}
    pairs = np.asarray(host.get("compared", ()), dtype=np.float64).reshape(-1, _NUMBERS)
    pairs = pairs[pairs[:, -1] > 0]
    if len(pairs):
        *sums, numbers = pairs.T
        with np.errstate(all="ignore"):
            sizes = np.sqrt(sums / numbers)
            beyond = float(np.min(sums[3] / sums[2]))
            ratios = np.nan_to_num(sizes[0] / np.maximum(sizes[1], 1.0), nan=np.inf)
        error, output, deviation, _ = sizes[:, np.argmax(ratios)]
        found |= {"residual_rms": measured(error), "compared_rms": measured(output)}
        found |= {} if np.isnan(deviation) else {"target_deviation": float(deviation)}
        found |= {"targets_beyond": min(beyond, 1.0)} if 0 < beyond < math.inf else {}
    squares, number, samples = host.get("scores", (0.0, 0.0, 0.0))
    if number > 0:
        found |= {"score_deviation": measured(math.sqrt(squares / number)), "score_classes": float(number / samples)}
    return found


def mismatches(loss: Tensor) -> frozenset[str]:
    """Which loss functions get something that they are not made for.

    `softmax_twice` is a log-softmax, which `cross_entropy` begins with, of a softmax over as many classes;
    `bounded_scores` one of a sigmoid or tanh, with no factor between them; `sigmoid_twice` a sigmoid that goes into
    `binary_cross_entropy_with_logits`; `no_log_softmax` an `nll_loss` that gets probabilities or scores; `broadcast` a
    loss of (N, N) pairs of which one side had N numbers.

    The graph is walked in Python, from the loss over `_MOST` nodes; nothing is computed, and nothing waits for a
    device. In a graph of one node, as of a compiled training step, nothing is found.

    Args:
        loss: with its graph.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> scores, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
        >>> sorted(mismatches(F.cross_entropy(scores.softmax(1), target)))
        ['softmax_twice']
        >>> sorted(mismatches(F.cross_entropy(scores, target)))
        []
    """
    return frozenset(_found(list(_nodes(loss.grad_fn))))


def _nodes(first: Any) -> Iterator[tuple[Any, Any]]:
    """Those behind the loss, nearest first, each with what it goes into."""
    waiting: deque[tuple[Any, Any]] = deque([(first, None)])
    seen = {first}
    while waiting:
        node, into = waiting.popleft()
        if node is None:
            continue
        yield node, into
        if len(seen) < _MOST:
            for following, _ in node.next_functions[:_MOST]:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append((following, node))


def _found(nodes: Sequence[tuple[Any, Any]]) -> Iterator[str]:
    goes = dict(nodes)
    for node, into in nodes:
        name = _operation(node)
        if name == "LogSoftmax":
            for one in _inputs(node):
                if _operation(one) == "Softmax" and _classes(one) == _classes(node):
                    yield "softmax_twice"
                elif _operation(one) in _BOUNDED:
                    yield "bounded_scores"
        elif name == "BinaryCrossEntropyWithLogits":
            if any(_operation(one) == "Sigmoid" for one in _inputs(node)):
                yield "sigmoid_twice"
        elif name in ("NllLoss", "NllLoss2D"):
            if any(_operation(one) in _NO_LOGARITHM for one in _inputs(node)):
                yield "no_log_softmax"
        elif name in _PAIRED:
            if any(_operation(one) == "Expand" and _squares(one) for one, _ in node.next_functions):
                yield "broadcast"
        elif name == "Sub" and _is_error(into, goes) and not any(_is_of_pairs(one, node) for one, _ in nodes):
            yield from ("broadcast" for one, _ in node.next_functions if _is_broadcast(node, one))


def _is_error(node: Any, goes: Mapping[Any, Any]) -> bool:
    """Whether a difference goes into a square, or loses its sign, and that into a mean or a sum."""
    return _operation(node) in ("Pow", "Abs", "Mul") and _operation(goes.get(node)) in ("Mean", "Sum")


def _is_of_pairs(node: Any, other: Any) -> bool:
    """Whether another difference of all pairs stands beside it, both sides of which have a graph: they are meant."""
    sides = [one for one, _ in node.next_functions if one is not None] if _operation(node) == "Sub" else []
    return node is not other and len(sides) == 2 and _shape(node) == _shape(other)


def _is_broadcast(node: Any, side: Any) -> bool:
    """Whether the only side of a difference with a graph, numbers that a layer gave, was paired with N targets."""
    if side is None or len(node.next_functions) != 2 or all(one is not None for one, _ in node.next_functions):
        return False
    if _operation(side) == "Expand":
        return _squares(side) and _is_of_layer(side.next_functions[0][0])
    return _squares(node, side) and _is_of_layer(side)


def _is_of_layer(node: Any) -> bool:
    """Whether it is what a layer gave, in whatever shape."""
    for _ in range(_MOST):
        if _operation(node) in _LINEAR:
            return True
        if node is None or _operation(node) not in _PASS_ON:
            return False
        node = node.next_functions[0][0]
    return False


def _inputs(node: Any) -> Iterator[Any]:
    """What computed the inputs, behind what only gives them another shape or format."""
    for _ in range(_MOST):
        following = [one for one, _ in node.next_functions if one is not None]
        if len(following) != 1:
            break
        node = following[0]
        if _operation(node) not in _PASS_ON:
            yield node
            return


def _operation(node: Any) -> str:
    """Such as `LogSoftmax`; empty where there is none, and for functions of the user's own."""
    found = re.fullmatch(r"(\w+)Backward\d+", node.name()) if node is not None else None
    return found[1] if found is not None else ""


def _classes(node: Any) -> int:
    """How many a softmax is over."""
    dimension = int(node._saved_dim)
    # a negative number is kept as an unsigned one of 64 bits
    return _shape(node)[dimension - 2**64 if dimension >= 2**63 else dimension]


def _squares(wide: Any, narrow: Any = None) -> bool:
    """Whether N numbers on the one side became N x N."""
    if narrow is None:
        narrow = next((one for one, _ in wide.next_functions), None)
    if narrow is None:
        return False
    after, before = _shape(wide), _shape(narrow)
    return len(after) == 2 and after[0] == after[1] > 1 and before in ((after[0],), (after[0], 1), (1, after[0]))


def _shape(node: Any) -> tuple[int, ...]:
    """That of what the operation gave."""
    return tuple(node._input_metadata[0].shape)
