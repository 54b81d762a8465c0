"""Statistics of parameter gradients and of the step that is made with them: a few fused passes over all tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import HISTOGRAM_BINS, MIN_EXPONENT
from lightning_gradflow.probes.gradient_columns import NORMS, SUMS, WIDTH, GradientColumns, Group, key
from lightning_gradflow.probes.kept import Kept
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.norms import norms, sizes
from lightning_gradflow.probes.rounding import Rounding
from lightning_gradflow.probes.shards import complete, copies, is_sharded, local
from lightning_gradflow.probes.spread import coprime_stride
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

# for histograms, which are of many tensors together; with 4096 a share is known to 0.8 points
_SAMPLED_ENTRIES, _FEWEST_ENTRIES = 4096, 64  # per tensor
_SAMPLED_IN_ALL = 1 << 16
_SCALED = {"norm", "sum", "max"}  # with the gradients


@dataclass
class _Measured(Group):
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parameters: list[nn.Parameter] = field(default_factory=list)
    has_gradient: list[bool] = field(default_factory=list)
    before: Kept | None = None  # the weights that the optimizer is about to change
    rounding: Rounding | None = None  # those of them that are held in 16 bits
    found: dict[str, Tensor] = field(default_factory=dict)


class GradientProbe:
    """Reads the gradients of one optimizer step, just before the optimizer uses them, and what the step changes.

    Gradients are read as they are: accumulated over micro-batches, before clipping. Norms are summed in float64, so
    that a gradient of 1e-30 is not taken for zero. Entries for histograms are an even selection, 4096 a tensor at most.
    While the optimizer steps, a copy of its parameters is held: an embedding changes in few of its rows, so that no
    selection would do.

    Of a parameter that is sharded over ranks each rank reads its part, and the transfer sums them up. Where none is,
    every rank has the whole gradients, and nothing has to be summed.

    Args:
        layers: whose parameters are read.
        transfer: what carries the numbers to the host, summed over ranks where parameters are sharded.
        only_size: whether the size is all that is wanted, and nothing of the step.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> transfer = Transfer()
        >>> probe = GradientProbe(LayerMap(net), transfer)
        >>> probe.measure(0, net.parameters())
        >>> probe.finish()
        >>> layers, values = probe.collect(transfer.fetch()).layers()
        >>> layers, values["grad_norm"]
        (['(root)'], array([5.]))
    """

    def __init__(self, layers: LayerMap, transfer: Transfer, *, only_size: bool = False) -> None:
        self._layers = layers
        self._transfer = transfer
        self._only_size = only_size
        self._groups: list[_Measured] = []
        self._without: dict[int, tuple[str, int]] = {}  # no gradient where one is due: owner and number of entries
        self._unheld: dict[str, int] = {}

    @torch.no_grad()
    def measure(self, optimizer: int, parameters: Iterable[nn.Parameter], multiplier: Tensor | float = 1.0) -> None:
        """Reads the gradients of `parameters`; those without a gradient are missing, not zero.

        A parameter that two optimizers share is read with the first of them, its update too.

        Args:
            optimizer: which one is about to step; each has its own clipping and its own update.
            parameters: those of the optimizer.
            multiplier: turns the gradients as they are into those of the mean loss; a scalar.
        """
        read = {id(p) for group in self._groups for p in group.parameters}  # what two optimizers share counts once
        members = [p for p in parameters if self._layers.owner(p) is not None and id(p) not in read]
        # without numbers are parameters of a layer that has never run, and knows its size no sooner
        members = [p for p in members if not isinstance(p, nn.UninitializedParameter) and p.numel()]
        # beside sharded parameters nobody sees to it that the gradients of others are the same on all ranks
        is_shared = not self._transfer.is_alone and any(is_sharded(parameter) for parameter in members)
        by_device: dict[torch.device, list[nn.Parameter]] = {}
        for parameter in members:
            # ranks that share agree on a list; else those without a gradient are left out
            if is_shared or parameter.grad is not None:
                by_device.setdefault(parameter.device, []).append(parameter)
            elif parameter.requires_grad:
                self._without[id(parameter)] = self._layers.owner(parameter) or "", _entries(parameter)
        for device, its_members in by_device.items():
            group = _Measured(optimizer, is_shared, device=device, parameters=its_members)
            self._measure_group(group, multiplier)
            self._groups.append(group)

    def note_unheld(self, found: Mapping[str, int]) -> None:
        """Takes the number of entries, by layer, that get a gradient although no optimizer holds them."""
        self._unheld |= found

    def _measure_group(self, group: _Measured, multiplier: Tensor | float) -> None:
        ranks = self._transfer.topology.ranks
        gradients = [_gradient(parameter) for parameter in group.parameters]
        group.owners = [self._layers.owner(parameter) or "" for parameter in group.parameters]
        # a sparse gradient has entries for the touched rows only; the rest of the parameter is a true zero
        group.numel = [_entries(parameter) for parameter in group.parameters]
        group.is_frozen = [not parameter.requires_grad for parameter in group.parameters]
        group.has_gradient = [parameter.grad is not None for parameter in group.parameters]
        there = [_or_one_zero(gradient) for gradient in gradients]
        put = group.found
        put |= sizes(there, all_statistics=not self._only_size)
        for name in put.keys() & _SCALED:
            put[name] = put[name] * multiplier
        if not self._only_size:
            put["exponents"] = _exponents(gradients, multiplier)
            weights = [_part(parameter.detach()) for parameter in group.parameters]
            group.before, group.rounding = Kept(weights), Rounding(weights)
            put["weight"] = group.before.norms()
        if group.is_shared:
            # squares add up over ranks; a part that several ranks hold counts once
            share = _on_device([1 / copies(p, ranks) for p in group.parameters], group.device)
            has = _on_device([float(has) for has in group.has_gradient], group.device)
            put["share"], put["has"] = share, has * share
            if "weight" in put:
                put["weight"] = put["weight"] * has

    @torch.no_grad()
    def after_step(self, optimizer: int, *, gradients_changed: bool = False) -> None:
        """Reads what the step of an optimizer changed, and what clipping had left of its gradients.

        Args:
            optimizer: which one has stepped.
            gradients_changed: whether it has made further backward passes since `measure`, as L-BFGS does: then the
                gradients of now tell nothing about clipping.
        """
        for group in self._groups:
            if group.optimizer != optimizer or group.before is None:
                continue
            now = [_part(parameter.detach()) for parameter in group.parameters]
            changed = group.before.norms_of_change(now)
            group.found["update"] = changed * group.found["has"].sign() if group.is_shared else changed
            group.before = None
            if not gradients_changed and [p.grad is not None for p in group.parameters] == group.has_gradient:
                gradients = [_gradient(p) for p in group.parameters]
                group.found["clipped"] = norms(gradients)
                if group.rounding:
                    group.found["lost"], group.found["slope"] = group.rounding.measure(now, gradients)
            group.rounding = None

    @torch.no_grad()
    def finish(self) -> None:
        """Hands everything to the transfer."""
        for i, group in enumerate(self._groups):
            group.before = group.rounding = None
            if not group.is_shared:
                for name, tensor in group.found.items():
                    self._transfer.put(key(i, group, name), tensor)
                continue
            share = group.found["share"]
            for name, tensor in group.found.items():
                if name in NORMS:
                    tensor = tensor.square() * share
                elif name in SUMS:
                    tensor = tensor * share
                elif name == "exponents":
                    tensor = (tensor.reshape(-1, WIDTH) * share[:, None]).flatten()
                elif name == "max":  # sums are all that a collective makes: each rank has a row of its own
                    rows = tensor.new_zeros((self._transfer.topology.ranks, len(tensor)))
                    rows[torch.distributed.get_rank()] = tensor
                    tensor = rows.flatten()
                self._transfer.share(key(i, group, name), tensor)

    def collect(self, host: Mapping[Hashable, Floats]) -> GradientColumns:
        """The statistics of all that was measured, out of what was fetched."""
        without = list(self._without.values())
        return GradientColumns(self._groups, without, host, unheld=self._unheld, only_size=self._only_size)


def _entries(parameter: nn.Parameter) -> int:
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=wide_dtype(device)).to(device, non_blocking=True)


def _part(tensor: Tensor) -> Tensor:
    """The part of a parameter that is here, as real numbers."""
    if type(tensor) is Tensor and not tensor.is_complex():
        return tensor
    part = local(complete(tensor))
    return _real(tensor if part is None else part)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """What is here of a gradient, dense and real: of a sparse one the stored entries; nothing where there is none."""
    if parameter.grad is None:
        return _part(parameter.detach()).new_zeros(0)
    gradient = parameter.grad.detach()
    return _real(gradient.coalesce().values()) if gradient.is_sparse else _part(gradient)


def _or_one_zero(tensor: Tensor) -> Tensor:
    """Norms want at least one entry."""
    return tensor if tensor.numel() else tensor.new_zeros(1)


def _exponents(gradients: Sequence[Tensor], multiplier: Tensor | float) -> Tensor:
    """(N * (HISTOGRAM_BINS + 2),) for each gradient, of sampled entries: binary exponents, zeros, non-finite ones."""
    most = min(_SAMPLED_ENTRIES, max(_FEWEST_ENTRIES, _SAMPLED_IN_ALL // len(gradients)))
    samples = [_selected(gradient, most) for gradient in gradients]
    wide = torch.float64 if any(sample.dtype == torch.float64 for sample in samples) else torch.float32
    sample = torch.cat([sample if sample.dtype == wide else sample.to(wide) for sample in samples]) * multiplier
    # frexp gives 0.5 <= mantissa < 1, so that floor(log2 |x|) is its exponent minus one
    bins = (torch.frexp(sample).exponent - 1 - MIN_EXPONENT).clamp_(0, HISTOGRAM_BINS - 1)
    bins.masked_fill_(sample == 0, HISTOGRAM_BINS)
    bins.masked_fill_(torch.isfinite(sample).logical_not_(), HISTOGRAM_BINS + 1)
    first = np.repeat(np.arange(len(samples)) * WIDTH, [len(s) for s in samples])
    at = bins.long() + torch.from_numpy(first).to(bins.device, non_blocking=True)
    counts = torch.zeros(len(samples) * WIDTH, dtype=torch.int64, device=bins.device)
    return counts.index_add_(0, at, torch.ones_like(at))


def _selected(gradient: Tensor, most: int) -> Tensor:
    flat = gradient if gradient.dim() == 1 else gradient.reshape(-1)
    return flat if flat.numel() <= most else flat[:: coprime_stride(flat.numel(), most)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
