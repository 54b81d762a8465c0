"""What goes into the first layers of a network, and the scale and shift that standardise it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradflow.probes.raw_columns import raw_columns
from lightning_gradflow.probes.transfer import wide_dtype

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_MIN_SAMPLES = 2.0  # a spread that a single sample makes says nothing of the next batch
_MIN_ROUNDINGS = 10.0  # a spread of fewer roundings of the mean is noise to the layer that multiplies it
_MAX_BORDER = 3.0  # deviations from the mean that a border of zeros may lie off: as far as a usual sample does


def features_of(module: nn.Module) -> int:
    """How many features, or channels, a layer takes.

    Example:
        >>> features_of(nn.Conv2d(3, 8, 5)), features_of(nn.LSTM(4, 8))
        (3, 4)
    """
    name = "in_channels" if isinstance(module, CONVOLUTIONS) else "in_features"
    return int(getattr(module, "input_size" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else name))


class RawInput:
    """What goes into one layer in a forward pass, as long as nothing that trains has made it.

    An input is raw where autograd is on and has no history of it, or in the columns of which that is so: numbers beside
    embeddings. The other columns are not looked at. Calls under `no_grad` are passed over. A layer that also gets what
    other layers made is no first layer.

    Args:
        module: a Linear, a convolution, a recurrence or a cell of one.
    """

    def __init__(self, module: nn.Module) -> None:
        device = next(module.parameters()).device
        self._module = module
        self._nothing = torch.zeros(2, dtype=wide_dtype(device), device=device)
        self._rows: list[Tensor] = []  # (N, F) of each call
        self._eps = 0.0
        self._is_first = True
        self._map: tuple[Tensor, Tensor] | None = None
        self._output = self._nothing

    def watch(self, stack: ExitStack, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Looks on until the stack is left; with a scale and a shift the layer is given `(x - shift) / scale`."""
        self._map = None if scale is None or shift is None else (scale, shift)
        self._output = self._nothing
        stack.callback(self._module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(self._module.register_forward_hook(self._after).remove)

    @torch.no_grad()
    def sums(self, centre: Tensor | None = None) -> Tensor:
        """(4, F) number of finite values, and sums of d, d^2 and d^4, where d is the distance from `centre`."""
        total = self._nothing.new_zeros(4, features_of(self._module))
        for rows in self._rows:
            d = rows.to(total) - (0.0 if centre is None else centre)
            finite = d.isfinite()
            d = torch.where(finite, d, 0.0)
            total += torch.stack([finite.sum(0).to(d.dtype), d.sum(0), d.square().sum(0), d.pow(4).sum(0)])
        return total

    def facts(self) -> Tensor:
        """(4,) sum of squares and number of pre-activations, whether it is no first layer, rounding of its input."""
        return torch.cat([self._output, self._nothing.new_tensor([float(not self._is_first), self._eps])])

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs.get("input")
        x = given.data if isinstance(given, PackedSequence) else given
        if not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return None
        at = -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1
        is_raw = raw_columns(x, at) if x.is_floating_point() and not isinstance(x, nn.Parameter) else None
        if is_raw is None or not is_raw.any():
            self._is_first = False
            return None
        if self._map is None:
            rows = x.detach().movedim(at, -1).reshape(-1, x.shape[at])
            if not is_raw.all():
                rows = rows.masked_fill(torch.from_numpy(~is_raw).to(rows.device), torch.nan)
            self._rows.append(rows)
            self._eps = torch.finfo(_computed_in(x)).eps
        else:  # what has made the other columns is to have its gradient
            scale, shift = self._map
            x = ((x.movedim(at, -1).to(scale) - shift) / scale).movedim(-1, at).to(x.dtype)
            given = given._replace(data=x) if isinstance(given, PackedSequence) else x
        with torch.no_grad():
            self._note(_gates(module, x))
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "input": given})

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not isinstance(module, nn.RNNCellBase):
            self._note(output.detach())

    def _note(self, values: Tensor | None) -> None:
        if values is not None:
            finite = values.isfinite()
            squares = torch.where(finite, values, 0.0).to(self._nothing).square().sum()
            self._output = self._output + torch.stack([squares, finite.sum().to(squares)])


def _computed_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _gates(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the input adds to the pre-activations of a recurrence: its output is too bounded to tell."""
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    end = "_l0" if isinstance(module, nn.RNNBase) else ""
    bias = getattr(module, f"bias_ih{end}", None)  # what has none keeps None there, or nothing
    return F.linear(x, getattr(module, f"weight_ih{end}"), bias)


@dataclass(frozen=True)
class Moments:
    """Mean, spread and size of each feature over the batch and all ranks.

    What is not finite is left out, and so are columns that other layers have made.

    Args:
        mean: (F,); NaN where nothing came.
        rms: (F,) root mean square.
        deviation: (F,) standard deviation.
        peak: (F,) distance from the mean of the samples that make the spread, `sqrt(sum d^4 / sum d^2)`.
        samples: (F,) how many samples make it, `(sum d^2)^2 / sum d^4`: a third of all where they are normal, 1 where
            a single one lies off.
        output_rms: root mean square of the layer's pre-activations.
        eps: rounding of the numbers that the layer multiplies.
    """

    mean: Tensor
    rms: Tensor
    deviation: Tensor
    peak: Tensor
    samples: Tensor
    output_rms: float
    eps: float

    @property
    def size(self) -> float:
        """Root mean square over all features."""
        return float(self.rms.square().nanmean().sqrt())

    @property
    def contrast(self) -> float:
        """What tells the inputs apart, over what they have in common (see `UnscaledInputs`)."""
        return float(self.deviation.square().nansum() / (1 + self.mean.square().nansum()))


def moments(inputs: Mapping[str, RawInput], averaged: Callable[[Tensor], Tensor]) -> dict[str, Moments]:
    """The moments of what goes into each layer, of those to which nothing but raw input went on any rank.

    Two collectives, of the same length on each rank whatever its batch was.
    """
    firsts = _averaged({name: torch.cat([raw.sums().flatten(), raw.facts()]) for name, raw in inputs.items()}, averaged)
    sums = {name: first[:-4].view(4, -1) for name, first in firsts.items()}
    centred = _averaged({name: raw.sums(sums[name][1] / sums[name][0]) for name, raw in inputs.items()}, averaged)
    found = {}
    for name, first in firsts.items():
        count, total, squares, _ = sums[name]
        _, _, around, fourths = centred[name]
        output, number, is_later, eps = first[-4:].tolist()
        if is_later == 0.0 and bool(count.any()):
            found[name] = Moments(
                mean=total / count,
                rms=(squares / count).sqrt(),
                deviation=(around / count).sqrt(),
                peak=(fourths / around).sqrt().nan_to_num(0.0),
                samples=(around.square() / fourths).nan_to_num(0.0),
                output_rms=(output / number) ** 0.5 if number else float("nan"),
                eps=eps,
            )
    return found


def output_rms(inputs: Mapping[str, RawInput], averaged: Callable[[Tensor], Tensor]) -> float:
    """Largest root mean square of the pre-activations among the layers; a collective."""
    facts = _averaged({name: raw.facts() for name, raw in inputs.items()}, averaged)
    return max(((fact[0] / fact[1]).sqrt().item() for fact in facts.values()), default=float("nan"))


def _averaged(values: Mapping[str, Tensor], averaged: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All of them in one collective."""
    if not values:
        return {}
    device = next(iter(values.values())).device
    packed = averaged(torch.cat([value.flatten().to(device) for value in values.values()]))
    parts = packed.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def standardising(found: Moments, *, shiftable: bool, padded: bool) -> tuple[Tensor, Tensor]:
    """(F,) scale and (F,) shift with which `(x - shift) / scale` is a standardised input.

    The scale is the standard deviation, rounded to a power of two: to multiply with it and divide by it again and
    again then loses nothing, in half precision neither. So a standardised feature has a deviation of 0.71 to 1.41.

    - Without a bias that can take the shift up, it is 0 and the scale the root mean square.
    - A convolution pads with the 0 of its raw inputs. To standardise them puts that border at `-mean / deviation`,
      which is right for pixels and absurd for 1000 +- 1. So the scale is at least a third of the mean there.
    - Columns that are not raw stay as they are.
    - A feature is not known from this batch where fewer than two samples make its spread, as in a column that is
      nearly always 0, or where the spread is lost in the rounding of its mean. It is not shifted, and its scale
      covers what was seen of it and the median of the other scales: too large a scale only makes it slow.

    Args:
        found: what was measured.
        shiftable: whether the layer has a bias that may move.
        padded: whether it pads its input with zeros.

    Returns:
        The scale, above 0, and the shift.

    Example:
        >>> x = torch.tensor([[990.0, 0.0], [1010.0, 0.5], [990.0, 0.0], [1010.0, 0.5]])
        >>> layer = nn.Linear(2, 1)
        >>> with ExitStack() as stack:
        ...     raw = RawInput(layer)
        ...     raw.watch(stack)
        ...     _ = layer(x)
        >>> scale, shift = standardising(moments({"": raw}, lambda t: t)[""], shiftable=True, padded=False)
        >>> scale.tolist(), shift.tolist()
        ([8.0, 0.25], [1000.0, 0.25])
    """
    mean, rms = found.mean.nan_to_num(0.0), found.rms.nan_to_num(0.0)
    known = (found.samples >= _MIN_SAMPLES) & (found.deviation > _MIN_ROUNDINGS * found.eps * mean.abs())
    scale = found.deviation if shiftable else rms
    if shiftable and padded:
        scale = torch.maximum(scale, mean.abs() / _MAX_BORDER)
    typical = scale[known].median() if bool(known.any()) else rms.square().mean().sqrt()
    scale = torch.where(known, scale, torch.maximum(mean.abs() + found.peak, typical))
    scale = torch.where((scale > 0) & found.mean.isfinite(), scale, 1.0)
    shift = torch.where(known, mean, 0.0) if shiftable else torch.zeros_like(mean)
    return scale.log2().round().exp2(), shift
