"""Trainings that fail: each ends where it began, or worse, while its twin learns in the same steps.

``kinds`` and ``causes`` of a case are what may be said of its fault; what follows from the fault is not among them.
"""

from __future__ import annotations

from . import sick_conv, sick_depth, sick_late, sick_loss, sick_rate, sick_scale, sick_time
from .case import Case

_CASES = [
    *sick_depth.CASES,
    *sick_conv.CASES,
    *sick_time.CASES,
    *sick_scale.CASES,
    *sick_rate.CASES,
    *sick_late.CASES,
    *sick_loss.CASES,
]

SICK: dict[str, Case] = {case.name: case for case in _CASES}
"""Every sick case by its name."""

LEFT_OUT: dict[str, str] = {
    "gpt_adam_lr_0.3": "the twin is not twice as good: 4.86 -> 3.39, twin 4.51 -> 2.59",
    "gru_40_adam": "finds its memory in 250 steps: 2.30 -> 1.65, twin 2.30 -> 1.07",
    "one_layer_times_1e-5": "heals under SGD: 2.32 -> 0.269, twin 2.88 -> 0.291",
    "post_ln_12_against_pre_ln": "learns as well under Adam at 1e-3: 2.6 -> 0.759, twin 2.5 -> 0.877",
    "relu_pixels_0_to_256_adam": "learns: 120 -> 0.659, twin 2.4 -> 0.0884",
    "rnn_tanh_48_sgd": "the twin learns no more: 2.31 -> 2.31, twin 2.32 -> 2.43",
    "shuffled_progression": "the twin is not twice as good: 1.25 -> 0.935, twin 1.07 -> 0.477",
    "sigmoid_section_10": "BatchNorm brings the signal back: 2.3 -> 1.33, twin 2.31 -> 0.501",
    "tanh_breast_cancer_raw_adam": "learns: 0.672 -> 0.262, twin 0.701 -> 0.0616",
    "tanh_pixels_0_to_256_adam": "learns: 2.3 -> 0.288, twin 2.3 -> 0.167",
    "transformer_adam_lr_0.1": "the twin is not twice as good: 3.07 -> 1.68, twin 2.44 -> 0.886",
}
"""Trainings whose label did not hold, with the loss at start and end for seed 0."""
