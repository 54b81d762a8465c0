"""The signal that goes forward and comes back: statistics of every layer output and activation of a sampled step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.history import Floats, Point
from lightning_gradflow.metrics import measured
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.flat_side import flat, saturated, units
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.observer import ForwardObserver, is_measurable
from lightning_gradflow.probes.points import PointNames
from lightning_gradflow.probes.ranks import PackedSum, world_size
from lightning_gradflow.probes.transfer import Transfer, wide_dtype


@dataclass
class _Seen:
    """What one point gave in the present sample; tensors stay on the device."""

    output_square: list[Tensor] = field(default_factory=list)
    output_count: int = 0
    saturated: list[Tensor] = field(default_factory=list)
    bounded_count: int = 0
    active: Tensor | None = None  # (U,) units that left the flat side at least once
    delta_square: dict[int, list[Tensor]] = field(default_factory=dict)  # by backward pass


class SignalProbe:
    """Watches forward and backward of one sampled step, which may take several batches (accumulation).

    The outputs of a module that is called more than once are taken together: a cell in a loop is one point, its delta
    norm the norm over all its time steps.

    Args:
        layers: the layers of the model.
        transfer: what carries the numbers to the host.
        activations: whether saturation and dead units are wanted besides the signal.
        window: samples in a row in which a unit must stay on its flat side to count as dead, in [1, inf). The
            default of 4 sees four different batches: a unit that fires for one sample in a hundred is then found
            alive with 92 % at a batch of 64.

    Raises:
        ValueError: if `window` is below 1.
    """

    def __init__(self, layers: LayerMap, transfer: Transfer, activations: bool = True, window: int = 4) -> None:
        self._layers = layers
        self._transfer = transfer
        self._activations = activations
        self._silent = SilentUnits(window)
        self._names = PointNames(layers)
        self._observer = ForwardObserver(layers, self._on_layer, self._on_activation, self._inside_the_run)
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._seen: dict[Point, _Seen] = {}
        self._pass = 0
        self._error: Exception | None = None
        self._release()

    def _release(self) -> None:
        """Takes our hooks off the outputs: some of them outlive the step, and a module may return a parameter."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_observing(self) -> bool:
        """Whether the forward pass is observed at present."""
        return self._observer.is_open

    @property
    def had_backward(self) -> bool:
        """Whether any loss gradient arrived in this sample."""
        return any(seen.delta_square for seen in self._seen.values())

    def start_batch(self) -> None:
        """A batch of the sampled step starts; its backward passes are added to those of the batches before."""
        self._pass = 0
        self._names.restart()
        self._observer.open()

    def before_backward(self) -> None:
        """Stops to observe: activation checkpointing repeats the forward pass in the backward pass."""
        self._observer.close()

    def next_forward(self) -> None:
        """A backward pass is over, and the same batch has another forward pass to come (manual optimization)."""
        self._pass += 1
        self._names.restart()
        self._observer.open()

    def drop(self) -> None:
        """Forgets the present sample and leaves nothing behind in the model."""
        self._observer.close()
        self._reset()

    def _on_layer(self, name: str, output: Tensor) -> None:
        self._take(self._names.layer(name), output)

    def _on_activation(self, module: str, op: str, output: Tensor, arguments: Mapping[str, Any]) -> None:
        seen = self._take(self._names.activation(module, op), output)
        if self._activations and output.numel():
            self._take_activation(seen, op, output.detach(), arguments)

    @contextlib.contextmanager
    def _inside_the_run(self) -> Iterator[None]:
        """Keeps an error of ours out of the user's forward and backward pass; `finish` raises it."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def _take_activation(self, seen: _Seen, op: str, output: Tensor, arguments: Mapping[str, Any]) -> None:
        bounded = saturated(op, output, arguments)
        if bounded is not None:
            seen.saturated.append(bounded.sum())
            seen.bounded_count += bounded.numel()
        is_flat = flat(op, output, arguments)
        last = self._names.last_layer
        by_unit = units(is_flat, self._layers.module(last) if last else None) if is_flat is not None else None
        if by_unit is not None:
            active = ~by_unit.all(dim=0)
            grown = seen.active is not None and seen.active.shape == active.shape
            seen.active = seen.active | active if grown and seen.active is not None else active

    def _take(self, point: Point, output: Tensor) -> _Seen:
        seen = self._seen.setdefault(point, _Seen())
        if output.numel():
            seen.output_square.append(_sum_of_squares(output))
            seen.output_count += output.numel()
        if output.requires_grad and torch.is_grad_enabled():

            def on_gradient(gradient: Tensor | None) -> None:
                # none comes where only another output of the same operation is used; and as long as the forward pass
                # is on, it comes from the user's own autograd.grad (a gradient penalty), not from the loss
                if gradient is not None and is_measurable(gradient) and not self.is_observing:
                    with self._inside_the_run():
                        seen.delta_square.setdefault(self._pass, []).append(_sum_of_squares(gradient))

            self._handles.append(output.register_hook(on_gradient))
        return seen

    @torch.no_grad()
    def finish(self) -> None:
        """Ends the observation, combines what was seen over ranks and hands it to the transfer.

        Raises:
            Exception: whatever went wrong while the run was being observed.
        """
        self._observer.close()
        if self._error is not None:
            _combine(self._nothing())
            raise self._error
        seen = list(self._seen.values())
        some = next((square for point in seen for square in point.output_square), None)
        if some is None:
            self._seen = {}
            _combine(self._nothing())
            return
        device, dtype = some.device, wide_dtype(some.device)

        def stack(rows: list[list[Tensor]]) -> Tensor:
            zero = torch.zeros((), dtype=dtype, device=device)
            return torch.stack([sum((value.to(device, dtype) for value in row), start=zero) for row in rows])

        passes = range(1 + max((k for point in seen for k in point.delta_square), default=0))
        deltas = [point.delta_square.get(k, []) for k in passes for point in seen]
        counts = [[point.output_count, point.bounded_count] for point in seen]
        sections = {
            "output_square": stack([point.output_square for point in seen]),
            "saturated": stack([point.saturated for point in seen]),
            "delta_square": stack(deltas),
            "delta_count": torch.tensor([len(row) for row in deltas], dtype=dtype, device=device),
            "counts": torch.tensor(counts, dtype=dtype, device=device).T.flatten(),
        }
        active = {point.name: s.active for point, s in self._seen.items() if s.active is not None}
        vector = torch.cat([*sections.values(), *(units.to(device, dtype) for units in active.values())])
        combined = _combine(vector)
        sizes = [section.numel() for section in sections.values()]
        *pieces, rest = combined.split([*sizes, len(combined) - sum(sizes)])
        for name, piece in zip(sections, pieces, strict=True):
            self._transfer.put(f"signals/{name}", piece)
        if active:
            alive = rest.split([units.numel() for units in active.values()])
            dead = [self._silent.update(name, units > 0) for name, units in zip(active, alive, strict=True)]
            self._transfer.put("signals/dead", torch.stack(dead))

    def _nothing(self) -> Tensor:
        """What a rank without measurements gives; its shape tells the others."""
        device = self._layers.device
        return torch.zeros(1, dtype=wide_dtype(device), device=device)

    def collect(self, host: Mapping[str, Floats]) -> dict[Point, dict[str, float]]:
        """The statistics of each point in order of execution, out of what was fetched. Ends the sample."""
        seen, n = self._seen, len(self._seen)
        self._reset()
        if not n:
            return {}
        deltas = np.sqrt(host["signals/delta_square"]).reshape(-1, n) / world_size()
        chosen = _choose_pass(host["signals/delta_count"].reshape(-1, n) > 0)
        counts, bounded = host["signals/counts"].reshape(2, n)
        dead = iter(host.get("signals/dead", np.empty(0)))
        found: dict[Point, dict[str, float]] = {}
        for i, (point, was) in enumerate(seen.items()):
            values = found[point] = {}
            if counts[i]:
                values["output_rms"] = measured(np.sqrt(host["signals/output_square"][i] / counts[i]))
            if bounded[i]:
                values["saturated_fraction"] = float(host["signals/saturated"][i] / bounded[i])
            if was.active is not None:
                values["dead_fraction"] = float(next(dead))
            if chosen[i] >= 0:
                values["delta_norm"] = measured(deltas[chosen[i], i])
                values["backward_pass"] = float(chosen[i])
        return found


def _sum_of_squares(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=wide_dtype(tensor.device))
    return norm.square()


def _combine(vector: Tensor) -> Tensor:
    """The sum over ranks. One that has nothing to give has to come all the same, or the others would wait for it."""
    packed = PackedSum().to(vector.device)
    packed.update(vector)
    combined: Tensor = packed.compute()
    return combined


def _choose_pass(measured: Any) -> list[int]:
    """For each of P points the backward pass to take its delta from, out of (K, P); -1 where there is none.

    Only norms of one backward pass can be compared, so that the pass through the most points comes first.
    """
    order = np.argsort(-measured.sum(axis=1), kind="stable")
    return [next((int(k) for k in order if measured[k, i]), -1) for i in range(measured.shape[1])]
