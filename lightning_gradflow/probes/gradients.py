"""Statistics of parameter gradients: a few fused passes over all tensors, nothing on the host until it is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats, Ints
from lightning_gradflow.metrics import HISTOGRAM_BINS, MIN_EXPONENT, measured
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

_SAMPLED_ENTRIES = 4096  # per tensor for histograms: a share is then known to 0.8 points, at any size of the tensor


class GradientProbe:
    """Reads the gradients of one optimizer step, just before the optimizer uses them.

    Gradients are read as they are: accumulated over micro-batches, before clipping. Norms are summed in float64, so
    that a gradient of 1e-30 is not taken for zero. Entries for histograms are an even selection, 4096 a tensor at most.

    Args:
        layers: whose parameters are read.
        transfer: what carries the numbers to the host.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> transfer = Transfer()
        >>> probe = GradientProbe(LayerMap(net), transfer)
        >>> probe.measure(net.parameters())
        >>> probe.collect(transfer.fetch())["(root)"]["grad_norm"]
        5.0
    """

    def __init__(self, layers: LayerMap, transfer: Transfer) -> None:
        self._layers = layers
        self._transfer = transfer
        self._owners: list[str] = []
        self._numel: list[int] = []
        self._histogram_owners: list[list[str]] = []
        self._batches = 0

    @property
    def is_empty(self) -> bool:
        """Whether no gradient was there to be measured."""
        return not self._owners

    @torch.no_grad()
    def measure(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reads the gradients of `parameters`; those without a gradient are left out, and so missing, not zero."""
        by_device: dict[torch.device, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is not None and self._layers.owner(parameter) is not None and parameter.numel():
                by_device.setdefault(parameter.device, []).append(parameter)
        for device, group in by_device.items():
            self._measure_device(device, group)

    def _measure_device(self, device: torch.device, parameters: list[nn.Parameter]) -> None:
        gradients = [_dense(parameter.grad) for parameter in parameters if parameter.grad is not None]
        weights = [_real(parameter.detach()) for parameter in parameters]
        wide = wide_dtype(device)
        put = {
            "norm": torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)),
            "sum": torch.stack(torch._foreach_norm(gradients, 1, dtype=wide)),
            "max": torch.stack(torch._foreach_norm(gradients, torch.inf)),
            "nonzero": torch.stack([torch.count_nonzero(g) for g in gradients]),
            "nonfinite": torch.stack([torch.isfinite(g).logical_not_().sum() for g in gradients]),
            "weight": torch.stack(torch._foreach_norm(weights, 2, dtype=wide)),
            "exponents": torch.stack([_exponents(g) for g in gradients]).flatten(),
        }
        for name, tensor in put.items():
            self._transfer.put(f"gradients/{self._batches}/{name}", tensor)
        self._batches += 1
        owners = [self._layers.owner(parameter) or "" for parameter in parameters]
        self._owners += owners
        self._histogram_owners.append(owners)
        # a sparse gradient has entries for the touched rows only; the rest of the parameter is a true zero
        self._numel += [_real(parameter.detach()).numel() for parameter in parameters]

    def collect(self, host: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
        """The statistics of each layer that was measured, out of what was fetched: layer -> metric -> value."""
        if not self._owners:
            return {}
        columns = {
            name: np.concatenate([host[f"gradients/{i}/{name}"] for i in range(self._batches)])
            for name in ("norm", "sum", "max", "nonzero", "nonfinite", "weight")
        }
        numel = np.array(self._numel, dtype=np.float64)
        owners = np.array(self._owners)
        found = {}
        for layer in dict.fromkeys(self._owners):
            mine = owners == layer
            total = float(numel[mine].sum())
            norm = measured(float(np.sqrt(np.square(columns["norm"][mine]).sum())))
            found[layer] = {
                "grad_norm": norm,
                "grad_rms": norm / float(np.sqrt(total)),
                "grad_mean_abs": measured(float(columns["sum"][mine].sum()) / total),
                "grad_max_abs": measured(float(columns["max"][mine].max())),
                "grad_zero_fraction": 1.0 - float(columns["nonzero"][mine].sum()) / total,
                "grad_nonfinite_fraction": float(columns["nonfinite"][mine].sum()) / total,
                "weight_norm": measured(float(np.sqrt(np.square(columns["weight"][mine]).sum()))),
            }
        return found

    def histograms(self, host: Mapping[str, Floats], order: Sequence[str]) -> dict[str, Ints]:
        """Exponent histograms of the first and the last third of the layers in `order` (at least one layer each)."""
        if not self._owners:
            return {}
        measured = [layer for layer in order if layer in set(self._owners)]
        third = max(1, len(measured) // 3)
        groups = {"grad_hist_early": set(measured[:third]), "grad_hist_late": set(measured[-third:])}
        width = HISTOGRAM_BINS + 2
        counts = {name: np.zeros(width, dtype=np.int64) for name in groups}
        for i, owners in enumerate(self._histogram_owners):
            table = host[f"gradients/{i}/exponents"].reshape(len(owners), width).astype(np.int64)
            for name, members in groups.items():
                mine = np.array([owner in members for owner in owners])
                counts[name] += table[mine].sum(axis=0)
        return counts


def _exponents(gradient: Tensor) -> Tensor:
    """(HISTOGRAM_BINS + 2,) counts of binary exponents of sampled entries, then of zeros, then of non-finite ones."""
    flat = gradient.flatten()
    sample = flat[:: _stride(flat.numel())]
    sample = sample if sample.dtype == torch.float64 else sample.float()
    # frexp gives 0.5 <= mantissa < 1, so that floor(log2 |x|) is its exponent minus one
    bins = (torch.frexp(sample).exponent - 1 - MIN_EXPONENT).clamp(0, HISTOGRAM_BINS - 1)
    bins = torch.where(sample == 0, HISTOGRAM_BINS, bins)
    bins = torch.where(torch.isfinite(sample), bins, HISTOGRAM_BINS + 1)
    counts = torch.zeros(HISTOGRAM_BINS + 2, dtype=torch.int64, device=flat.device)
    return counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int64))


def _stride(numel: int) -> int:
    """The least stride for at most 4096 entries that shares no factor with `numel`: else it would read few columns."""
    stride = max(1, -(-numel // _SAMPLED_ENTRIES))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def _dense(gradient: Tensor) -> Tensor:
    """The entries of a gradient as a dense real tensor; of a sparse one those that are stored, or one zero for none."""
    if not gradient.is_sparse:
        return _real(gradient.detach())
    values = gradient.detach().coalesce().values()
    return _real(values if values.numel() else values.new_zeros(1))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
