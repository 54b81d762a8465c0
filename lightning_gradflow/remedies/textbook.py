"""Textbook initialisation by name, of any layer that has one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_gradflow.activations import BOUNDED, RECTIFIERS, SIGMOIDS
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.probes.weight_size import TRANSPOSED

INITIALISATIONS = ("glorot", "he", "lecun", "orthogonal")
"""The names that `initialise` takes."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WIDENING = {"sigmoid": 2.0, "hardsigmoid": 3.0}  # sigmoid(x) = (1 + tanh(x / 2)) / 2, hardsigmoid in the same way


@dataclass(frozen=True)
class _Part:
    """A linear map inside of a weight, and the view of the fresh weight that holds it.

    Args:
        values: (outputs, inputs, ...) a view; to write into it is to write into the fresh weight.
        fan_in: numbers that each output is a sum over, on average.
        fan_out: outputs that each input goes into, on average.
    """

    values: Tensor
    fan_in: float
    fan_out: float


def name_for(after: str) -> str:
    """The initialisation that is made for the activation that follows.

    Args:
        after: the activation, or "" for none.

    Example:
        >>> [name_for(after) for after in ("relu", "selu", "tanh", "")]
        ['he', 'lecun', 'orthogonal', 'glorot']
    """
    if after in RECTIFIERS:
        return "he"
    if after == "selu":
        return "lecun"
    return "orthogonal" if after in BOUNDED else "glorot"


def gain_between(before: str, after: str) -> float:
    """What a weight is multiplied by, so that the signal keeps its size through it and its activation.

    - after a sigmoid 2, since it moves half as far as a tanh;
    - before a sigmoid 2, a hardsigmoid 3, since it moves that much slower; so 4 between two sigmoids;
    - before ReLU and its kin the square root of 2, since half of what comes is lost;
    - in all other places 1: the slope of tanh, softsign and SELU in the middle.

    Args:
        before: the activation that the input comes from, or "".
        after: the activation that follows, or "".

    Example:
        >>> gain_between("sigmoid", "sigmoid"), gain_between("tanh", "tanh"), round(gain_between("", "relu"), 3)
        (4.0, 1.0, 1.414)
    """
    own = _WIDENING.get(after, math.sqrt(2) if after in RECTIFIERS else 1.0)
    return own * (2.0 if before in SIGMOIDS else 1.0)


@torch.no_grad()
def initialise(
    module: nn.Module,
    name: str,
    generator: torch.Generator,
    *,
    before: str = "",
    after: str = "",
    gain: float | None = None,
) -> list[nn.Parameter]:
    r"""Draws a layer anew, by one of the initialisations that have a name.

    With the gain g of `gain_between` the weights are normal, with the variance

        glorot      g^2 * 2 / (fan_in + fan_out)    forward and backward signal kept as well as both can be
        he          2 / fan_in                      the forward signal before ReLU (g^2 for g = sqrt(2))
        lecun       1 / fan_in                      the forward signal before SELU
        orthogonal  g times orthonormal rows or columns, the fewer of the two

    where after a sigmoid he and lecun count 4 times. The fans are numbers of terms in a sum: those of a convolution
    count the kernel and what is in the same group, over the stride for the fan-out; those of a transposed one over the
    stride for the fan-in. (`torch.nn.init` takes the fans of a transposed convolution the other way round, and does not
    know groups in its fan-out.) An embedding is a linear map of which one input is 1, so its fan-in is 1. A bilinear
    layer sums over pairs. A `MultiheadAttention` is drawn by block: query, key and value; its output projection is a
    layer of its own.

    The bias is 0, or `-weight.sum(1) / 2` where the input comes from a sigmoid, whose mean is 1/2; that of a
    `MultiheadAttention` is always 0.

    Args:
        module: a Linear, Bilinear, convolution, transposed convolution, embedding or MultiheadAttention. Any other one
            is left as it is; so are parametrized weights (weight norm), which are computed anew at each use, and those
            that no shape is known of yet. Padding rows of an embedding stay zero.
        name: one of `INITIALISATIONS`.
        generator: on the CPU; the same seed gives the same weights on every rank and device, sharded or not, and the
            global random state is not touched.
        before: the activation that its input comes from, or "".
        after: the activation that follows, or "".
        gain: g itself, in (0, inf), for any name and in the place of what the activations ask for.

    Returns:
        The parameters that were drawn anew; frozen ones are left as they are. Their pending gradient is dropped.

    Raises:
        ValueError: if the name is unknown or the gain not above zero.

    References:
        Glorot and Bengio 2010; Saxe et al. 2014 (orthogonal); He et al. 2015; Klambauer et al. 2017 (LeCun, for SELU).

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> changed = initialise(layer, "orthogonal", torch.Generator().manual_seed(0), before="tanh", after="tanh")
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(8), atol=1e-5), len(changed)
        (True, 2)
    """
    if name not in INITIALISATIONS:
        raise ValueError(f"name must be one of {INITIALISATIONS}, got {name!r}")
    if gain is not None and not gain > 0:
        raise ValueError(f"gain must be in (0, inf), got {gain!r}")
    changed: list[nn.Parameter] = []
    centre: Tensor | None = None
    for key in _weights(module):
        weight = getattr(module, key, None)
        if not is_writable(weight):
            continue
        fresh = torch.empty(weight.shape)
        for part in _parts(module, fresh):
            _fill(part, name, _gain(name, before, after) if gain is None else gain, generator)
        if isinstance(module, _EMBEDDINGS) and module.padding_idx is not None:
            fresh[module.padding_idx] = 0
        assign(weight, fresh)
        changed.append(weight)
        if before in SIGMOIDS and key == "weight":
            centre = _centring(module, fresh)
    for key in ("bias", "in_proj_bias"):
        bias = getattr(module, key, None)
        if changed and is_writable(bias):
            assign(bias, torch.zeros(bias.shape) if centre is None else centre)
            changed.append(bias)
    return changed


def is_writable(parameter: object) -> TypeGuard[nn.Parameter]:
    """Whether it is a parameter that trains, and that something can be written into.

    Example:
        >>> is_writable(nn.Parameter(torch.ones(2))), is_writable(nn.Parameter(torch.ones(2), requires_grad=False))
        (True, False)
    """
    if not isinstance(parameter, nn.Parameter) or isinstance(parameter, nn.UninitializedParameter):
        return False
    return parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta


@torch.no_grad()
def assign(parameter: nn.Parameter, values: Tensor) -> None:
    """Writes into a parameter, in its own precision and on its own device, and drops its pending gradient.

    Args:
        parameter: it may be sharded (DTensor): then all ranks come here, each with the same values.
        values: the whole of it.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        >>> assign(weight, torch.ones(2))
        >>> weight.tolist()
        [1.0, 1.0]
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = parameter
        values = distribute_tensor(
            values.to(parameter.device, parameter.dtype), spread.device_mesh, tuple(spread.placements)
        )
    parameter.copy_(values)
    parameter.grad = None


def _weights(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_EMBEDDINGS)) else ()


def _parts(module: nn.Module, fresh: Tensor) -> list[_Part]:
    """The linear maps in a weight of the module: one, one for each group, or one for query, key and value each."""
    if isinstance(module, nn.MultiheadAttention):
        blocks = fresh.split(module.embed_dim)
        return [_Part(block, block.shape[1], block.shape[0]) for block in blocks]
    if isinstance(module, _EMBEDDINGS):
        return [_Part(fresh.T, 1, fresh.shape[1])]
    if isinstance(module, nn.Bilinear):
        outputs, left, right = fresh.shape
        return [_Part(fresh, left * right, outputs * (left + right) / 2)]
    if not isinstance(module, _CONVOLUTIONS):
        return [_Part(fresh, fresh.shape[1], fresh.shape[0])]
    taps, stride = math.prod(module.kernel_size), math.prod(module.stride)
    is_transposed = isinstance(module, TRANSPOSED)
    parts = []
    for group in fresh.chunk(module.groups):
        values = group.transpose(0, 1) if is_transposed else group
        many, few = values.shape[1] * taps, values.shape[0] * taps
        parts.append(_Part(values, many / stride, few) if is_transposed else _Part(values, many, few / stride))
    return parts


def _gain(name: str, before: str, after: str) -> float:
    """He and LeCun are made for one activation, and have its gain."""
    made_for = {"he": "relu", "lecun": "selu"}.get(name, after)
    return gain_between(before, made_for)


def _fill(part: _Part, name: str, gain: float, generator: torch.Generator) -> None:
    if name == "orthogonal":
        matrix = torch.empty(len(part.values), math.prod(part.values.shape[1:]))
        nn.init.orthogonal_(matrix, gain=gain, generator=generator)
        part.values.copy_(matrix.view(part.values.shape))
        return
    fan = (part.fan_in + part.fan_out) / 2 if name == "glorot" else part.fan_in
    part.values.normal_(0, gain / math.sqrt(fan), generator=generator)


def _centring(module: nn.Module, fresh: Tensor) -> Tensor:
    """Takes away what the mean 1/2 of a sigmoid's output adds to each unit."""
    if isinstance(module, nn.Bilinear):
        return -0.25 * fresh.flatten(1).sum(dim=1)  # a product of two of them
    parts = _parts(module, fresh)
    stride = math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1
    return torch.cat([-0.5 * part.values.flatten(1).sum(dim=1) / stride for part in parts])
