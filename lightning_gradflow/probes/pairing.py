"""Do the targets belong to their inputs? What the loss and the gradient lose where batches are dealt anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]
Tensors = list[Tensor]

_DRAWS = 2  # of the weights: one may by chance have no way from the inputs to the output
_SAMPLED = 1 << 17  # gradient entries of one draw: 50 MiB for 48 batches and all draws
_FLOOR = 1e-3  # of the size of all entries: smaller ones are mostly rounding
_PIECE = 1 << 20  # entries that are dealt at once: more would cost more memory than the weights


def pairing(pairs: Sequence[Pair], parameters: Tensors, loss_scale: float = 1.0) -> dict[str, float]:
    """Whether the loss depends on which target goes with which input, in this network and in one that knows nothing.

    With L the losses of K batches, and S those of the same batches whose targets were dealt to other samples,

        line_shuffled = mean(S - L) / |mean(L)|,    line_shuffled_z = mean(S - L) / standard error over the batches

    A network that only knows how often each target comes has none of that gap. One that knows its batches by heart has,
    so it is not enough: the weights are dealt anew too, each matrix by itself, which keeps their size and leaves no
    memory in them. With g_i the gradient of batch i there, and s_i that of its dealt targets, `pairing_agreement` is

        the sum of (g_i - s_i) . (g_j - s_j) over all pairs i < j, divided by its own standard deviation,

    or the same with each entry in units of its own rms over the batches, whichever is larger: about standard normal
    where the targets do not follow from the inputs, whatever the network has seen before.

    Args:
        pairs: (K,) the loss of each batch as it is and with its targets dealt to other samples, always with the same
            random numbers.
        parameters: of the copy that gives the losses; they are put back.
        loss_scale: factor on the loss in the backward pass, for fp16.

    Returns:
        `PAIRING` by name. Nothing for fewer than four batches, or where the targets have no part in the loss.

    References:
        Breiman 2001, Random forests (importance by permutation); Ojala and Garriga 2010, Permutation tests for studying
        classifier performance.

    Example:
        >>> x, w = torch.tensor([-1.0, 1.0]), torch.ones(1, 1, requires_grad=True)
        >>> pair = lambda: (w[0] * x - 2 * x).square().mean(), lambda: (w[0] * x + 2 * x).square().mean()
        >>> pairing([pair] * 4, [w])["line_shuffled"]  # 9 instead of 1
        8.0
    """
    if len(pairs) < 4:
        return {}
    found = _gap(pairs)
    if not found:
        return {}
    with _restored(parameters):
        drawn = [_differences(pairs, parameters, loss_scale, draw) for draw in range(_DRAWS)]
    vectors = torch.cat(drawn, 1)
    # what few entries tell shows in the first, what many tell in the second
    return {**found, "pairing_agreement": max(agreement(vectors), agreement(_levelled(vectors)))}


def agreement(vectors: Tensor) -> float:
    """The z score of a direction that (K, N) vectors have in common; NaN where all of them are zero."""
    vectors = vectors / vectors.abs().amax().clamp_min(torch.finfo(vectors.dtype).tiny)
    products = (vectors @ vectors.T).triu(1)
    return float(products.sum() / products.square().sum().sqrt())


@torch.no_grad()
def _gap(pairs: Sequence[Pair]) -> dict[str, float]:
    true = torch.stack([as_is().detach().double() for as_is, _ in pairs])
    gaps = torch.stack([dealt().detach().double() for _, dealt in pairs]) - true
    if not bool(gaps.isfinite().all()) or not bool(gaps.any()):
        return {}
    mean, error = float(gaps.mean()), float(gaps.std()) / math.sqrt(len(pairs))
    z = mean / error if error > 0 else math.copysign(1e6, mean)
    return {"line_shuffled": mean / abs(float(true.mean())), "line_shuffled_z": max(-1e6, min(1e6, z))}


@contextmanager
def _restored(parameters: Tensors) -> Iterator[None]:
    start = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _deal(parameters: Tensors, draw: int) -> None:
    """Deals the entries of each matrix anew; biases and the weights of norms are vectors, and know no inputs."""
    generator = torch.Generator().manual_seed(draw)
    for parameter in parameters:
        if parameter.dim() < 2:
            continue
        flat = parameter.flatten()
        for piece in flat.split(_PIECE):
            piece.copy_(piece[torch.randperm(len(piece), generator=generator).to(piece.device)])
        parameter.copy_(flat.view_as(parameter))


def _differences(pairs: Sequence[Pair], parameters: Tensors, scale: float, draw: int) -> Tensor:
    """(K, N) what of each batch's gradient comes from the pairing, at weights that were dealt anew."""
    _deal(parameters, draw)
    stride = max(1, sum(p.numel() for p in parameters) // _SAMPLED)
    rows = []
    for as_is, dealt in pairs:
        rows.append(_entries(as_is() * scale, parameters, stride) - _entries(dealt() * scale, parameters, stride))
    differences = torch.stack(rows)
    return differences / float(differences.norm().clamp_min(torch.finfo(differences.dtype).tiny))


def _levelled(vectors: Tensor) -> Tensor:
    """Each entry in units of its own rms over the batches: what is rare, as most words are, counts like the rest."""
    size = vectors.square().mean(0).sqrt()
    return vectors / (size + _FLOOR * size.square().mean().sqrt()).clamp_min(torch.finfo(size.dtype).tiny)


def _entries(loss: Tensor, parameters: Tensors, stride: int) -> Tensor:
    """Evenly spread entries of the gradient."""
    parts = []
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        known = torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad
        parts.append(known.flatten()[::stride].float())
    return torch.cat(parts)
