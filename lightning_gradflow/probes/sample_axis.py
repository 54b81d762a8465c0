"""Which recurrences and attentions take the samples of a batch for the time steps of a sequence."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.recurrence import FORWARDS
from lightning_gradflow.probes.transfer import Transfer

_KEY = "sample axis"
_DEEPEST = 4  # levels of a batch that are looked through


class SampleAxis:
    """Compares the axes that layers are fed with, in one sample, with those of the batch; holds numbers alone.

    Torch's recurrences and attentions take (time, batch, features) unless they are made with `batch_first=True`. Fed
    with (batch, time, features) they run over the samples, and every shape fits all the same.

    Where it is known how many samples a batch has, this is seen: the axis that is taken for time is as long as that,
    and the one that is taken for samples is not. It is none of samples after all if it is as long as the first axis of
    anything in the batch, as in a last batch that is smaller. Nor need it be where it is a multiple of the number of
    samples, as long as nothing in the batch has these two axes: views, channels or patches of a sample are often
    treated as samples of their own.

    Example:
        >>> import torch
        >>> axis, transfer = SampleAxis(), Transfer()
        >>> axis.start_batch(64, (torch.zeros(64, 50, 3), torch.zeros(64)))
        >>> axis.see("rnn", nn.LSTM(3, 8), torch.zeros(64, 50, 3))
        >>> axis.share(transfer)
        >>> told(transfer.fetch())
        ({'rnn': {'steps_as_samples': 50.0}}, {'samples_as_steps': 64.0})
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Another sample begins."""
        self._steps: dict[str, int] = {}  # 0 where a call was fed as it should be
        self._samples = 0
        self.start_batch(None, None)

    def start_batch(self, samples: int | None, batch: Any) -> None:
        """A batch of the sampled step starts.

        Args:
            samples: how many the batch has, where that is known and they come in random order.
            batch: what `training_step` gets.
        """
        self._size = samples
        self._leading: set[tuple[int, ...]] = {*_leading(batch)} if samples is not None else set()

    def see(self, name: str, module: nn.RNNBase | nn.MultiheadAttention, sequence: Any) -> None:
        """Takes what goes into a layer; of several calls all have to be fed in the wrong order.

        Args:
            name: of the layer.
            module: the layer.
            sequence: what goes into it first, into attention behind what the module does with it.
        """
        steps = self._taken_for_samples(module, sequence)
        self._steps[name] = min(steps, self._steps.get(name, steps))
        self._samples = self._size or self._samples

    def _taken_for_samples(self, module: nn.RNNBase | nn.MultiheadAttention, sequence: Any) -> int:
        """How many time steps are; 0 where none are, or where it can't be told."""
        if isinstance(module, nn.RNNBase) and type(module).forward not in FORWARDS:  # it may transpose by itself
            return 0
        if not module.training or module.batch_first or not isinstance(sequence, Tensor) or sequence.ndim != 3:
            return 0
        first, second = sequence.shape[:2]
        if first != self._size or second in (1, first) or any(second == shape[0] for shape in self._leading):
            return 0
        return 0 if second % first == 0 and (first, second) not in self._leading else second

    def share(self, transfer: Transfer) -> None:
        """Hands it over; what any rank has seen counts for all."""
        for name, steps in self._steps.items():
            if steps:
                transfer.share_numbers((_KEY, name), [1.0, self._samples, steps])
        self.clear()


def told(host: Mapping[Hashable, Sequence[float] | Floats]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Layer -> metric -> value, and the scalars of the row, from what came to the host: means over the ranks.

    Example:
        >>> told({("sample axis", "rnn"): (2.0, 128.0, 100.0), ("sample axis", "other"): (0.0, 0.0, 0.0)})
        ({'rnn': {'steps_as_samples': 50.0}}, {'samples_as_steps': 64.0})
    """
    layers, scalars = {}, {}
    for key, sums in host.items():
        if isinstance(key, tuple) and key[0] == _KEY and sums[0] > 0:  # names stay with the ranks once they had them
            ranks, samples, steps = sums
            layers[key[1]] = {"steps_as_samples": float(round(steps / ranks))}
            scalars["samples_as_steps"] = float(round(samples / ranks))
    return layers, scalars


def _leading(batch: Any, depth: int = 0) -> Iterator[tuple[int, ...]]:
    """The first two axes of each tensor."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield tuple(batch.shape[:2])
    elif isinstance(batch, (Mapping, list, tuple)) and depth < _DEEPEST:
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leading(part, depth + 1)
