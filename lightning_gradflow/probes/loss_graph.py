"""What goes into the loss function, read off the autograd graph."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import MISMATCHES, measured
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_MOST = 64  # nodes behind the loss: a loss function is made of few
_SOME = 16384  # entries that tell how large a residual is
_PASS_ON = frozenset(
    {"View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T", "Clone", "ToCopy"}
    | {"Alias", "Slice", "Select", "Index", "IndexSelect", "Split", "Unbind"}
)
_PAIRED = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss"})
_NO_LOGARITHM = frozenset({"Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Relu", "Sigmoid", "Softmax"})


class LossGraph:
    """What is seen of the losses of one sample; nothing is kept alive."""

    def __init__(self) -> None:
        self._mismatches: set[str] = set()
        self._residual: Tensor | None = None

    def look(self, loss: Tensor) -> None:
        """Takes a loss that is about to go back."""
        self._mismatches |= mismatches(loss)
        found = residual(loss)
        self._residual = found if found is not None else self._residual

    def share(self, transfer: Transfer) -> None:
        """Hands it over; what any rank has seen counts for all."""
        for name in sorted(self._mismatches):
            transfer.share_numbers(name, [1.0])
        if self._residual is not None:
            transfer.share("residual", self._residual)


def told(host: Mapping[Hashable, Sequence[float] | Floats]) -> dict[str, float]:
    """The scalars of the row, from what came to the host.

    Example:
        >>> told({"residual": (36.0, 4.0), "broadcast": (1.0,)})
        {'broadcast': 1.0, 'residual_rms': 3.0}
    """
    found = {name: 1.0 for name in MISMATCHES if name in host}
    if "residual" in host:
        squares, number = host["residual"]
        found["residual_rms"] = measured(math.sqrt(squares / number))
    return found


def mismatches(loss: Tensor) -> frozenset[str]:
    """Which loss functions get something that they are not made for.

    `softmax_twice` is a log-softmax, which `cross_entropy` begins with, of a softmax over as many classes;
    `sigmoid_twice` a sigmoid that goes into `binary_cross_entropy_with_logits`; `no_log_softmax` an `nll_loss` that
    gets probabilities or scores; `broadcast` a loss of (N, N) pairs of which one side had N numbers.

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
    return frozenset(found for node in _nodes(loss.grad_fn) for found in _found(node))


@torch.no_grad()
def residual(loss: Tensor) -> Tensor | None:
    """(2,) sum of squares and number of what an absolute or squared error is made of: outputs less targets.

    That of Huber's and of `smooth_l1_loss` counts too, and what is written by hand. Of several errors it is the one
    that is next to the loss; of large ones the first entries are enough. None where there is none.

    Example:
        >>> from torch.nn import functional as F
        >>> outputs = torch.zeros(4, 1, requires_grad=True)
        >>> residual(F.mse_loss(outputs, torch.full((4, 1), 3.0)))
        tensor([36.,  4.], dtype=torch.float64)
    """
    for node in _nodes(loss.grad_fn):
        values = _residual(node)
        if values is not None and values.numel():
            some = values.flatten()[:_SOME].to(wide_dtype(values.device))
            return torch.stack([some.square().sum(), torch.full_like(some[0], some.numel())])
    return None


def _residual(node: Any) -> Tensor | None:
    name = _operation(node)
    if name in _PAIRED:
        errors: Tensor = node._saved_self - node._saved_target
        return errors
    is_even = name == "Abs" or (name == "Pow" and node._saved_exponent == 2)
    if name == "Mul":
        sides = [one for one, _ in node.next_functions]
        is_even = len(sides) == 2 and sides[0] is sides[1]
    before = node.next_functions[0][0] if is_even else None
    if before is None or _operation(before) != "Sub" or sum(one is not None for one, _ in before.next_functions) != 1:
        return None
    difference: Tensor = node._saved_self
    return difference


def _nodes(first: Any) -> Iterator[Any]:
    """Those behind the loss, nearest first."""
    waiting, seen = deque([first]), {first}
    while waiting and len(seen) < _MOST:
        node = waiting.popleft()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _found(node: Any) -> Iterator[str]:
    name = _operation(node)
    if name == "LogSoftmax":
        if any(_operation(one) == "Softmax" and _classes(one) == _classes(node) for one in _inputs(node)):
            yield "softmax_twice"
    elif name == "BinaryCrossEntropyWithLogits":
        if any(_operation(one) == "Sigmoid" for one in _inputs(node)):
            yield "sigmoid_twice"
    elif name.startswith("NllLoss"):
        if any(_operation(one) in _NO_LOGARITHM for one in _inputs(node)):
            yield "no_log_softmax"
    elif name in _PAIRED:
        if any(_operation(one) == "Expand" and _squares(one) for one, _ in node.next_functions):
            yield "broadcast"
    elif name == "Sub":
        sides = [one for one, _ in node.next_functions if one is not None]
        # where both sides have a graph, the pairs may be meant
        if len(sides) == 1 and (_squares(node, sides[0]) or (_operation(sides[0]) == "Expand" and _squares(sides[0]))):
            yield "broadcast"


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
    """Such as `LogSoftmax`; empty where there is none."""
    return "" if node is None else str(node.name()).partition("Backward")[0]


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
