"""The scores that the softmaxes inside of a network get, such as those of attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import measured
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_SOFTMAXES = frozenset({torch.softmax, Tensor.softmax, F.softmax})
CHOOSING = frozenset[Any](_SOFTMAXES | {F.scaled_dot_product_attention, F.multi_head_attention_forward})
"""Every function that holds such a softmax."""

METRICS = ("softmax_gap", "output_gap")
"""Of softmaxes inside of the network, and of those behind its last layer."""

LARGE = 3.0
"""Gap from which scores are looked at again: the next one gets a twentieth of the largest."""

_KEY = "softmax"
_MASKED = 9000.0  # gap from which the next one is masked, by -1e4 or less: there is nothing to choose from
_SOME = 16384  # scores that tell how far they are apart


def choices(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], most: int | None = None) -> Tensor | None:
    """The scores that a softmax gets, with what it chooses from on the last axis; None where they are not to be had.

    Args:
        func: one of `CHOOSING`.
        args: that it was called with.
        kwargs: the same.
        most: of products of queries and keys about so many are made, of the first samples; None for all.

    Example:
        >>> choices(torch.softmax, (torch.zeros(2, 3, 5), 1), {}).shape
        torch.Size([2, 5, 3])
        >>> q, k = torch.ones(2, 4, 7, 16), torch.ones(2, 4, 9, 16)
        >>> scores = choices(F.scaled_dot_product_attention, (q, k, k), {})
        >>> scores.shape, scores.max().item()
        (torch.Size([2, 4, 7, 9]), 4.0)
    """
    if func is F.multi_head_attention_forward:
        return _of_module(args, kwargs, most)
    source = args[0] if args else kwargs.get("input", kwargs.get("query"))
    if not isinstance(source, Tensor) or not source.dim():
        return None
    if func in _SOFTMAXES:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return source.movedim(-1 if dim is None else dim, -1)
    key = args[1] if len(args) > 1 else kwargs.get("key")
    if not isinstance(key, Tensor) or source.dim() < 2 or source.shape[:-2] != key.shape[:-2]:
        return None
    if most is not None:
        source, key = (x.reshape(-1, *x.shape[-2:]) for x in (source, key))
        count = max(1, most // max(1, source.shape[-2] * key.shape[-2]))
        source, key = source[:count, : max(1, most // max(1, key.shape[-2]))], key[:count]
    scale = kwargs.get("scale") or source.shape[-1] ** -0.5
    scores: Tensor = source @ key.transpose(-2, -1) * scale
    return scores


def _of_module(args: tuple[Any, ...], kwargs: Mapping[str, Any], most: int | None) -> Tensor | None:
    """The scores inside of `nn.MultiheadAttention`, which makes queries and keys and all else in one call."""
    query, key, _, width, heads, both, bias = args[:7]
    if both is None:
        weights = (kwargs["q_proj_weight"], kwargs["k_proj_weight"])
    else:
        weights = both[:width], both[width : 2 * width]
    biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    sides = [
        F.linear(x if x.dim() == 3 else x.unsqueeze(1), weight, bias).unflatten(-1, (heads, -1)).movedim(0, -2)
        for x, weight, bias in zip((query, key), weights, biases, strict=True)
    ]
    return choices(F.scaled_dot_product_attention, tuple(sides), {}, most)


class SoftmaxScores:
    """How far the largest score is above the next one, by layer: in the first sample, and while it is far.

    What is masked is neither, and a row in which a mask leaves one position counts for nothing. Inside of
    `nn.MultiheadAttention` masks are not seen.

    Example:
        >>> seen, transfer = SoftmaxScores(), Transfer()
        >>> seen.start(is_first=True)
        >>> scores = torch.tensor([[30.0, 10.0, -1e9], [-5.0, 15.0, 40.0]], requires_grad=True)
        >>> seen.see("att", torch.softmax, (scores, -1), {}, False)
        >>> seen.share(transfer, "fc")
        >>> seen.collect(transfer.fetch())
        {'att': {'softmax_gap': 20.0}}
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, bool], Tensor] = {}
        self.has_begun = self._is_asked = self._is_first = False

    def start(self, *, is_first: bool, newest: Iterable[Floats] = ()) -> None:
        """Another sample begins.

        Args:
            is_first: whether it is the first of the run.
            newest: what a run that goes on knew of them; of use until a sample was collected.
        """
        self._sums, self._is_first = {}, is_first
        if not self.has_begun:
            self.has_begun = True
            self._is_asked = is_first or any(bool((gaps > LARGE).any()) for gaps in newest)

    def see(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_behind: bool) -> None:
        """Takes the call of one of `CHOOSING`; of data nothing is told.

        Args:
            name: of the layer that it is in, or behind.
            func: the function.
            args: that it was called with.
            kwargs: the same.
            is_behind: whether the layer had been called when it was.
        """
        if not self._is_asked or not any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
            return
        with torch.no_grad():
            scores = choices(func, args, kwargs, _SOME)
            if scores is None or scores.dim() < 2 or scores.shape[-1] < 2 or not scores.numel():
                return
            rows = scores.reshape(-1, scores.shape[-1])[: max(1, _SOME // scores.shape[-1])]
            first, second = rows.to(wide_dtype(rows.device)).topk(2).values.unbind(-1)
            gaps = first - second
            gap = gaps.masked_fill(~(gaps < _MASKED), torch.nan).nanmedian()
            sums = torch.stack([gap.nan_to_num(0.0), (~gap.isnan()).to(gap)])
            key = (name, is_behind)
            self._sums[key] = sums + self._sums[key] if key in self._sums else sums

    def share(self, transfer: Transfer, last: str) -> None:
        """Hands it over, to be summed over the ranks.

        Args:
            transfer: takes it.
            last: the layer that was called last: what is behind it is an output.
        """
        for (name, is_behind), sums in self._sums.items():
            transfer.share((_KEY, name, METRICS[is_behind and name == last]), sums)
        self._sums = {}

    def collect(self, host: Mapping[Hashable, Sequence[float] | Floats]) -> dict[str, dict[str, float]]:
        """Layer -> metric -> value, from what came to the host: a mean over calls and ranks."""
        found: dict[str, dict[str, float]] = {}
        # names stay with the ranks once they had them: of what none has seen in this sample there are zeros
        for key, sums in host.items():
            if isinstance(key, tuple) and key[0] == _KEY and sums[1] > 0:
                found.setdefault(key[1], {})[key[2]] = measured(float(sums[0] / sums[1]))
        # of a sample that holds none nothing is known
        is_large = any(gap > LARGE for gaps in found.values() for gap in gaps.values())
        self._is_asked = is_large if found else self._is_asked and not self._is_first
        return found
