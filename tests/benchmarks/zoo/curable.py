"""Which sick trainings a callback may be asked to cure in the run, settled by what the fault is and not by results.

A fault can be cured in the run where it lies in numbers that the run holds: weights, statistics of the inputs, steps
that are too large. It can't where it lies in what only the user may decide or knows: the data's labels, the formula of
the loss, the graph, the number format, how large the steps are meant to be.
"""

from __future__ import annotations

from .sick import SICK

_TOO_SMALL = "steps are as small as the user asked for; a callback that raises them takes a plan for a fault"
_FORMAT = "the number format is the user's choice, and gradients that it made zero can't be brought back"
_NO_SIGNAL = "labels without relation to the inputs hold nothing to learn"
_FORMULA = "the formula divides by zero or takes the logarithm of it, whatever the weights are"
_LOSS = "the loss is computed from the wrong thing, and only the user knows what was meant"
_GRAPH = "the graph is cut in the code: no gradient reaches the trunk"

NOT_CURABLE: dict[str, str] = {
    "sgd_lr_1e-6": _TOO_SMALL,
    "adam_lr_1e-7": _TOO_SMALL,
    "resnet_adam_lr_1e-7": _TOO_SMALL,
    "sgd_lr_1e-5_regression": _TOO_SMALL,
    "schedule_decays_at_once": _TOO_SMALL,
    "clipped_norm_1e-6": _TOO_SMALL,
    "clipped_value_1e-9": _TOO_SMALL,
    "fp16_true_loss_1e-6": _FORMAT,
    "fp16_autocast_no_scaler": _FORMAT,
    "fp16_autocast_adam": _FORMAT,
    "shuffled_labels": _NO_SIGNAL,
    "shuffled_labels_batchnorm": _NO_SIGNAL,
    "shuffled_tumours": _NO_SIGNAL,
    "log_of_relu": _FORMULA,
    "log_of_softmax": _FORMULA,
    "sqrt_at_zero": _FORMULA,
    "standardised_constant_pixel": _FORMULA,
    "adam_eps_0": "the optimizer divides by zero wherever a gradient is zero, whatever the weights are",
    "detached_trunk": _GRAPH,
    "trunk_under_no_grad": _GRAPH,
    "trunk_rounded": _GRAPH,
    "detached_conv_trunk": _GRAPH,
    "softmax_twice_sgd": _LOSS,
    "targets_broadcast": _LOSS,
}
"""Sick trainings that no callback can cure, with the reason."""

_FAMILIES = {
    "deep_sigmoid": "initialisation: bounded activations lose the signal",
    "sigmoid_section": "initialisation: bounded activations lose the signal",
    "deep_tanh": "initialisation: weights too small for the depth",
    "deep_relu": "initialisation: weights too small for the depth",
    "vgg": "initialisation: weights too small for the depth, or bounded activations",
    "unet": "initialisation: weights too small for the depth, or bounded activations",
    "recurrent_vanishing": "initialisation: the recurrence forgets",
    "recurrent_exploding": "initialisation: the recurrence blows up",
    "exploding_init": "initialisation: weights too large",
    "one_bad_layer": "initialisation: one layer of the wrong size",
    "saturated_weights": "initialisation: weights or biases that saturate",
    "dead_biases": "initialisation: biases that kill",
    "unscaled_inputs": "inputs in other units than the weights are drawn for",
    "unscaled_targets": "targets in another unit than outputs start with",
    "unscaled_column": "inputs in other units than the weights are drawn for",
    "learning_rate_large": "steps too large",
    "learning_rate_large_norm": "steps too large",
    "post_ln": "steps too large",
    "late_onset": "steps, weights or inputs that go wrong in the middle of the run",
    "late_onset_sgd": "steps or weights that go wrong in the middle of the run",
    "not_a_number": "a missing value in the data, which can be left out, or in the weights, which can be drawn",
}

CURABLE: dict[str, str] = {
    name: _FAMILIES[case.family] for name, case in SICK.items() if name not in NOT_CURABLE and case.family in _FAMILIES
}
"""Sick trainings that a callback may be asked to cure, with what the fault is."""
