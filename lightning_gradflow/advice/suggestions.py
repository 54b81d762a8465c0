"""Which cures are proposed for which finding, best first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_gradflow.advice.axis_cures import put_batch_first, put_time_first
from lightning_gradflow.advice.format_cures import freeze_left_out, hold, keep_float32, master_weights
from lightning_gradflow.advice.layer_cures import (
    initialise,
    initialise_large,
    initialise_named,
    leak,
    normalise,
    scale_inputs,
    swap_activations,
)
from lightning_gradflow.advice.loss_cures import (
    outputs_without_bounds,
    same_shape,
    scale_targets,
    scores_for_classes,
    scores_for_yes_or_no,
    scores_without_bounds,
    stable_loss,
)
from lightning_gradflow.advice.path_cures import gates, pre_norm, residuals
from lightning_gradflow.advice.rate_cures import (
    clip,
    find_rate,
    loosen_clipping,
    lower_decay,
    lower_rate,
    lower_rate_where_clipped,
    raise_rate,
    warm_up,
)
from lightning_gradflow.advice.recurrent_cures import (
    gate_recurrence,
    initialise_recurrence,
    normalise_recurrence,
    read_all_steps,
)
from lightning_gradflow.advice.run_cures import (
    detect_anomaly,
    draw_zeros,
    fill_missing,
    gains_of_one,
    larger_eps,
    overfit_batch,
    reconnect,
    scale_gradients,
    scale_loss,
    use_or_freeze,
    watch_layer,
    watch_weights,
    wider_format,
)
from lightning_gradflow.advice.score_cures import divide_scores, initialise_scores
from lightning_gradflow.advice.site import BY_HAND, Site, survey
from lightning_gradflow.advice.table_cures import shorten_rows
from lightning_gradflow.findings import Finding, FindingKind, Suggestion
from lightning_gradflow.history import History

Cure = Callable[[Site], list[Suggestion]]

CURES: dict[tuple[FindingKind, str], tuple[Cure, ...]] = {
    (FindingKind.VANISHING_GRADIENT, "saturation"): (residuals, swap_activations, gates, normalise, initialise),
    (FindingKind.VANISHING_GRADIENT, "weight_scale"): (gains_of_one, initialise, pre_norm, residuals, normalise),
    (FindingKind.VANISHING_GRADIENT, "depth"): (initialise, pre_norm, residuals, normalise, gates, swap_activations),
    (FindingKind.VANISHING_GRADIENT, "recurrence"): (
        initialise_recurrence,
        gate_recurrence,
        normalise_recurrence,
        read_all_steps,
    ),
    (FindingKind.VANISHING_GRADIENT, "underflow"): (scale_gradients, wider_format, scale_loss),
    (FindingKind.VANISHING_GRADIENT, "dead_units"): (initialise, leak, normalise, lower_rate),
    (FindingKind.VANISHING_GRADIENT, "learning_rate_too_large"): (lower_rate, warm_up, pre_norm),
    (FindingKind.VANISHING_GRADIENT, "unknown"): (initialise, pre_norm, residuals, normalise, swap_activations),
    (FindingKind.EXPLODING_GRADIENT, "weight_scale"): (initialise, pre_norm, normalise, lower_rate_where_clipped, clip),
    (FindingKind.EXPLODING_GRADIENT, "depth"): (initialise, pre_norm, normalise, lower_rate_where_clipped, clip),
    (FindingKind.EXPLODING_GRADIENT, "recurrence"): (
        lower_rate_where_clipped,
        clip,
        initialise_recurrence,
        gate_recurrence,
        normalise_recurrence,
        read_all_steps,
    ),
    (FindingKind.EXPLODING_GRADIENT, "learning_rate_too_large"): (lower_rate, clip, warm_up, pre_norm),
    (FindingKind.EXPLODING_GRADIENT, "unscaled_inputs"): (scale_inputs, clip, lower_rate),
    (FindingKind.EXPLODING_GRADIENT, "unknown"): (lower_rate_where_clipped, clip, lower_rate, pre_norm, normalise),
    (FindingKind.NONFINITE_GRADIENT, "forward"): (watch_layer, lower_rate, normalise, wider_format),
    (FindingKind.NONFINITE_GRADIENT, "initialisation"): (fill_missing,),
    (FindingKind.NONFINITE_GRADIENT, "loss"): (stable_loss, detect_anomaly, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "backward"): (detect_anomaly, watch_layer, wider_format),
    (FindingKind.NONFINITE_GRADIENT, "optimizer_step"): (larger_eps, wider_format, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large"): (lower_rate, clip, warm_up, pre_norm),
    (FindingKind.NONFINITE_GRADIENT, "unscaled_inputs"): (scale_inputs, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "unknown"): (detect_anomaly, watch_layer),
    (FindingKind.DEAD_UNITS, "initialisation"): (initialise_named, leak, normalise),
    (FindingKind.DEAD_UNITS, "symmetry"): (initialise,),
    (FindingKind.DEAD_UNITS, "learning_rate_too_large"): (lower_rate, leak, warm_up, clip),
    (FindingKind.DEAD_UNITS, "unscaled_inputs"): (scale_inputs, lower_rate),
    (FindingKind.DEAD_UNITS, "unknown"): (leak, initialise_named, lower_rate),
    (FindingKind.SATURATED_ACTIVATION, "unscaled_inputs"): (scale_inputs,),
    (FindingKind.SATURATED_ACTIVATION, "weight_scale"): (initialise, normalise, swap_activations),
    (FindingKind.SATURATED_ACTIVATION, "score_scale"): (divide_scores, initialise_scores),
    (FindingKind.SATURATED_ACTIVATION, "drift"): (lower_rate, normalise, swap_activations),
    (FindingKind.SATURATED_ACTIVATION, "unknown"): (normalise, initialise, swap_activations),
    (FindingKind.LOSS_PLATEAU, "unscaled_inputs"): (scale_inputs,),
    (FindingKind.LOSS_PLATEAU, "vanishing_gradient"): (initialise, pre_norm, residuals, normalise, swap_activations),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_small"): (loosen_clipping, raise_rate, find_rate),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_large"): (lower_rate, warm_up, pre_norm, find_rate),
    (FindingKind.LOSS_PLATEAU, "weight_scale"): (shorten_rows, initialise_large),
    (FindingKind.LOSS_PLATEAU, "symmetry"): (initialise,),
    (FindingKind.LOSS_PLATEAU, "recurrence"): (initialise_recurrence, gate_recurrence, normalise_recurrence),
    (FindingKind.LOSS_PLATEAU, "saturation"): (initialise, normalise, swap_activations, scale_inputs),
    (FindingKind.LOSS_PLATEAU, "dead_units"): (initialise, leak, lower_rate),
    (FindingKind.LOSS_PLATEAU, "no_signal_in_data"): (overfit_batch,),
    (FindingKind.LOSS_PLATEAU, "unknown"): (overfit_batch, find_rate),
    (FindingKind.LOSS_MISMATCH, "unscaled_targets"): (scale_targets,),
    (FindingKind.LOSS_MISMATCH, "unreachable_targets"): (outputs_without_bounds,),
    (FindingKind.LOSS_MISMATCH, "softmax_twice"): (scores_for_classes,),
    (FindingKind.LOSS_MISMATCH, "bounded_scores"): (scores_without_bounds,),
    (FindingKind.LOSS_MISMATCH, "sigmoid_twice"): (scores_for_yes_or_no,),
    (FindingKind.LOSS_MISMATCH, "no_log_softmax"): (scores_for_classes,),
    (FindingKind.LOSS_MISMATCH, "broadcast"): (same_shape,),
    (FindingKind.LOSS_MISMATCH, "unknown"): (stable_loss,),
    (FindingKind.MIXED_SAMPLES, "batch_first"): (put_batch_first, put_time_first),
    (FindingKind.MIXED_SAMPLES, "unknown"): (put_batch_first, put_time_first),
    (FindingKind.NO_GRADIENT, "initialisation"): (draw_zeros,),
    (FindingKind.NO_GRADIENT, "detached"): (reconnect,),
    (FindingKind.NO_GRADIENT, "unused"): (use_or_freeze,),
    (FindingKind.NO_GRADIENT, "not_optimized"): (hold, freeze_left_out),
    (FindingKind.NO_GRADIENT, "unknown"): (use_or_freeze,),
    (FindingKind.UPDATE_RATIO, "weight_scale"): (initialise,),
    (FindingKind.UPDATE_RATIO, "weight_decay"): (lower_decay,),
    (FindingKind.UPDATE_RATIO, "overwritten"): (watch_weights,),
    (FindingKind.UPDATE_RATIO, "rounding"): (keep_float32, master_weights, raise_rate),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_small"): (loosen_clipping, raise_rate, find_rate),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_large"): (lower_rate, warm_up, pre_norm),
    (FindingKind.UPDATE_RATIO, "unscaled_inputs"): (scale_inputs, lower_rate),
    (FindingKind.UPDATE_RATIO, "unknown"): (find_rate,),
}
"""Every kind has a row for the cause `unknown`, which serves the causes that have no row."""


IN_THE_RUN: dict[Cure, frozenset[str]] = {
    initialise: frozenset(),
    initialise_large: frozenset(),
    initialise_named: frozenset(),
    shorten_rows: frozenset(),
    fill_missing: frozenset(),
    draw_zeros: frozenset(),
    gains_of_one: frozenset(),
    initialise_recurrence: frozenset(),
    scale_inputs: frozenset({"unscaled_inputs"}),
    scale_targets: frozenset(),
    clip: frozenset(),
    lower_rate: frozenset({"learning_rate_too_large"}),
}
"""Cures that `GradFlow(mitigate="apply")` can bring about by itself, and for which causes; none named: for all."""

_HINT = 'GradFlow(mitigate="apply") tries this in the run itself.'


def suggest(finding: Finding, history: History, in_the_run: bool = False) -> tuple[Suggestion, ...]:
    """What to change, best first, in code that names the user's own layers.

    Args:
        finding: what was found.
        history: tells which layers and activations the model has, and the learning rate.
        in_the_run: whether remedies are tried anyway; else suggestions say where they can be.

    Returns:
        The suggestions; those that do not apply to the model are left out, and those of which a part is to be
        written by hand come last. The code is Python to paste.

    Example:
        >>> from lightning_gradflow.findings import Severity
        >>> finding = Finding(FindingKind.NO_GRADIENT, Severity.INFO, step=8, layers=("head.1",), cause="unused")
        >>> print(suggest(finding, History())[0].code)
        # at the end of __init__
        def follow_advice(model):
            for name in ("head.1",):
                model.get_submodule(name).requires_grad_(False)
        <BLANKLINE>
        follow_advice(self)
    """
    cures = CURES.get((finding.kind, finding.cause), CURES[finding.kind, "unknown"])
    site = survey(finding, history)
    found = [
        suggestion if in_the_run else _with_hint(cure, suggestion, finding)
        for cure in cures
        for suggestion in cure(site)
    ]
    return tuple(sorted(found, key=lambda suggestion: _is_left_to_do(suggestion.code)))


def _is_left_to_do(code: str) -> bool:
    """Whether what is to be pasted does not do all: activations that are calls can be told of only."""
    return code.startswith(BY_HAND)


def _with_hint(cure: Cure, suggestion: Suggestion, finding: Finding) -> Suggestion:
    """Says where the same can be had in the run itself; remedies are for alarms only."""
    causes = IN_THE_RUN.get(cure, frozenset())
    if not finding.severity.is_alarm or (causes and finding.cause not in causes) or cure not in IN_THE_RUN:
        return suggestion
    return replace(suggestion, reason=f"{suggestion.reason} {_HINT}")
