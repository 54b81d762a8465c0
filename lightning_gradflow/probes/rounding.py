"""What of a step is lost where the weights are held in a 16-bit format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.probes.spread import coprime_stride
from lightning_gradflow.probes.transfer import wide_dtype

_SHORT = torch.bfloat16, torch.float16
_SELECTED = 4096  # entries of a tensor: its share is then known to 0.8 points


class Rounding:
    """Tells which entries of 16-bit weights an optimizer's step leaves exactly as they were, out of an even selection.

    A number with p bits is moved by less than a step that is smaller than half of the spacing to its neighbour: not at
    all. In bfloat16 (p = 8) that spacing is 1/256 to 1/128 of the number, in float16 (p = 11) 1/2048 to 1/1024.

    What an entry adds to what the step gains is its gradient times its step, so that entries count by the magnitude of
    their gradient; those without one, such as the rows of an embedding that were not looked up, do not count.

    Args:
        weights: N tensors of one device, before the step; those in other formats are passed over.

    Example:
        >>> weight = torch.tensor([1.0, 0.001], dtype=torch.bfloat16)
        >>> rounding = Rounding([weight])
        >>> weight += 1e-3  # 1 has no neighbour below 1.0078
        >>> lost, of = rounding.measure([weight], [torch.ones(2)])
        >>> lost.tolist(), of.tolist()
        ([1.0], [2.0])
    """

    @torch.no_grad()
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._number = len(weights)
        self._at = [i for i, weight in enumerate(weights) if weight.dtype in _SHORT]
        self._before = [_selected(weights[i]).clone() for i in self._at]

    def __bool__(self) -> bool:
        """Whether there are such weights."""
        return bool(self._at)

    @torch.no_grad()
    def measure(self, now: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(N,) and (N,) the sums of the gradients' magnitudes where the step changed nothing, and everywhere.

        Args:
            now: the same tensors after the step.
            gradients: those that the step was made with; one of another size, as a sparse one is, counts as zero.
        """
        slopes = [_slopes(gradients[i], now[i]) for i in self._at]
        same = [_selected(now[i]) == before for i, before in zip(self._at, self._before, strict=True)]
        slope, lengths = torch.cat(slopes), [len(entries) for entries in self._before]
        at = torch.from_numpy(np.repeat(self._at, lengths)).to(slope.device, non_blocking=True)
        of = slope.new_zeros(self._number)
        return of.index_add(0, at, slope * torch.cat(same)), of.index_add(0, at, slope)


def _slopes(gradient: Tensor, weight: Tensor) -> Tensor:
    """The magnitudes of the selected entries, each standing for as many as it was selected from."""
    chosen = _selected(gradient if gradient.numel() == weight.numel() else torch.zeros_like(weight))
    return chosen.to(wide_dtype(chosen.device)).abs() * (weight.numel() / max(1, len(chosen)))


def _selected(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if flat.numel() <= _SELECTED else flat[:: coprime_stride(flat.numel(), _SELECTED)]
