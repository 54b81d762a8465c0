"""The scale of the inputs, folded into the layers that take them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.history import Floats, History
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.input_layers import ScaledLayer, around_mean, can_shift, can_treat, pads_with_zeros
from lightning_gradflow.remedies.input_statistics import (
    Moments,
    RawInput,
    features_of,
    moments,
    output_rms,
    standardising,
)
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.training import Rehearsal, Training

_MAX_RMS = 10.0  # initialisations are made for 1; up to about 10 the first steps of a training make up for it
_MAX_OUTPUT = 2.0  # pre-activations up to here: the weights were made for such inputs
_MIN_CONTRAST = 2e-4  # `UnscaledInputs` asks for half of it; batches differ
_SAME_UNIT = 2.0  # features whose sizes changed alike, up to the chance of a batch


@dataclass(frozen=True)
class Folded:
    """What was done.

    Args:
        layers: in order of registration.
        before: `input_rms` of the largest feature and `preactivation_rms`, each the largest of these layers.
        after: `preactivation_rms` on the same batch.
    """

    layers: tuple[str, ...]
    before: dict[str, float]
    after: dict[str, float]


class InputScaling:
    """Lets layers that take unscaled inputs train as if these were standardised, and leaves the inputs alone.

    To fold mean and deviation into the weight once, `W = V / s` and `b = c - W m`, repairs what a layer computes and
    not how it trains: the step of SGD on W is s^2 times too large, that of Adam s times. So each optimizer step is
    made in the coordinates V, c of standardised inputs `(x - m) / s`:

        V = W s,    c = b + W m,    dV = (dW - db m^T) / s,    dc = db

    and taken back after it. Clipping, momentum, second moments and weight decay all act on V and c. Up to rounding,
    the run is the one on standardised inputs. Between steps the weights are those for the raw inputs, so that
    validation, checkpoints and inference need nothing else. The optimizer's state belongs to V and c.

    What it can treat: Linear, convolutions (per channel; groups too), RNN, LSTM, GRU and their cells, as whole
    tensors or as rows over ranks (FSDP2). Without a bias in the same optimizer there is a scale and no shift.
    What it cannot: other cuts (tensor parallelism, FSDP1, ZeRO), tied, frozen or parametrized weights, classes with a
    forward of their own.

    `before_step` stands in front of everything that clips: norms count in the new coordinates. Weights are in them
    from there until the optimizer's step is over; a forward pass in between (a skipped step, LBFGS) takes them back
    first.

    References:
        LeCun et al. 1998, Efficient BackProp, section 4.3.

    Example:
        >>> from lightning_gradflow.remedies.input_scaling import InputScaling
        >>> scaling, layer = InputScaling(), nn.Linear(1, 1, bias=False)
        >>> scaling.load_state_dict({"layers": {"0": {"scale": torch.tensor([4.0]), "shift": torch.tensor([0.0])}}})
        >>> scaling.attach(nn.Sequential(layer))
        >>> _ = layer.weight.data.fill_(1.0)
        >>> layer.weight.grad = torch.full((1, 1), 8.0)
        >>> optimizer = torch.optim.SGD([layer.weight], lr=1.0)
        >>> scaling.before_step(optimizer)
        >>> layer.weight.item(), layer.weight.grad.item()
        (4.0, 2.0)
        >>> _ = optimizer.step()
        >>> layer.weight.item()
        0.5
    """

    def __init__(self) -> None:
        self._scales: dict[str, tuple[Tensor, Tensor]] = {}  # (F,) scale and shift, on the CPU
        self._along: dict[str, Tensor] = {}  # (F,), of some of them, the direction that is made smaller
        self._layers: dict[str, ScaledLayer] = {}
        self._hooked: list[tuple[torch.optim.Optimizer, RemovableHandle]] = []

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that are treated."""
        return tuple(self._scales)

    def start(
        self,
        training: Training,
        layers: Sequence[str] | None = None,
        keep_function: bool = False,
        before_fold: Callable[[Rehearsal, Collection[str]], bool] | None = None,
        *,
        are_new: bool = False,
    ) -> Folded | None:
        """Folds the scale of the inputs into the layers that take them, and holds it from then on.

        Treated are the layers that get raw input, alone or in columns beside embeddings, with a root mean square above
        10, and hand it on with one above 2; and those whose inputs differ too little from each other (see
        `UnscaledInputs`). With `keep_function=False` their weights are taken as made for standardised inputs: what
        follows is the network as it was initialised, on such inputs. So it is for weights that have learnt nothing, and
        the optimizer's state of them is removed; where one looks trained, nothing is done. With `keep_function=True`
        the inputs have lately changed their size: each feature is brought back to that from before, and what was
        learnt, state included, stays in force.

        Args:
            training: the run, between two optimizer steps.
            layers: the only ones to treat; None for all that qualify.
            keep_function: whether the weights are right for the inputs from before a jump.
            before_fold: called, where anything is treated, with a rehearsal in which its layers get standardised
                inputs, and with their names. What it does to the weights of the model counts as made for these. Says
                whether to go on; where not, it has changed nothing.
            are_new: whether `before_fold` draws the layers anew: then it is no matter what they make of large inputs.

        Returns:
            What was done, or None where there was nothing to do, nothing was treatable, or no forward pass can be run.
        """
        chosen = [name for name, module in training.model.named_modules() if layers is None or name in layers]
        chosen = [name for name in chosen if can_treat(training, name) and (keep_function or name not in self._scales)]
        if not keep_function and any(_is_trained(training.model, name) for name in chosen):
            return None
        past = _before_jump(training.history) if keep_function else None
        if training.rehearse is None or not chosen or (keep_function and past is None):
            return None
        modules = dict(training.model.named_modules())
        with training.rehearse() as (copy, run):
            inputs = {name: RawInput(copy.get_submodule(name)) for name in chosen}
            with ExitStack() as stack:
                for raw in inputs.values():
                    raw.watch(stack)
                run()
            found = {name: it for name, it in moments(inputs, training.averaged).items() if _is_unscaled(it, are_new)}
            maps = {name: _map(training, modules[name], it, past) for name, it in found.items()}
            treated = {name: it for name, it in maps.items() if it is not None}
        if treated and before_fold is not None and not before_fold(_standardised(training.rehearse, treated), treated):
            return None
        after = _rms_of_standardised(training, treated)
        if not treated:
            return None
        for name, (scale, shift) in treated.items():
            self._fold(training, name, scale.cpu(), shift.cpu(), keep_function)
        self.attach(training.model)
        before = {
            "input_rms": max(float(found[name].rms.nan_to_num().max()) for name in treated),
            "preactivation_rms": max(found[name].output_rms for name in treated),
        }
        return Folded(tuple(treated), before, {"preactivation_rms": after})

    def hold(self, training: Training, centres: Mapping[str, Centre]) -> tuple[str, ...]:
        """Lets layers train from now on in coordinates in which their inputs lie around 0.

        What they compute stays as it is; see `input_layers.around_mean`.

        Args:
            training: the run, between two optimizer steps. What its optimizers know of these layers is forgotten: it
                belongs to the old coordinates.
            centres: layer -> where its inputs lie.

        Returns:
            The layers that are treated from now on; those that can't be, or are already, are left out.
        """
        modules = dict(training.model.named_modules())
        chosen = [name for name in centres if name not in self._scales and can_treat(training, name)]
        found = {name: around_mean(training, modules[name], centres[name]) for name in chosen}
        treated = {name: it for name, it in found.items() if it is not None}
        for name, (scale, shift, along) in treated.items():
            self._scales[name] = scale.cpu(), shift.cpu()
            if along is not None:
                self._along[name] = along.cpu()
            layer = ScaledLayer(modules[name], scale, shift)
            forget(training.optimizers, [p for pair in layer.parameters() for p in pair if p is not None])
        self.attach(training.model)
        return tuple(treated)

    def _fold(self, training: Training, name: str, scale: Tensor, shift: Tensor, keep_function: bool) -> None:
        """Gives the layer the weights that do to raw inputs what the present ones do to `(x - shift) / scale`."""
        layer = ScaledLayer(training.model.get_submodule(name), scale, shift)
        layer.leave()
        for weight, bias in layer.parameters():
            weight.grad = None
            if bias is not None:
                bias.grad = None
            if not keep_function:
                forget(training.optimizers, [weight] if bias is None else [weight, bias])
        if name in self._scales:  # ((x - shift) / scale - m) / s = (x - shift - m scale) / (s scale)
            s, m = self._scales[name]
            scale, shift = s * scale, shift + m * scale
        self._scales[name] = scale, shift

    def attach(self, model: nn.Module) -> None:
        """Finds its layers in a model: once after `load_state_dict`, when the model has its final modules.

        Args:
            model: the one that they were named in.
        """
        self.batch_end()
        self._layers = {
            name: ScaledLayer(model.get_submodule(name), *it, self._along.get(name))
            for name, it in self._scales.items()
        }

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings weights and gradients of this optimizer to the coordinates of standardised inputs.

        To be called with complete gradients, before they are clipped. Nothing is copied to the host.

        Args:
            optimizer: the one that is about to step.
        """
        if not self._layers:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if all(optimizer is not known for known, _ in self._hooked):
            self._hooked.append((optimizer, optimizer.register_step_post_hook(self._after_step)))
        for layer in self._layers.values():
            if all(id(weight) in held and weight.grad is not None for weight, _ in layer.parameters()):
                layer.enter(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for layer in self._layers.values():
            if layer.optimizer is optimizer:
                layer.leave()

    def batch_end(self) -> None:
        """Takes back what a skipped step left behind."""
        for layer in self._layers.values():
            if layer.optimizer is not None:
                layer.leave()

    def release(self) -> None:
        """Takes all hooks off and leaves weights for raw inputs. The scales stay: the next `before_step` goes on."""
        self.batch_end()
        for _, handle in self._hooked:
            handle.remove()
        self._hooked = []

    def state_dict(self) -> dict[str, Any]:
        """The scales, by layer."""
        layers = {name: {"scale": scale, "shift": shift} for name, (scale, shift) in self._scales.items()}
        for name, along in self._along.items():
            layers[name]["along"] = along
        return {"layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, once `attach` has been called."""
        self.batch_end()
        self._layers = {}
        self._scales = {name: (it["scale"], it["shift"]) for name, it in state["layers"].items()}
        self._along = {name: it["along"] for name, it in state["layers"].items() if "along" in it}


def _standardised(rehearse: Rehearsal, maps: Mapping[str, tuple[Tensor, Tensor]]) -> Rehearsal:
    """The same rehearsal, in which these layers get `(x - shift) / scale`."""

    @contextmanager
    def rehearse_scaled() -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        with rehearse() as (copy, run), ExitStack() as stack:
            for name, (scale, shift) in maps.items():
                RawInput(copy.get_submodule(name)).watch(stack, scale, shift)
            yield copy, run

    return rehearse_scaled


def _rms_of_standardised(training: Training, maps: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Of the pre-activations of these layers; a collective."""
    assert training.rehearse is not None
    with training.rehearse() as (copy, run), ExitStack() as stack:
        inputs = {name: RawInput(copy.get_submodule(name)) for name in maps}
        for name, raw in inputs.items():
            raw.watch(stack, *maps[name])
        if inputs:
            run()
        return output_rms(inputs, training.averaged)


def _is_trained(model: nn.Module, name: str) -> bool:
    """Whether a layer has learnt something: such weights are not made for standardised inputs."""
    weights = [p for p in model.get_submodule(name).parameters(recurse=False) if p.dim() > 1]
    return any(not is_sharded(p) and not looks_fresh(p) for p in weights)


def _is_unscaled(found: Moments, are_new: bool) -> bool:
    # nothing finite is too large as well
    is_large = found.size > _MAX_RMS and (are_new or not found.output_rms <= _MAX_OUTPUT)
    return is_large or 0 < found.contrast < _MIN_CONTRAST


def _map(training: Training, module: nn.Module, found: Moments, past: Floats | None) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of the inputs of a layer."""
    if past is None:
        shiftable = can_shift(training, module)
        return standardising(found, shiftable=shiftable, padded=pads_with_zeros(module))
    features = features_of(module)
    if len(past) > features:
        return None
    before = torch.from_numpy(np.pad(past, (0, features - len(past)), constant_values=np.nan)).to(found.rms)
    ratio = found.rms / before
    sure = ratio.isfinite() & (ratio > 0)
    if not bool(sure.any()):
        return None
    usual = ratio[sure].median()
    sure &= (ratio > usual * _SAME_UNIT) | (ratio < usual / _SAME_UNIT)
    ratio = torch.where(sure, ratio, usual)
    return torch.where(found.mean.isfinite(), ratio, 1.0), torch.zeros_like(ratio)


def _before_jump(history: History) -> Floats | None:
    """(F,) usual rms of each feature before the rows in which all became much larger, or None where they did not."""
    if not inputs_jumped(history):
        return None
    known = np.array([row for row in history["input_rms"] if not np.isnan(row).all()])
    sizes = np.sqrt(np.nanmean(np.square(known), axis=1))
    at = int(np.argmax(sizes[1:] / np.maximum(sizes[:-1], np.finfo(np.float64).tiny))) + 1
    past: Floats = np.nanmedian(known[:at], axis=0)
    return past
