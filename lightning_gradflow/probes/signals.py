"""The signal that goes forward and comes back: statistics of every layer output and activation of a sampled step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.activations import BOUNDED
from lightning_gradflow.history import Floats, Point
from lightning_gradflow.probes.collector import Patience
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.flat_side import unit_axis
from lightning_gradflow.probes.gates import Gates
from lightning_gradflow.probes.gathering import Gathering, plus
from lightning_gradflow.probes.inputs import InputScale, shut_gates
from lightning_gradflow.probes.layers import ROOT, LayerMap
from lightning_gradflow.probes.observer import (
    ComparisonSeen,
    ForwardObserver,
    SequenceSeen,
    is_measurable,
)
from lightning_gradflow.probes.packing import Deltas, Seen, pack
from lightning_gradflow.probes.points import PointNames
from lightning_gradflow.probes.recurrence import RecurrentCall, Series, is_watchable, joined
from lightning_gradflow.probes.segments import RepeatedCall, Segment, may_be_repeated
from lightning_gradflow.probes.several_inputs import SeveralInputs
from lightning_gradflow.probes.shards import is_cut, local
from lightning_gradflow.probes.tables import EMBEDDINGS
from lightning_gradflow.probes.transfer import Transfer
from lightning_gradflow.probes.unpacking import Signals, unpack

_OBJECTS = 20  # that a point is worth to Python until the sample is over


class SignalProbe:
    """Watches forward and backward of one sampled step, which may take several batches (accumulation).

    A module that is called more than once is one point, its delta norm the norm over all calls; beside it stand the
    delta norms of the single calls, which are the time axis of a cell in a loop.

    Under activation checkpointing of the reentrant kind the first forward pass makes no graph: the gradients are then
    read off the outputs of the pass that the backward pass repeats, and all else off the first. Where a repeated
    segment begins with an activation module that is used in several places, its delta is missing.

    Args:
        layers: the layers of the model.
        transfer: what carries the numbers to the host, summed over ranks.
        activations: whether saturation and dead units are wanted besides the signal.
        window: samples in a row in which a unit must stay on its flat side to count as dead, in [1, inf). The
            default of 3 is full at step 2: a unit that fires for one sample in a hundred is then found alive with 85 %
            at a batch of 64.
        on_comparison: called with what may be a part of the loss; see `ForwardObserver`.
        on_sequence: called with what goes into recurrences and attentions; see there.
        on_softmax: called with the layer that a softmax is in, or behind, the function, its arguments, and whether it
            is behind.

    Raises:
        ValueError: if `window` is below 1.
    """

    def __init__(
        self,
        layers: LayerMap,
        transfer: Transfer,
        activations: bool = True,
        window: int = 3,
        on_comparison: ComparisonSeen | None = None,
        on_sequence: SequenceSeen | None = None,
        on_softmax: Callable[[str, Any, tuple[Any, ...], dict[str, Any], bool], None] | None = None,
    ) -> None:
        self._layers = layers
        self._transfer = transfer
        self._activations = activations
        self.silent = SilentUnits(window)
        self._names = PointNames(layers)
        self._observer = ForwardObserver(
            layers,
            self._on_layer,
            self._on_activation,
            on_error=self._keep,
            on_recurrence=self._on_recurrence,
            on_sequence=on_sequence,
            on_input=self._on_input,
            on_product=self._on_product,
            on_comparison=on_comparison,
            on_softmax=self._on_softmax if on_softmax is not None else None,
        )
        self._of_softmax = on_softmax
        self._handles: list[RemovableHandle] = []
        self._gathering = Gathering()
        self._segment = Segment()
        self._patience = Patience()
        self._inputs = SeveralInputs()
        self._reset()

    def _reset(self) -> None:
        self._seen: dict[Point, Seen] = {}
        self._gathering.drop()
        self._gates: Gates[Seen] = Gates()
        self._turns: Counter[tuple[str, str, str]] = Counter()  # what was called since which layer, in this pass
        self._input = InputScale()
        self._inputs.drop()
        self._before: dict[Point, Seen] = {}  # as it was when the batch began
        self._input_before = self._input
        self._input_layer: str | None = None
        self._dropped_at: str | None = None
        self._shut: dict[str, tuple[Tensor, int]] = {}  # gates of the first layer, until it is reported
        self._segment.clear()
        self._scales: dict[int, Tensor] = {}  # by backward pass
        self._recurrent: list[tuple[Point, RecurrentCall]] = []  # those that wait for the backward pass
        self._pass = 0
        self._repeats = False
        self._error: Exception | None = None
        self._release()
        self._patience.end()

    def _release(self) -> None:
        """Takes our hooks off the outputs: some of them outlive the step, and a module may return a parameter."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_observing(self) -> bool:
        """Whether the forward pass is observed at present."""
        return self._observer.is_open and not self._repeats

    @property
    def last_layer(self) -> str:
        """The layer that was called last in the last forward pass."""
        return self._names.last_layer

    @property
    def turns(self) -> dict[str, int]:
        """How often each module was called in the last forward pass, or applied one activation behind one layer."""
        found: dict[str, int] = {}
        for (name, *_), count in self._turns.items():
            found[name] = max(found.get(name, 0), count)
        return found

    def start_batch(self) -> None:
        """A batch of the sampled step starts; its backward passes are added to those of the batches before."""
        self._pass = 0
        self._patience.begin(_OBJECTS * len(self._names))
        self._gathering.flush()
        self._before = {point: copy.copy(seen) for point, seen in self._seen.items()}
        self._input_before = copy.copy(self._input)
        self._inputs.start_batch()
        self._awaits_input = self._is_first = True
        self._behind_table = False
        self._start_forward()

    def _start_forward(self) -> None:
        self._cut_shape: torch.Size | None = None
        self._gates.clear()
        self._repeats = False
        self._segment.clear()
        self._names.restart()
        self._turns.clear()
        for seen in self._seen.values():
            seen.calls, seen.without_graph = 0, []
        self._observer.open()

    def before_backward(self) -> None:
        """The forward pass is over. What checkpointing repeats from here on is not counted again."""
        if self._observer.is_open and any(seen.without_graph for seen in self._seen.values()):
            self._repeats = True
            self._names.restart()
            self._observer.follow_backward()
        else:
            self._observer.close()

    def after_backward(self, scale: Tensor | None = None) -> None:
        """A backward pass is over, or the batch.

        Args:
            scale: the factor of the gradient scaler that it was made with.
        """
        if scale is not None:
            self._scales[self._pass] = scale
        self._observer.close()
        self._repeats = False
        try:
            self._take_times()
        except Exception as error:
            self._keep(error)

    def forget_batch(self) -> None:
        """The batch had no backward pass: it has no part in the step."""
        self._observer.close()
        self._gathering.drop()
        self._seen, self._input = self._before, self._input_before
        self._inputs.forget_batch()

    def next_forward(self) -> None:
        """The same batch has another forward pass to come (manual optimization)."""
        self._pass += 1
        self._start_forward()

    def drop(self) -> None:
        """Forgets the present sample and leaves nothing behind in the model."""
        self._observer.close()
        self._reset()

    # -- inside of the user's forward and backward pass -----------------------------------------------------------

    def _keep(self, error: Exception) -> None:
        """Keeps an error of ours out of the user's forward and backward pass; `finish` raises it."""
        self._error = self._error or error

    def _on_input(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name = self._layers.name_of(module)
        if not self._repeats:  # to what is repeated its inputs come without their graph
            may_be_other = not (self._awaits_input or self._observer.input_is_detached or name == self._input_layer)
            self._inputs.take(name, module, arguments, is_other=may_be_other)
        if not self._awaits_input:
            return
        is_first, self._is_first = self._is_first, False
        # behind an embedding another layer may be the first to take numbers; the rows of a frozen one are such numbers,
        # and what another frozen layer makes looks like them
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        is_table = is_first and isinstance(module, EMBEDDINGS) and not trains
        behind_table, self._behind_table = self._behind_table, is_table
        may_follow = torch.is_grad_enabled() and (trains or is_table)
        is_input = is_first or (may_follow and (behind_table or not self._observer.input_is_detached))
        is_input = is_input and self._input.take(module, arguments, is_first=is_first)
        self._awaits_input = may_follow and not is_input
        if is_input:
            self._input_layer = name
        if name is not None and (is_first or is_input) and self._activations:
            shut = shut_gates(module, arguments)
            self._shut = {name: shut} if shut is not None else {}

    def _on_layer(self, name: str, output: Tensor) -> None:
        point = self._names.layer(name)
        if self._observer.has_dropped and self._dropped_at is None:
            self._dropped_at = name
        if self._repeats:
            self._take_again(point, output)
        else:
            seen, _ = self._take(point, output)
            self._turns[name, "", ""] += 1
            if name in self._shut:
                shut, count = self._shut.pop(name)
                seen.saturated, seen.bounded_count = plus(seen.saturated, shut), seen.bounded_count + count
            seen.input_detached += self._observer.input_is_detached
            # the part of a cut output is handed out as a plain tensor, on which activations follow
            self._cut_shape = self._observer.cut_shapes.get(name)
            seen.is_cut |= self._cut_shape is not None and output.shape == self._cut_shape

    def _on_activation(self, module: str, op: str, output: Tensor, arguments: Mapping[str, Any]) -> None:
        if self._repeats:
            waiting = {point for point, seen in self._seen.items() if seen.without_graph}
            self._take_again(self._names.known_activation(module, op, waiting), output)
            return
        owner = module if not self._layers.is_activation(module) else module.rpartition(".")[0] or ROOT
        self._turns[owner, self._names.last_layer, op] += 1
        seen, values = self._take(self._names.activation(module, op), output)
        # behind a layer that hands out its part as a plain tensor
        seen.is_cut |= self._cut_shape is not None and output.shape == self._cut_shape
        if self._activations and values is not None:
            if op in BOUNDED:
                self._gates.add(output, seen)
            last = self._names.last_layer
            layer = self._layers.module(last) if last else None
            axis = unit_axis(values.shape, layer, self._transfer.topology.model)
            self._gathering.activation(seen, op, values, arguments, axis)

    def _on_softmax(self, name: str | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = name or self._names.last_layer
        if layer and self._of_softmax is not None:
            self._of_softmax(layer, func, args, kwargs, name is None)

    def _on_product(self, factors: tuple[Any, ...]) -> None:
        for seen in self._gates.among(factors):
            seen.is_gate = True

    def _on_recurrence(self, name: str, module: nn.RNNBase, inputs: tuple[Any, ...], output: Any) -> None:
        if is_watchable(module, inputs, output):
            call = RecurrentCall(module, inputs, output)
            self._recurrent.append((self._names.layer(name), call))
            self._handles += call.watch(lambda: not self.is_observing)

    def _take_times(self) -> None:
        """Where the gradients of the backward pass that is over have come to in time."""
        waiting, self._recurrent = self._recurrent, []
        found: dict[Point, list[Series]] = {}
        for point, call in waiting:
            profile = call.profile()
            if profile is not None and point in self._seen:
                found.setdefault(point, []).append(profile)
        for point, profiles in found.items():
            times = self._seen[point].times
            together = joined(profiles)
            times[self._pass] = joined([times[self._pass], together]) if self._pass in times else together

    def _take(self, point: Point, output: Tensor) -> tuple[Seen, Tensor | None]:
        """What the point has seen, and the numbers that came out of it, if there are any."""
        seen = self._seen.get(point)
        if seen is None:
            seen = self._seen[point] = Seen()
        seen.is_cut |= is_cut(output)
        call, seen.calls = seen.calls, seen.calls + 1
        values = local(output.detach())
        if values is not None:
            values = self._gathering.output(seen, values, with_spread=point.is_layer) if values.numel() else None
        seen.ran += 1
        if output.requires_grad and torch.is_grad_enabled():
            seen.in_graph += 1
            self._watch(seen, call, output)
        else:
            seen.without_graph.append(call)
            seen.untold += may_be_repeated()
        return seen, values

    def _take_again(self, point: Point | None, output: Tensor) -> None:
        seen = self._seen.get(point) if point is not None else None
        if point is None or seen is None or not seen.without_graph:
            return
        if not may_be_repeated():
            seen.untold = max(0, seen.untold - 1)
        if output.requires_grad and torch.is_grad_enabled():
            seen.in_graph = min(seen.in_graph + 1, seen.ran)
            self._watch(seen, self._segment.repeat(point), output)

    def _watch(self, seen: Seen, call: int | RepeatedCall, output: Tensor) -> None:
        self._handles.append(output.register_hook(partial(self._on_gradient, seen, call)))

    def _on_gradient(self, seen: Seen, call: int | RepeatedCall, gradient: Tensor | None) -> None:
        # none comes where only another output of the same operation is used; and as long as the forward pass is on, it
        # comes from the user's own autograd.grad (a gradient penalty), not from the loss
        if gradient is None or self.is_observing:
            return
        try:
            if self._repeats:
                self._segment.end(self._seen)
                self._names.restart()  # the next repeated segment stands before this one
            number = call.number if isinstance(call, RepeatedCall) else call
            values = local(gradient)
            if number is not None and values is not None and values.numel() and is_measurable(values):
                deltas = seen.deltas.get(self._pass)
                if deltas is None:
                    deltas = seen.deltas[self._pass] = Deltas()
                self._gathering.delta(deltas, number, values)
        except Exception as error:
            self._keep(error)

    # -- after it ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """Ends the observation and hands what was seen to the transfer.

        Raises:
            Exception: whatever went wrong while the run was being observed.
        """
        self._observer.close()
        if self._error is not None:
            raise self._error
        self._gathering.flush()
        pack(self._seen, self._scales, self._transfer)
        self._input.pack(self._transfer)
        self._inputs.pack(self._transfer)

    def collect(self, host: Mapping[Hashable, Floats], multiplier: float = 1.0) -> Signals:
        """The statistics of each point in order of execution, out of what was fetched. Ends the sample.

        Args:
            host: what was fetched.
            multiplier: turns the gradients as they were into those of the mean loss.
        """
        first, dropped_at = self._input_layer, self._dropped_at
        self._reset()
        signals = unpack(host, self._transfer.topology, self.silent, multiplier)
        rms, deviation, layer = self._inputs.unpack(host, first)
        return replace(signals, input_rms=rms, input_deviation=deviation, input_layer=layer, dropped_at=dropped_at)

    def state_dict(self) -> dict[str, Any]:
        """Names and silent units, so that a resumed run, or one with new layers, goes on with the same columns."""
        return {"names": self._names.state_dict(), "silent": self.silent.state_dict(), "input": self._inputs.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._names.load_state_dict(state["names"])
        self.silent.load_state_dict(state["silent"])
        self._inputs.chosen = state.get("input")
