"""How far the weights can stretch a signal: largest singular values, and for recurrences the spectral radius."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats
from lightning_gradflow.metrics import measured
from lightning_gradflow.probes.copied_units import MADE_OF_UNITS, has_units, matrix_spread, unit_spread
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.norm_gains import norm_gains
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.state_weights import gates_of, stack_gain, state_weights
from lightning_gradflow.probes.tables import EMBEDDINGS, table_cosine, table_rms
from lightning_gradflow.probes.transfer import Transfer, wide_dtype
from lightning_gradflow.probes.weight_size import weight_size
from lightning_gradflow.probes.zero_weights import zero_weights

_KEY = "spectra"
_COPIED, _SIMILAR, _ZERO, _PULLED, _SMALL_GAINS = ":copied", "::alike", "::zero", ":pulled", "::gains"
_COPIES = 1e-4  # of their size: so much at most may be rounding
_ALIKE = 0.9  # of it, by which units may differ that have a mean in common
_GAIN = 0.1  # where 1 is usual
_PRODUCTS = 2
_SMALL, _TOGETHER = 1 << 14, 256  # entries of a matrix, and how many of them, that a call is shared by
_SHARE = 0.25  # of the newest sample in the mean growth
_TINY = 1e-30  # a weight of zeros has no logarithm
_FIRST_PRODUCTS = 16  # to get near the leading direction; later samples start from where the last one ended


class SpectralProbe:
    r"""Largest singular value of each layer's largest weight matrix, and the spectral radius of recurrent weights.

    The signal that comes back through a weight grows by no more than its largest singular value :math:`\|W\|`. For a
    recurrence :math:`\|W_{hh}\| < 1 / \max \phi'` (1 for tanh, 4 for sigmoid) is sufficient for a gradient that
    vanishes through time, and a spectral radius above that is necessary for one that explodes.

    Two products with the matrix a sample, warm-started from the sample before: :math:`W^T W v` for the singular value,
    which comes from below; for the radius the mean growth per product over the last samples, since under a complex pair
    the growth swings from product to product. Nothing is drawn: the first vector is a fixed one.

    Of a recurrence the matrices are all its W_hh, and the largest number counts; of LSTM and GRU the radius is that of
    the block that makes the new content, and of a layer in a loop that of its square weight (see `state_weights`).
    Embeddings and biases are left out, and all weights of a model that is sharded over ranks.

    In the first sample it is also seen whether the units of a layer, or of a matrix that is no layer's, are copies of
    one another, or alike, and get the same gradient, without which they don't stay copies; whether weights are zero,
    and get a zero gradient; and how large the gains of norm layers are, and their mean. Where they are, or gains are
    below 0.1, they are looked at in the later samples too. How large the entries of a layer's largest matrix were is
    read before the first step. Of an embedding, and of matrices that are no layer's, the first sample has the size, and
    the cosine with the gradient; the later samples too, as long as it has been above 0.

    Args:
        layers: whose weights are read.
        transfer: what carries the numbers to the host.

    References:
        Pascanu et al. 2013, On the difficulty of training recurrent neural networks; Yoshida and Miyato 2017.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> transfer = Transfer()
        >>> probe = SpectralProbe(LayerMap(net), transfer)
        >>> probe.measure()
        >>> round(probe.collect(transfer.fetch())["(root)"]["spectral_norm"], 6)
        3.0
    """

    def __init__(self, layers: LayerMap, transfer: Transfer) -> None:
        self._layers = layers
        self._transfer = transfer
        self._vectors: dict[str, Tensor] = {}
        self._copied: set[str] = set()  # layers whose units were copies once
        self._alike: set[str] = set()  # and those that are alike
        self._zero: set[str] = set()  # layers with weights that were zero, and got no gradient, so far
        self._pulled: set[str] = set()  # tables whose gradient has pointed along them, so far
        self._small_gains: set[str] = set()  # norm layers with small gains, so far
        self._sizes: list[tuple[str, str, Tensor]] = []  # of the weights before the first step
        self._has_begun, self._is_first = False, True
        self._measured: list[list[tuple[str, str]]] = []  # layer, metric; a list for each device

    @torch.no_grad()
    def before_step(self) -> None:
        """In the first sample of a run, reads how large the weights of layers are that are about to be changed."""
        if self._sizes or self._has_begun or self._vectors or not self._are_alike():
            return
        self._sizes = [
            (layer, *of_matrix) for layer in self._layers.names for of_matrix in _sizes(self._layers.module(layer))
        ]

    def _are_alike(self) -> bool:
        """Whether all ranks hold the same: beside sharded parameters nobody sees to it that the others are."""
        return self._transfer.is_alone or not any(
            is_sharded(p) for name in self._layers.names for p in self._layers.module(name).parameters(recurse=False)
        )

    @torch.no_grad()
    def measure(self, turns: Mapping[str, int] | None = None) -> None:
        """Reads the weights as they are now, and hands the numbers to the transfer.

        Args:
            turns: how often each layer was called in the forward pass: those of a loop are recurrences too.
        """
        turns = turns or {}
        self._measured, self._is_first = [], not (self._vectors or self._has_begun)
        self._has_begun = True
        if not self._are_alike():
            return
        found: list[tuple[str, str, Tensor | _Matrix]] = [*self._sizes]
        self._sizes = []
        found += [
            (layer, metric, value)
            for layer in self._layers.names
            for metric, value in self._of_layer(layer, self._layers.module(layer), turns.get(layer, 1))
        ]
        norms = self._norms([value for _, _, value in found if isinstance(value, _Matrix)])
        by_device: dict[torch.device, list[Tensor]] = {}
        measured: dict[torch.device, list[tuple[str, str]]] = {}
        for layer, metric, value in found:
            number = norms[value.name] if isinstance(value, _Matrix) else value.to(wide_dtype(value.device))
            by_device.setdefault(number.device, []).append(number)
            measured.setdefault(number.device, []).append((layer, metric))
        self._measured = list(measured.values())
        for i, values in enumerate(by_device.values()):
            self._transfer.put((_KEY, i), torch.stack(values))

    def collect(self, host: Mapping[Hashable, Floats]) -> dict[str, dict[str, float]]:
        """Layer -> metric -> value, out of what was fetched."""
        entries = [entry for one in self._measured for entry in one]
        numbers = [x for i in range(len(self._measured)) for x in host[_KEY, i]]
        found: dict[str, dict[str, float]] = {}
        for (layer, metric), x in zip(entries, numbers, strict=True):
            if metric in ("hh_to_ih", "stack_gain", "table_cosine"):
                if math.isfinite(x):  # 0 / 0 where the gradients are gone by now
                    found.setdefault(layer, {})[metric] = float(x)
                continue
            values = found.setdefault(layer, {})
            values[metric] = max(values.get(metric, 0.0), measured(float(x)))
        self._copied |= {
            layer
            for layer, values in found.items()
            if min(values.get(name, math.inf) for name in ("unit_spread", "matrix_spread")) < _COPIES
        }
        self._alike = {layer for layer, values in found.items() if values.get("unit_spread", math.inf) < _ALIKE}
        counts = {layer: values["zero_weights"] for layer, values in found.items() if "zero_weights" in values}
        self._zero = (self._zero - counts.keys()) | {layer for layer, count in counts.items() if count > 0}
        self._pulled = {layer for layer, values in found.items() if values.get("table_cosine", 0.0) > 0}
        self._small_gains = {layer for layer, values in found.items() if values.get("gain_rms", math.inf) < _GAIN}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The vectors that the next sample starts from, and which layers it looks at once more."""
        copied = {f"{layer}{_COPIED}": torch.ones(()) for layer in sorted(self._copied)}
        alike = {f"{layer}{_SIMILAR}": torch.ones(()) for layer in sorted(self._alike)}
        zero = {f"{layer}{_ZERO}": torch.ones(()) for layer in sorted(self._zero)}
        pulled = {f"{layer}{_PULLED}": torch.ones(()) for layer in sorted(self._pulled)}
        gains = {f"{layer}{_SMALL_GAINS}": torch.ones(()) for layer in sorted(self._small_gains)}
        return {name: vector.clone() for name, vector in self._vectors.items()} | copied | alike | zero | pulled | gains

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._copied = {name.removesuffix(_COPIED) for name in state if name.endswith(_COPIED)}
        self._alike = {name.removesuffix(_SIMILAR) for name in state if name.endswith(_SIMILAR)}
        self._zero = {name.removesuffix(_ZERO) for name in state if name.endswith(_ZERO)}
        self._pulled = {name.removesuffix(_PULLED) for name in state if name.endswith(_PULLED)}
        self._small_gains = {name.removesuffix(_SMALL_GAINS) for name in state if name.endswith(_SMALL_GAINS)}
        kinds = (_COPIED, _SIMILAR, _ZERO, _PULLED, _SMALL_GAINS)
        vectors = {name: vector for name, vector in state.items() if not name.endswith(kinds)}
        self._vectors = {name: torch.as_tensor(vector).clone() for name, vector in vectors.items()}

    def _of_layer(self, layer: str, module: nn.Module, turns: int) -> Iterator[tuple[str, Tensor | _Matrix]]:
        if (layer in self._zero or self._is_first) and (count := zero_weights(module)) is not None:
            yield "zero_weights", count
        if (layer in self._pulled or self._is_first) and (cosine := table_cosine(module)) is not None:
            yield "table_cosine", cosine
        if (layer in self._copied or self._is_first) and (spread := matrix_spread(module)) is not None:
            yield "matrix_spread", spread
        if (layer in self._small_gains or self._is_first) and (gains := norm_gains(module)) is not None:
            yield "gain_rms", gains[0]
            yield "gain_mean", gains[1]
        if self._is_first and (size := table_rms(module)) is not None:
            yield "embedding_rms", size
        weights = {key: p for key, p in module.named_parameters(recurse=False) if _is_matrix(p)}
        if not weights:
            return
        key = max(weights, key=lambda key: weights[key].numel())
        if isinstance(module, EMBEDDINGS):
            return
        if layer in self._copied | self._alike or (self._is_first and has_units(module)):
            yield "unit_spread", unit_spread(module, weights[key])
            if (gradient := weights[key].grad) is not None:
                yield "unit_grad_spread", unit_spread(module, gradient)
        is_recurrence = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        for name, square in state_weights(module, turns):
            yield (
                ("recurrent_radius" if is_recurrence else "loop_radius"),
                self._radius(f"{layer}:{name}:radius", square),
            )
        if not is_recurrence:
            yield "spectral_norm", _Matrix(f"{layer}:{key}", weights[key].detach().flatten(1))
            return
        recurrent = {key: p for key, p in weights.items() if key.startswith("weight_hh")}
        if self._is_first:
            yield "recurrent_gates", torch.full((), float(gates_of(module)), device=weights[key].device)
        for name, parameter in recurrent.items():
            yield "spectral_norm", _Matrix(f"{layer}:{name}", parameter.detach())
        inputs = [p.grad for key, p in weights.items() if key.startswith("weight_ih") and p.grad is not None]
        states = [p.grad for p in recurrent.values() if p.grad is not None]
        if inputs and states:
            wide = wide_dtype(inputs[0].device)
            above, below = (torch.stack(torch._foreach_norm(g, 2, dtype=wide)).norm() for g in (states, inputs))
            yield "hh_to_ih", above / below
        if isinstance(module, nn.RNNBase) and (gain := stack_gain(module)) is not None:
            yield "stack_gain", gain

    def _norms(self, matrices: Sequence[_Matrix]) -> dict[str, Tensor]:
        """By name the singular values, in the widest float; small matrices of one shape are multiplied together."""
        alike: dict[Hashable, list[_Matrix]] = {}
        for matrix in matrices:
            weight, is_known = matrix.weight, self._is_known(matrix.name, matrix.weight)
            own = matrix.name if weight.numel() > _SMALL else ""
            alike.setdefault((weight.shape, weight.dtype, weight.device, is_known, own), []).append(matrix)
        found: dict[str, Tensor] = {}
        for group in alike.values():
            for first in range(0, len(group), _TOGETHER):
                found |= self._norms_of_alike(group[first : first + _TOGETHER])
        return found

    def _norms_of_alike(self, matrices: Sequence[_Matrix]) -> dict[str, Tensor]:
        starts = [self._start(matrix.name, matrix.weight) for matrix in matrices]
        products = starts[0][1]
        v = torch.stack([start for start, _ in starts])[:, :, None]
        # a single one is not copied
        weights = torch.stack([m.weight for m in matrices]) if len(matrices) > 1 else matrices[0].weight[None]
        norm = v.new_zeros(len(matrices))
        for _ in range(products // 2):
            u = weights @ v.to(weights.dtype)
            norm = u.to(v.dtype).norm(dim=1).squeeze(1)
            # a weight of zeros leaves the vector as it is; one that is not finite must not spoil it for good
            v = _direction((weights.mT @ u).to(v.dtype), v)
        for matrix, vector in zip(matrices, v.squeeze(2), strict=True):
            self._vectors[matrix.name] = vector
        names = [matrix.name for matrix in matrices]
        return dict(zip(names, norm.to(wide_dtype(norm.device)), strict=True))

    def _radius(self, name: str, weight: Tensor) -> Tensor:
        v, products = self._start(name, weight)
        growth = []
        for _ in range(products):
            image = (weight @ v.to(weight.dtype)).to(v.dtype)
            growth.append(image.norm())
            v = _direction(image[:, None], v[:, None])[:, 0]
        logs = torch.stack(growth[len(growth) // 2 :] if products > _PRODUCTS else growth).clamp(min=_TINY).log()
        before = self._vectors.get(f"{name}:growth")
        mean = logs.mean() if before is None else before.to(logs) + _SHARE * (logs.mean() - before.to(logs))
        self._vectors[name] = v
        if before is None:
            self._vectors[f"{name}:growth"] = mean
        else:  # what is not finite must not stay
            self._vectors[f"{name}:growth"] = torch.where(torch.isfinite(mean), mean, before.to(logs))
        return mean.exp()

    def _start(self, name: str, weight: Tensor) -> tuple[Tensor, int]:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self._is_known(name, weight):
            return self._vectors[name].to(weight.device, dtype), _PRODUCTS
        # no symmetry of a weight that people write down leaves it out: no two entries are equal
        start = torch.cos(torch.arange(1, weight.shape[1] + 1, device=weight.device, dtype=dtype))
        return start / start.norm(), _FIRST_PRODUCTS

    def _is_known(self, name: str, weight: Tensor) -> bool:
        known = self._vectors.get(name)
        return known is not None and len(known) == weight.shape[1]


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A weight whose largest singular value is wanted."""

    name: str
    weight: Tensor


def _is_matrix(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or is_sharded(parameter):
        return False
    return parameter.ndim >= 2 and parameter.numel() > 0 and parameter.is_floating_point() and not parameter.is_meta


def _sizes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Of the largest matrix of a layer that is made of units; see `weight_size`."""
    weights = [p for p in module.parameters(recurse=False) if _is_matrix(p)]
    if weights and isinstance(module, MADE_OF_UNITS):
        weight = max(weights, key=Tensor.numel)
        yield "initial_size", weight_size(module, weight)
        yield "initial_norm", torch.linalg.vector_norm(weight, dtype=wide_dtype(weight.device))


def _direction(vector: Tensor, otherwise: Tensor) -> Tensor:
    """Of (..., N, 1) vectors."""
    norm = vector.norm(dim=-2, keepdim=True)
    return torch.where(torch.isfinite(norm) & (norm > 0), vector / norm, otherwise)
