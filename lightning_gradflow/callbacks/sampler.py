"""One sampled optimizer step, from the first forward pass to the finished row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.history import Floats, History, Row
from lightning_gradflow.metrics import METRICS
from lightning_gradflow.probes.gradients import GradientProbe
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer

_MAX_LOSSES = 1024  # references held between two samples; half a megabyte at most on a GPU


def is_due(step: int, interval: int) -> bool:
    """Whether a step is sampled: 0, 1, 2, 4, 8, ... up to the interval, then every `interval` steps.

    Example:
        >>> [step for step in range(40) if is_due(step, 12)]
        [0, 1, 2, 4, 8, 12, 24, 36]
    """
    if step < interval:
        return step & (step - 1) == 0
    return step % interval == 0


class Sampler:
    """Turns what the probes measure in one step into a row. Between samples it keeps references to losses, no more.

    Args:
        model: whose layers are measured.
        history: takes the names of layers and points.
        gradients: whether parameter gradients are read.
        activations: whether saturation and dead units are measured.
        window: samples in a row in which a unit must be silent to count as dead.
    """

    def __init__(
        self, model: nn.Module, history: History, *, gradients: bool = True, activations: bool = True, window: int = 4
    ) -> None:
        self._model = model
        self._history = history
        self._measures_gradients = gradients
        self._measures_activations = activations
        self._window = window
        self._transfer = Transfer()
        self._look_at_model()
        self._losses: deque[tuple[int, Tensor, int]] = deque(maxlen=_MAX_LOSSES)
        self._read: set[int] = set()
        self._backward_came = False
        self.step: int | None = None
        self.batches = 0

    def _look_at_model(self) -> None:
        self._layers = LayerMap(self._model)
        self._history.layer_axis.merge(self._layers.names)
        self._signals = SignalProbe(self._layers, self._transfer, self._measures_activations, self._window)
        self._gradients = GradientProbe(self._layers, self._transfer)

    @property
    def is_open(self) -> bool:
        """Whether a step is being sampled."""
        return self.step is not None

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of an optimizer were read in this sample."""
        return bool(self._read)

    @property
    def had_backward(self) -> bool:
        """Whether a backward pass came since the sample was opened."""
        return self._backward_came

    def start_batch(self, step: int) -> None:
        """The sampled step starts, or goes on with another batch."""
        if self.step is None:
            self.step, self.batches = step, 0
            self._read, self._backward_came = set(), False
            if not self._layers.covers(self._model.parameters()):  # layers were added or replaced in the run
                self._look_at_model()
            self._gradients = GradientProbe(self._layers, self._transfer)
        self.batches += 1
        self._signals.start_batch()

    def before_backward(self) -> None:
        """A forward pass is over."""
        self._signals.before_backward()

    def after_backward(self, more_to_come: bool) -> None:
        """A backward pass is over; in manual optimization another forward pass of the same batch may follow."""
        self._backward_came = True
        if more_to_come:
            self._signals.next_forward()

    def read_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Reads the gradients an optimizer is about to use: once a step, and only if a backward pass made them."""
        if id(optimizer) in self._read or not self._backward_came:
            return
        self._read.add(id(optimizer))
        if self._measures_gradients:
            self._gradients.measure(p for group in optimizer.param_groups for p in group["params"])

    def take_loss(self, step: int, loss: Tensor, factor: int = 1) -> None:
        """Keeps a reference to the loss of a batch, to be multiplied by `factor` later; nothing is computed."""
        self._losses.append((step, loss, factor))

    def end_batch(self) -> None:
        """A batch is over and the step is not: validation may come before the next."""
        self._signals.before_backward()

    def drop(self) -> None:
        """Gives the present sample up, and leaves nothing behind."""
        self._signals.drop()
        self.step = None

    def finish(self, scalars: Mapping[str, float]) -> Row:
        """The row of the present sample; `scalars` are taken into it. One copy from the device."""
        step = self.step if self.step is not None else 0
        self.step = None
        self._signals.finish()
        host = self._fetch_with_losses()
        points = self._signals.collect(host)
        layers = self._gradients.collect(host)
        self._history.add_points(list(points))
        executed = [point.module for point in self._history.points if point.is_layer]
        present = self._layers.in_order(executed)
        gone = [name for name in self._history.layers if not self._layers.is_layer(name)]
        self._history.layer_axis.reorder([*present, *gone])
        values = self._columns({point.name: found for point, found in points.items()}, "points")
        values |= self._columns(layers, "layers")
        norms = [found["grad_norm"] for found in layers.values()]
        totals = {"grad_norm_total": float(np.sqrt(np.square(norms).sum()))} if norms else {}
        losses = self._losses_by_step(host)
        return Row(
            step=step,
            values=values,
            scalars={**_without_nan(scalars), **totals, **_mean_loss(losses)},
            histograms=self._gradients.histograms(host, self._history.layers),
            losses=losses,
        )

    def rest(self) -> Floats:
        """(n,) the losses of the steps since the last sample."""
        return self._losses_by_step(self._fetch_with_losses())

    def _fetch_with_losses(self) -> dict[str, Floats]:
        if self._losses:
            self._transfer.put(
                "losses", torch.stack([loss.detach().float().reshape(()) for _, loss, _ in self._losses])
            )
        return self._transfer.fetch()

    def _losses_by_step(self, host: Mapping[str, Floats]) -> Floats:
        """(S,) mean loss of each step since the last row."""
        steps = np.array([step for step, _, _ in self._losses], dtype=np.int64)
        values = host.get("losses", np.empty(0)) * np.array([factor for _, _, factor in self._losses], dtype=np.float64)
        self._losses.clear()
        return np.array([values[steps == step].mean() for step in np.unique(steps)], dtype=np.float64)

    def _columns(self, found: Mapping[str, Mapping[str, float]], axis: str) -> dict[str, Floats]:
        """Turns name -> metric -> value into one array a metric, by the identity of the names."""
        names = self._history.layer_axis if axis == "layers" else self._history.point_axis
        columns: dict[str, Floats] = {}
        for name, values in found.items():
            for metric, value in values.items():
                column = columns.setdefault(metric, np.full(len(names), np.nan))
                column[names.identity(name)] = value
        return {metric: columns[metric] for metric in METRICS if metric in columns}


def _without_nan(scalars: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if not math.isnan(value)}


def _mean_loss(losses: Iterable[float]) -> dict[str, float]:
    """Non-finite losses were measured: their mean is infinite, not missing."""
    values = np.array(list(losses))
    if not values.size:
        return {}
    return {"loss": float(values.mean()) if np.isfinite(values).all() else math.inf}
