"""Statistics of parameter gradients and of the step that is made with them: a few fused passes over all tensors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats, Ints
from lightning_gradflow.metrics import HISTOGRAM_BINS, MIN_EXPONENT, measured
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.norms import Kept, coprime_stride, norms, sizes
from lightning_gradflow.probes.shards import complete, copies, is_sharded, local
from lightning_gradflow.probes.transfer import Transfer, wide_dtype

# for histograms, which are of many tensors together; with 4096 a share is known to 0.8 points
_SAMPLED_ENTRIES, _FEWEST_ENTRIES = 4096, 64  # per tensor
_SAMPLED_IN_ALL = 1 << 16
_WIDTH = HISTOGRAM_BINS + 2
_NORMS = ("norm", "weight", "update", "clipped")
_SUMS = (*_NORMS, "sum", "nonzero", "nonfinite")
_OF_SIZE = {"norm", "max", "nonfinite"}
_SCALED = {"norm", "sum", "max"}  # with the gradients


@dataclass
class _Group:
    """Parameters of one optimizer on one device."""

    optimizer: int
    device: torch.device
    is_shared: bool
    parameters: list[nn.Parameter]
    owners: list[str] = field(default_factory=list)
    numel: list[int] = field(default_factory=list)
    is_frozen: list[bool] = field(default_factory=list)
    has_gradient: list[bool] = field(default_factory=list)
    before: Kept | None = None  # the weights that the optimizer is about to change
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
        only_size: whether norms and largest entries are all that is wanted, and nothing of the step.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> transfer = Transfer()
        >>> probe = GradientProbe(LayerMap(net), transfer)
        >>> probe.measure(0, net.parameters())
        >>> probe.finish()
        >>> probe.collect(transfer.fetch())["(root)"]["grad_norm"]
        5.0
    """

    def __init__(self, layers: LayerMap, transfer: Transfer, *, only_size: bool = False) -> None:
        self._layers = layers
        self._transfer = transfer
        self._only_size = only_size
        self._groups: list[_Group] = []
        self._without: dict[int, tuple[str, int]] = {}  # no gradient where one is due: owner and number of entries

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
            group = _Group(optimizer, device, is_shared, its_members)
            self._measure_group(group, multiplier)
            self._groups.append(group)

    def _measure_group(self, group: _Group, multiplier: Tensor | float) -> None:
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
            group.before = Kept(weights)
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
                group.found["clipped"] = norms([_gradient(p) for p in group.parameters])

    @torch.no_grad()
    def finish(self) -> None:
        """Hands everything to the transfer."""
        for i, group in enumerate(self._groups):
            group.before = None
            if not group.is_shared:
                for name, tensor in group.found.items():
                    self._transfer.put(_key(i, group, name), tensor)
                continue
            share = group.found["share"]
            for name, tensor in group.found.items():
                if name in _NORMS:
                    tensor = tensor.square() * share
                elif name in ("sum", "nonzero", "nonfinite"):
                    tensor = tensor * share
                elif name == "exponents":
                    tensor = (tensor.reshape(-1, _WIDTH) * share[:, None]).flatten()
                elif name == "max":  # sums are all that a collective makes: each rank has a row of its own
                    rows = tensor.new_zeros((self._transfer.topology.ranks, len(tensor)))
                    rows[torch.distributed.get_rank()] = tensor
                    tensor = rows.flatten()
                self._transfer.share(_key(i, group, name), tensor)

    def collect(self, host: Mapping[Hashable, Floats], *, scaled: bool = False) -> dict[str, dict[str, float]]:
        """The statistics of each layer that was measured, out of what was fetched: layer -> metric -> value.

        Args:
            host: what was fetched.
            scaled: whether a gradient scaler is at work, which skips a step for gradients that are not finite.
        """
        columns, owners = self._columns(host)
        if scaled:
            for optimizer in np.unique(columns["optimizer"]):
                mine = columns["optimizer"] == optimizer
                if columns["nonfinite"][mine].sum() > 0:
                    columns["update"][mine] = np.nan
        missing = self._missing(columns, owners)
        found = {layer: {"grad_missing_fraction": 1.0} for layer in missing}
        has = columns["has"] > 0
        layers = list(dict.fromkeys(owners[has].tolist()))
        number = {layer: i for i, layer in enumerate(layers)}
        at = np.array([number[owner] for owner in owners[has].tolist()], dtype=np.int64)
        per_layer = {
            name: np.bincount(at, np.square(column[has]) if name in _NORMS else column[has], len(layers))
            for name, column in columns.items()
        }
        largest = np.zeros(len(layers))
        np.maximum.at(largest, at, columns["max"][has])
        for i, layer in enumerate(layers):
            found[layer] = _statistics({n: float(c[i]) for n, c in per_layer.items()}, float(largest[i]))
            found[layer]["grad_missing_fraction"] = missing.get(layer, 0.0) / (
                per_layer["numel"][i] + missing.get(layer, 0.0)
            )
        return found

    def _missing(self, columns: Mapping[str, Floats], owners: npt.NDArray[np.str_]) -> dict[str, float]:
        """Entries that should have a gradient and have none: layer -> number of them."""
        frozen = np.array([frozen for group in self._groups for frozen in group.is_frozen], dtype=bool)
        on_no_rank = np.flatnonzero((columns["has"] == 0) & ~frozen)
        without = [*self._without.values(), *((str(owners[i]), int(columns["numel"][i])) for i in on_no_rank)]
        missing: dict[str, float] = {}
        for owner, entries in without:
            missing[owner] = missing.get(owner, 0.0) + entries
        return missing

    def clip_factor(self, host: Mapping[Hashable, Floats], factor: float = 1.0) -> float:
        """Total norm after clipping / before, in [0, 1]; NaN where that is not known, or a gradient was not finite.

        Args:
            host: what was fetched.
            factor: what the gradients before were multiplied by, to be those of the mean loss.
        """
        columns, _ = self._columns(host)
        before, after = _joint(columns["norm"]) / factor, _joint(columns["clipped"])
        if not (math.isfinite(before) and math.isfinite(after) and before > 0):
            return math.nan
        return min(1.0, after / before)

    def _columns(self, host: Mapping[Hashable, Floats]) -> tuple[dict[str, Floats], npt.NDArray[np.str_]]:
        """Each statistic as one column over all parameters, and the layers that they belong to."""
        columns: dict[str, list[Floats]] = {name: [] for name in (*_SUMS, "max", "numel", "has", "optimizer")}
        owners: list[str] = []
        for i, group in enumerate(self._groups):
            n = len(group.owners)
            owners += group.owners
            columns["optimizer"].append(np.full(n, float(group.optimizer)))
            columns["numel"].append(np.array(group.numel, dtype=np.float64))
            columns["has"].append(host[_key(i, group, "has")] if group.is_shared else np.ones(n))
            for name in (*_SUMS, "max"):
                # of several ranks a name that was agreed on once is there in every sample, with zeros
                column = host.get(_key(i, group, name)) if name in _OF_SIZE or not self._only_size else None
                if column is None:
                    columns[name].append(np.full(n, np.nan))
                    continue
                column = np.where(np.isfinite(column), column, np.inf)  # NaN is for what was not measured
                if group.is_shared and name == "max":
                    column = column.reshape(-1, n).max(axis=0)
                elif group.is_shared and name in _NORMS:
                    column = np.sqrt(column)
                columns[name].append(column)
        return {name: np.concatenate([*parts, np.empty(0)]) for name, parts in columns.items()}, np.array(owners)

    def histograms(self, host: Mapping[Hashable, Floats], order: Sequence[str]) -> dict[str, Ints]:
        """Exponent histograms of the first and the last third of the layers in `order` (at least one layer each)."""
        if not self._groups or self._only_size:
            return {}
        columns, owners = self._columns(host)
        known = set(owners[columns["has"] > 0])
        measured = [layer for layer in order if layer in known]
        third = max(1, len(measured) // 3)
        groups = {"grad_hist_early": set(measured[:third]), "grad_hist_late": set(measured[-third:])}
        counts = {name: np.zeros(_WIDTH) for name in groups}
        for i, group in enumerate(self._groups):
            table = host[_key(i, group, "exponents")].reshape(len(group.owners), _WIDTH)
            for name, members in groups.items():
                mine = np.array([owner in members for owner in group.owners])
                counts[name] += table[mine].sum(axis=0)
        return {name: np.rint(row).astype(np.int64) for name, row in counts.items()}


def _statistics(sums: Mapping[str, float], largest: float) -> dict[str, float]:
    """Metric -> value of one layer, out of sums over its parameters; of norms the sums of their squares."""
    total = sums["numel"]
    norm, weight, update = (math.sqrt(sums[name]) for name in ("norm", "weight", "update"))
    values = {
        "grad_norm": measured(norm),
        "grad_rms": measured(norm) / math.sqrt(total),
        "grad_max_abs": measured(largest),
        "grad_nonfinite_fraction": sums["nonfinite"] / total,
    }
    if not math.isnan(weight):
        values["weight_norm"] = measured(weight)
        values["grad_mean_abs"] = measured(sums["sum"] / total)
        values["grad_zero_fraction"] = 1.0 - sums["nonzero"] / total
    if not math.isnan(update):
        values["update_norm"] = measured(update)
        if weight > 0:
            values["update_ratio"] = measured(update / weight)
    return values


def _key(i: int, group: _Group, name: str) -> Hashable:
    """A name for the transfer, where each has one length: another layer may be trained in the next sample."""
    return "gradients", i, len(group.parameters), name


def _joint(norms: Floats) -> float:
    return math.sqrt(float(np.square(norms).sum()))


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
    first = np.repeat(np.arange(len(samples)) * _WIDTH, [len(s) for s in samples])
    at = bins.long() + torch.from_numpy(first).to(bins.device, non_blocking=True)
    counts = torch.zeros(len(samples) * _WIDTH, dtype=torch.int64, device=bins.device)
    return counts.index_add_(0, at, torch.ones_like(at))


def _selected(gradient: Tensor, most: int) -> Tensor:
    flat = gradient if gradient.dim() == 1 else gradient.reshape(-1)
    return flat if flat.numel() <= most else flat[:: coprime_stride(flat.numel(), most)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
