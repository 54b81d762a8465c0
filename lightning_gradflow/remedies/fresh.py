"""Whether weights look as they were drawn, or have been trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MARGIN = 1.15  # over the largest singular value of independent entries: training soon exceeds it
_SMALL = 64  # rows or columns up to which a few large entries among many zeros make as much of a difference
_SHUFFLES = 4
_SIDE = 2048  # rows and columns that are looked at, at most: enough to tell, and cheap


@torch.no_grad()
def looks_fresh(weight: Tensor) -> bool:
    """Whether the entries of a weight could have been drawn independently of each other, or orthogonally.

    The largest singular value of an n x m matrix of independent entries with standard deviation s is about
    `s * (sqrt(n) + sqrt(m))`, whatever their distribution; that of an orthogonal one is smaller. What a network has
    learnt lies in directions of few ranks, whose singular values stand out. A common mean is taken away before, so that
    weights that were all drawn positive count as drawn. Small matrices are also compared with their own entries in
    random order, as those that are mostly zero have larger singular values than the formula says.

    It is blind to training that has moved the weights by less than what they were drawn with, and to that of a layer
    with one output.

    Args:
        weight: dimension 0 counts the outputs; the others are taken together.

    Returns:
        True too where all outputs have the same weights, as in a constant one, and for one that is not finite: nothing
        would be lost with it.

    References:
        Marchenko and Pastur 1967; Martin and Mahoney 2021, Implicit self-regularization in deep neural networks.

    Example:
        >>> drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> trained = drawn + 5 * torch.outer(drawn[0], drawn[1]) / 8
        >>> looks_fresh(drawn), looks_fresh(trained)
        (True, False)
    """
    matrix = weight.detach().flatten(1)[:_SIDE, :_SIDE].double()
    if not bool(torch.isfinite(matrix).all()) or bool((matrix == matrix[0]).all()):
        return True
    matrix = matrix - matrix.mean()
    edge = float(matrix.square().mean().sqrt()) * (math.sqrt(matrix.shape[0]) + math.sqrt(matrix.shape[1]))
    varies = min(matrix.shape) ** (-2 / 3)  # by how much it does: Tracy and Widom 1996
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    if largest <= (_MARGIN + varies) * edge:
        return True
    if min(matrix.shape) > _SMALL:
        return False
    generator = torch.Generator().manual_seed(0)
    for _ in range(_SHUFFLES):
        order = torch.randperm(matrix.numel(), generator=generator).to(matrix.device)
        edge = max(edge, float(torch.linalg.matrix_norm(matrix.flatten()[order].view_as(matrix), 2)))
    return bool(largest <= (_MARGIN + varies) * edge)
