"""The table of what is measured: one row a metric, with its axis, unit and range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AxisName = Literal["layers", "points", "features"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Args:
        axis: `"layers"` (one column for each module that owns parameters), `"points"` (one column for each
            layer output and each activation, in order of execution) or `"features"` (one column for each feature, or
            channel, of what goes into the first layer).
        unit: `"norm"` (non-negative, any scale), `"fraction"` (in [0, 1]), `"index"` (whole numbers from 0) or
            `"log2"` (a logarithm of any sign; -inf where what was measured is zero).
        meaning: what it tells, in a line.
    """

    axis: AxisName
    unit: Literal["norm", "fraction", "index", "log2"]
    meaning: str


METRICS: dict[str, Metric] = {
    "grad_norm": Metric("layers", "norm", "L2 norm of the layer's parameter gradient, before clipping"),
    "grad_rms": Metric("layers", "norm", "grad_norm / sqrt(number of entries)"),
    "grad_mean_abs": Metric("layers", "norm", "mean absolute gradient entry"),
    "grad_max_abs": Metric("layers", "norm", "largest absolute gradient entry"),
    "grad_zero_fraction": Metric("layers", "fraction", "share of gradient entries that are exactly zero"),
    "grad_nonfinite_fraction": Metric("layers", "fraction", "share of gradient entries that are NaN or infinite"),
    "grad_missing_fraction": Metric(
        "layers", "fraction", "share of the entries that should have a gradient and have none (grad is None)"
    ),
    "weight_norm": Metric("layers", "norm", "L2 norm of those parameters of the layer that have a gradient"),
    "update_norm": Metric("layers", "norm", "L2 norm of what the optimizer's step changed in those parameters"),
    "update_ratio": Metric("layers", "norm", "update_norm / weight_norm"),
    "unchanged_fraction": Metric(
        "layers",
        "fraction",
        "of weights in bf16 or fp16: share of the gradient (its magnitudes) at entries that the step did not change",
    ),
    "not_optimized_fraction": Metric(
        "layers", "fraction", "share of the entries that get a gradient and that no optimizer holds, if there are such"
    ),
    "spectral_norm": Metric("layers", "norm", "largest singular value of the layer's largest weight matrix"),
    "unit_spread": Metric(
        "layers", "norm", "how far the weights of four units differ / their norm; at first, and as long as it is 0"
    ),
    "unit_grad_spread": Metric("layers", "norm", "the same of their gradients"),
    "matrix_spread": Metric(
        "layers",
        "norm",
        "the same of a module's own matrices, weights or gradient (the more of both), along the axis where it is "
        "least; at first, and as long as it is 0",
    ),
    "zero_weights": Metric(
        "layers", "index", "weights that are all zero, and so is their gradient; at first, and as long as it is so"
    ),
    "gain_rms": Metric("layers", "norm", "rms of a norm layer's gains; at first, and as long as it is below 0.1"),
    "gain_mean": Metric("layers", "norm", "magnitude of their mean"),
    "initial_size": Metric(
        "layers",
        "norm",
        "rms of the entries of a layer's largest matrix, times the root of how many each unit sums over, before the "
        "first step: 1 keeps the size of a signal",
    ),
    "initial_norm": Metric("layers", "norm", "Frobenius norm of the same matrix before the first step"),
    "embedding_rms": Metric(
        "layers", "norm", "rms of an embedding's table, or of a module's own matrices the largest; in the first sample"
    ),
    "table_cosine": Metric(
        "layers", "fraction", "cosine of the same weights and their gradient, from 0; at first, and as long as above it"
    ),
    "recurrent_radius": Metric("layers", "norm", "spectral radius of the hidden-to-hidden weights of a recurrence"),
    "recurrent_gates": Metric(
        "layers", "index", "gates of a recurrence: 0 of a plain one, 2 of a GRU, 3 of an LSTM; in the first sample"
    ),
    "loop_radius": Metric(
        "layers",
        "norm",
        "the same of a square weight, or of what maps a state among others, in a loop of eight calls or more",
    ),
    "hh_to_ih": Metric("layers", "norm", "gradient norm of a recurrence's weights of the state / of the input"),
    "stack_gain": Metric(
        "layers", "norm", "gradient norm of the biases of a stacked recurrence's first layer / of its last"
    ),
    "steps_as_samples": Metric(
        "layers", "index", "time steps that a recurrence or attention takes for samples, and these for time steps"
    ),
    "softmax_gap": Metric(
        "layers",
        "norm",
        "largest score that a softmax in or behind the layer gets, less the next one, in the median; at first, and as "
        "long as it is above 3",
    ),
    "output_gap": Metric("layers", "norm", "the same of a softmax behind the last layer"),
    "delta_norm": Metric("points", "norm", "L2 norm of the loss gradient at the output, over all calls"),
    "calls": Metric("points", "index", "calls of a point in a forward pass, up to the last one that got a gradient"),
    "delta_headroom": Metric(
        "points", "log2", "rms of the loss gradient as held / smallest positive number of its dtype"
    ),
    "backward_pass": Metric("points", "index", "which backward pass of the step delta_norm was taken from"),
    "output_rms": Metric("points", "norm", "root mean square of the output"),
    "output_spread": Metric(
        "points", "fraction", "rms of a layer's output around its batch mean / output_rms; of 16,384 entries"
    ),
    "in_graph": Metric("points", "fraction", "share of a layer's calls whose output was part of the autograd graph"),
    "input_detached": Metric(
        "points", "fraction", "share of a layer's calls whose input came from another layer, but without its graph"
    ),
    "saturated_fraction": Metric(
        "points",
        "fraction",
        "share of outputs of a bounded activation near its bound; in a recurrence that stands first, share of its "
        "gates that the input alone drives there",
    ),
    "gate_fraction": Metric("points", "fraction", "1 if a bounded activation gates another signal, 0 if it does not"),
    "dead_fraction": Metric("points", "fraction", "share of units on the flat side for every sample of the window"),
    "silent_fraction": Metric("points", "fraction", "share of units on the flat side for every input of the step"),
    "input_rms": Metric(
        "features",
        "norm",
        "root mean square of each feature of what goes into the first layer, or the one with large inputs",
    ),
    "input_deviation": Metric("features", "norm", "standard deviation of the same over the batch"),
}
"""Every metric a [`Row`][lightning_gradflow.history.Row] may hold, by name."""

HISTOGRAMS: tuple[str, ...] = ("grad_hist_early", "grad_hist_late")
"""Histograms of log2 |gradient entry| over the first and the last third of the layers, in order of execution."""

MIN_EXPONENT, MAX_EXPONENT = -64, 32
"""Histogram bins are the whole exponents in [MIN_EXPONENT, MAX_EXPONENT); what lies outside is counted in the end bins.

-64 is far below what Adam's eps (1e-8 = 2**-27) lets through and 32 far above any gradient that still trains.
"""
HISTOGRAM_BINS = MAX_EXPONENT - MIN_EXPONENT
"""Number of exponent bins; a stored histogram has two more entries: exact zeros, then non-finite entries."""


LOSS_LINE: tuple[str, ...] = (
    "line_gain_tenth",
    "line_gain_1x",
    "line_gain_own",
    "line_gain_other",
    "line_gain_far",
    "line_best_factor",
    "gradient_cosine",
    "gradient_agreement",
    "sharpness",
)
"""Scalars of the loss along the update, in a row in which a standstill was looked into."""

PAIRING: tuple[str, ...] = ("line_shuffled", "line_shuffled_z", "pairing_agreement")
"""Scalars of the same row: whether the targets follow from the inputs."""

MISMATCHES: dict[str, str] = {
    "softmax_twice": "1 if a softmax goes into a log-softmax, such as that of cross_entropy",
    "bounded_scores": "1 if a sigmoid or tanh goes into a log-softmax, such as that of cross_entropy",
    "sigmoid_twice": "1 if a sigmoid goes into binary_cross_entropy_with_logits",
    "no_log_softmax": "1 if what goes into nll_loss is no logarithm",
    "broadcast": "1 if N outputs and N targets were broadcast to (N, N) for the loss",
}
"""Scalars of a row in which the loss function got something that it is not made for; they are missing elsewhere."""

SCALARS: dict[str, str] = {
    "loss": "mean training loss of the steps since the row before, or since the start",
    "val_loss": "mean of the validation losses since the row before",
    "lr": "largest learning rate of all parameter groups",
    "grad_norm_total": "L2 norm of the gradients of all layers together, before clipping",
    "clip_factor": "total norm after clipping / before, in [0, 1]",
    "clipped_fraction": "share of the last 50 samples in which the gradients were clipped",
    "loss_scale": "factor of the gradient scaler",
    "backward_passes": "backward passes of the step that were seen",
    "step_skipped": "1 if the scaler skipped the step of an optimizer, else 0",
    "delta_floor": "log2 of the smallest positive number that the narrowest of the deltas can hold",
    "normalised_updates": "1 if the size of a step does not follow that of the gradient, as in Adam, else 0",
    "falling_updates": "1 if steps get smaller by themselves, as in Adagrad, else 0",
    "optimizers": "number of optimizers",
    "epoch": "number of the epoch, from 0",
    "steps_per_epoch": "optimizer steps of an epoch",
    "planned_steps": "optimizer steps of the whole run",
    "lr_scheduled": "1 if there is a learning rate schedule, else 0",
    "input_layer": "identity on the layer axis of the layer that the measured inputs go into",
    "dropped_at": "identity on the layer axis of the first layer whose output dropout has a part in",
    "samples_as_steps": "samples of a batch, in a row in which a layer takes them for time steps",
    "loss_line": "1 in a row in which a standstill was looked into",
    "residual_rms": "root mean square of outputs less targets, where the loss is a squared or absolute error of these",
    "compared_rms": "root mean square of those outputs",
    "targets_beyond": "share of their variance that is beyond what the activation of the outputs can give; of several "
    "losses the least",
    "target_deviation": "standard deviation of those targets, over the batch of each rank",
    "score_deviation": "deviation (rms) over the classes of the scores that a cross-entropy gets",
    "score_classes": "number of these classes, without masked ones",
    **MISMATCHES,
    **dict.fromkeys(LOSS_LINE, "of the loss along the update, in a row in which a standstill was looked into"),
    **dict.fromkeys(PAIRING, "of the same row: whether the targets follow from the inputs"),
}
"""Every scalar that a row of a run may hold, by name."""


def measured(value: float) -> float:
    """A number that was measured: NaN would say that it was not, so what is not finite becomes infinite.

    Example:
        >>> measured(0.5), measured(float("nan"))
        (0.5, inf)
    """
    return float(value) if math.isfinite(value) else math.inf
