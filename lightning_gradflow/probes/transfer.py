"""One copy from the device to the host for all that a sample measured, summed over ranks before where that is due."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_gradflow.history import Floats
from lightning_gradflow.probes.ranks import RankSums, Topology

_SUMMED = "summed over ranks"


class Transfer:
    """Collects 1-D tensors by name and brings them to the host in one copy for each device.

    Args:
        topology: the ranks that train together; what is shared is summed over them in one collective.
        device: where that collective is made.

    Example:
        >>> transfer = Transfer()
        >>> transfer.put("norms", torch.tensor([1.0, 2.0]))
        >>> transfer.share("squares", torch.tensor([3]))
        >>> transfer.fetch()
        {'norms': array([1., 2.]), 'squares': array([3.])}
    """

    def __init__(self, topology: Topology | None = None, device: torch.device | None = None) -> None:
        self.topology = topology or Topology()
        self._device = device or torch.device("cpu")
        self._sums = RankSums(self._device)
        self._clear()

    def _clear(self) -> None:
        self._own: dict[Hashable, Tensor] = {}
        self._shared: dict[Hashable, Tensor] = {}
        self._numbers: dict[Hashable, list[float]] = {}

    @property
    def is_alone(self) -> bool:
        """Whether there is but one rank."""
        return self.topology.ranks == 1

    @property
    def meetings(self) -> int:
        """How often this rank has met the others."""
        return self._sums.meetings

    def put(self, name: Hashable, tensor: Tensor) -> None:
        """Takes a (N,) tensor of any real type that is the same on all ranks, or concerns this rank alone."""
        self._own[name] = tensor.detach()

    def share(self, name: Hashable, tensor: Tensor) -> None:
        """Takes a (N,) tensor that is to be summed over the ranks; N belongs to the name, on every rank."""
        self._shared[name] = tensor.detach()

    def share_numbers(self, name: Hashable, numbers: Sequence[float]) -> None:
        """Takes N numbers that are on the host already, to be summed over the ranks."""
        self._numbers[name] = list(numbers)

    def drop(self) -> None:
        """Forgets what was collected."""
        self._clear()

    def fetch(self, failed: bool = False) -> dict[Hashable, Floats]:
        """Everything that was collected, as float64 arrays on the host; empties the collection.

        Args:
            failed: whether this rank has nothing to give because of an error; it has to come all the same.

        Raises:
            RankFailedError: if this or another rank failed.
        """
        own, shared, numbers = self._own, self._shared, self._numbers
        self._clear()
        if self.is_alone:
            on_host: dict[Hashable, Floats] = {name: np.array(n, dtype=np.float64) for name, n in numbers.items()}
            return _to_host({**own, **shared}) | on_host
        pieces = shared | self._numbers_on_device(numbers)
        vector = self._sums.reduce(pieces, failed)
        arrays = _to_host({**own, _SUMMED: vector})
        if not self._sums.is_agreed(arrays[_SUMMED]):
            self._sums.agree(pieces)
            arrays |= _to_host({_SUMMED: self._sums.reduce(pieces, failed)})
        return arrays | self._sums.unpack(arrays.pop(_SUMMED))

    def fetch_own(self) -> dict[Hashable, Floats]:
        """What was put and not shared, without any other rank; empties the collection."""
        own = self._own
        self._clear()
        return _to_host(own)

    def _numbers_on_device(self, numbers: Mapping[Hashable, list[float]]) -> dict[Hashable, Tensor]:
        flat = torch.tensor([x for row in numbers.values() for x in row], dtype=torch.float64)
        flat = flat.to(self._device, non_blocking=True)
        return dict(zip(numbers, flat.split([len(row) for row in numbers.values()]), strict=True))


def _to_host(pieces: Mapping[Hashable, Tensor]) -> dict[Hashable, Floats]:
    by_device: dict[torch.device, list[Hashable]] = {}
    for name, tensor in pieces.items():
        by_device.setdefault(tensor.device, []).append(name)
    arrays: dict[Hashable, Floats] = {}
    for device, names in by_device.items():
        if device.type == "cpu":  # copied, for it may change
            arrays.update((name, np.array(pieces[name].double().numpy())) for name in names)
            continue
        packed = torch.cat([pieces[name].to(wide_dtype(device)) for name in names])
        flat = packed.cpu().double().numpy()
        ends = np.cumsum([pieces[name].numel() for name in names])
        arrays.update(zip(names, np.split(flat, ends[:-1]), strict=True))
    return arrays


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device: sums of squares of a dying gradient (1e-30) underflow in float32."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
