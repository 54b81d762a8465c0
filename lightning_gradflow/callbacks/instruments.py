"""The probes of a sampled step, used together, and what they have found when it is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_gradflow.callbacks.rows import by_identity, columns, evenly, full_columns, totals
from lightning_gradflow.detectors.known import newest_known
from lightning_gradflow.history import Floats, History
from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.loss_graph import LossProbe
from lightning_gradflow.probes.loss_graph import told as told_of_loss
from lightning_gradflow.probes.sample_axis import SampleAxis
from lightning_gradflow.probes.sample_axis import told as told_of_axes
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.softmax_scores import METRICS as OF_SOFTMAXES
from lightning_gradflow.probes.softmax_scores import SoftmaxScores
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.transfer import Transfer
from lightning_gradflow.probes.unheld import Unheld
from lightning_gradflow.probes.unpacking import Signals

Host = Mapping[Hashable, Floats]
"""What came to the host: name -> numbers."""


@dataclass(frozen=True)
class Found:
    """What a sampled step has shown: the parts of a row of these names."""

    values: dict[str, Floats]
    scalars: dict[str, float]
    histograms: Mapping[str, Any]
    calls: dict[str, Floats]


class Instruments:
    """All probes of a model. They are told what happens in a step, hand over what they saw, and say what it means.

    Args:
        model: whose layers are measured.
        history: takes the names of layers and points.
        transfer: brings the numbers to the host, summed over the ranks.
        gradients: whether parameter gradients are read.
        activations: whether saturation and dead units are measured.
        window: samples in a row in which a unit must be silent to count as dead.
    """

    def __init__(
        self,
        model: nn.Module,
        history: History,
        transfer: Transfer,
        *,
        gradients: bool,
        activations: bool,
        window: int,
    ) -> None:
        self._model = model
        self._history = history
        self._transfer = transfer
        self._measures_gradients = gradients
        self._measures_activations = activations
        self._window = window
        self._loss = LossProbe()
        self._axis = SampleAxis()
        self._softmaxes = SoftmaxScores()
        self.gradients_only = False
        """Whether nothing but the size of the parameter gradients is read in the present step."""
        self._look_at_model()

    def _look_at_model(self) -> None:
        self._layers = LayerMap(self._model)
        self._history.layer_axis.merge(self._layers.names)
        self._signals = SignalProbe(
            self._layers,
            self._transfer,
            self._measures_activations,
            self._window,
            self._loss.see,
            self._axis.see,
            self._softmaxes.see,
        )
        self._spectra = SpectralProbe(self._layers, self._transfer)
        self._gradients = GradientProbe(self._layers, self._transfer)
        self._unheld = Unheld(self._model, self._layers)

    # -- in the course of a step ------------------------------------------------------------------------------------

    def clear(self) -> None:
        """A step begins, of which nothing is known yet."""
        self._loss.clear()
        self._axis.clear()
        is_first = not len(self._history)
        known = () if self._softmaxes.has_begun else (newest_known(self._history, name) for name in OF_SOFTMAXES)
        self._softmaxes.start(is_first=is_first, newest=[gaps for gaps in known if gaps is not None])

    def start_step(self, gradients_only: bool) -> None:
        """The same on a rank that measures.

        Args:
            gradients_only: whether nothing but the size of the parameter gradients is read.
        """
        self.gradients_only = gradients_only
        self._signals.drop()
        if not self._layers.covers(self._model):  # layers were added or replaced in the run
            before = self.state_dict()
            self._look_at_model()
            self.load_state_dict(before)
        self._gradients = GradientProbe(self._layers, self._transfer, only_size=gradients_only)

    def start_batch(self, batch: Any, samples: int | None) -> None:
        """A batch of the step starts; see `Sampler.start_batch`."""
        if not self.gradients_only:
            self._axis.start_batch(samples, batch)
            self._signals.start_batch()

    def before_backward(self, loss: Tensor | None) -> None:
        """A forward pass is over; see `Sampler.before_backward`."""
        if not self.gradients_only:
            self._signals.before_backward()
            if loss is not None:
                self._loss.before_backward(loss)

    def after_backward(self, scale: Tensor | None, more_to_come: bool) -> None:
        """A backward pass is over; see `Sampler.after_backward`."""
        if not self.gradients_only:
            self._signals.after_backward(scale)
            if more_to_come:
                self._signals.next_forward()

    def end_batch(self, in_vain: bool) -> None:
        """A batch is over.

        Args:
            in_vain: whether it has no part in the step.
        """
        if not self.gradients_only:
            self._signals.after_backward()
            if in_vain:
                self._signals.forget_batch()

    def read_gradients(
        self,
        number: int,
        parameters: Iterable[nn.Parameter],
        held: Callable[[], Iterable[nn.Parameter]] | None,
        multiplier: Tensor | float,
    ) -> None:
        """Reads the gradients that an optimizer is about to use.

        Args:
            number: of the optimizer, in the order of their steps.
            parameters: that it holds.
            held: gives those that any optimizer holds; None where that is not asked.
            multiplier: of the gradients.
        """
        if not self._measures_gradients:
            return
        self._layers.find_owners(self._model)
        if not self.gradients_only:
            if held is not None:
                self._gradients.note_unheld(self._unheld.measure(held()))
            self._spectra.before_step()
        self._gradients.measure(number, parameters, multiplier)

    def after_optimizer_step(self, number: int, gradients_changed: bool) -> None:
        """Reads what the step of an optimizer changed.

        Args:
            number: as for `read_gradients`.
            gradients_changed: whether others than those that were read may stand there now.
        """
        if self._measures_gradients and not self.gradients_only:
            self._gradients.after_step(number, gradients_changed=gradients_changed)

    def drop(self) -> None:
        """Leaves nothing behind."""
        self._signals.drop()
        self._gradients = GradientProbe(self._layers, self._transfer)  # it may hold a copy of the weights

    # -- after it -----------------------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Gives the transfer what was seen.

        Raises:
            Exception: whatever went wrong while the run was being observed.
        """
        if not self.gradients_only:
            self._signals.finish()
        self._gradients.finish()
        if self._measures_gradients and not self.gradients_only:
            self._spectra.measure(self._signals.turns)
        self._loss.share(self._transfer)
        self._axis.share(self._transfer)
        self._softmaxes.share(self._transfer, self._signals.last_layer)

    def found(self, host: Host, multiplier: float, scale: float, *, sees_clipping: bool) -> Found:
        """What it means, out of what came to the host; the history takes new names.

        Args:
            host: what was fetched.
            multiplier: turns the gradients as they were into those of the mean loss.
            scale: the factor of the gradient scaler; NaN without one.
            sees_clipping: whether the gradients were read before they were clipped.
        """
        history, is_whole = self._history, not self.gradients_only
        gradients = self._gradients.collect(host)
        layers, of_layers = gradients.layers(scaled=not math.isnan(scale))
        signals = self._signals.collect(host, multiplier) if is_whole else Signals()
        history.layer_axis.merge([*history.layers, *layers])  # what is in no module's care has a name too
        if is_whole:
            self._take_names(signals)
        values = full_columns([point.name for point in signals.order], signals.columns, history.point_axis)
        values |= by_identity(layers, of_layers, history.layer_axis)
        if signals.input_rms.size:
            history.add_features(len(signals.input_rms))
            values |= {"input_rms": signals.input_rms, "input_deviation": signals.input_deviation}
        mixed, scalars = told_of_axes(host)
        of_weights_and_scores = [self._spectra.collect(host), self._softmaxes.collect(host)] if is_whole else []
        for by_layer in (*of_weights_and_scores, mixed):
            values |= columns(by_layer, history.layer_axis)
        clip_factor = gradients.clip_factor(multiplier) if sees_clipping else math.nan
        scalars = told_of_loss(host) | scalars
        scalars |= totals(of_layers, clip_factor, history.scalar("clip_factor"), scale)
        for name, layer in (("input_layer", signals.input_layer), ("dropped_at", signals.dropped_at)):
            if layer is not None:
                scalars[name] = float(history.layer_axis.identity(layer))
        scalars["delta_floor"] = signals.floor
        calls = {name: evenly(calls) for name, calls in signals.calls.items()}
        return Found(values, scalars, gradients.histograms(history.layers), calls)

    def _take_names(self, signals: Signals) -> None:
        self._history.add_points(signals.order)
        executed = [point.module for point in self._history.points if point.is_layer]
        present = self._layers.in_order(executed)
        gone = [name for name in self._history.layers if not self._layers.is_layer(name)]
        self._history.layer_axis.reorder([*present, *gone])

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same columns, silent units and vectors."""
        return {"signals": self._signals.state_dict(), "spectra": self._spectra.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._signals.load_state_dict(state["signals"])
        self._spectra.load_state_dict(state.get("spectra", {}))
