"""Which cures are proposed for which finding, best first."""

from __future__ import annotations

from collections.abc import Callable

from lightning_gradflow.advice.layer_cures import (
    initialise,
    initialise_named,
    leak,
    normalise,
    residuals,
    scale_inputs,
    swap_activations,
)
from lightning_gradflow.advice.recurrent_cures import gate_recurrence, initialise_recurrence, read_all_steps
from lightning_gradflow.advice.run_cures import (
    clip,
    detect_anomaly,
    find_rate,
    larger_eps,
    lower_rate,
    overfit_batch,
    raise_rate,
    reconnect,
    scale_gradients,
    scale_loss,
    stable_loss,
    use_or_freeze,
    warm_up,
    watch_layer,
    wider_format,
)
from lightning_gradflow.advice.site import Site, survey
from lightning_gradflow.findings import Finding, FindingKind, Suggestion
from lightning_gradflow.history import History

Cure = Callable[[Site], list[Suggestion]]

CURES: dict[tuple[FindingKind, str], tuple[Cure, ...]] = {
    (FindingKind.VANISHING_GRADIENT, "saturation"): (initialise, swap_activations, normalise, residuals),
    (FindingKind.VANISHING_GRADIENT, "weight_scale"): (initialise, normalise, residuals),
    (FindingKind.VANISHING_GRADIENT, "depth"): (initialise, residuals, normalise, swap_activations),
    (FindingKind.VANISHING_GRADIENT, "recurrence"): (initialise_recurrence, gate_recurrence, read_all_steps),
    (FindingKind.VANISHING_GRADIENT, "underflow"): (scale_gradients, wider_format, scale_loss),
    (FindingKind.VANISHING_GRADIENT, "dead_units"): (initialise, leak, normalise, lower_rate),
    (FindingKind.VANISHING_GRADIENT, "unknown"): (initialise, normalise, residuals, swap_activations),
    (FindingKind.EXPLODING_GRADIENT, "weight_scale"): (initialise, normalise, clip),
    (FindingKind.EXPLODING_GRADIENT, "depth"): (initialise, normalise, clip),
    (FindingKind.EXPLODING_GRADIENT, "recurrence"): (clip, initialise_recurrence, gate_recurrence, read_all_steps),
    (FindingKind.EXPLODING_GRADIENT, "learning_rate_too_large"): (lower_rate, clip, warm_up),
    (FindingKind.EXPLODING_GRADIENT, "unscaled_inputs"): (scale_inputs, clip, lower_rate),
    (FindingKind.EXPLODING_GRADIENT, "unknown"): (clip, lower_rate, normalise),
    (FindingKind.NONFINITE_GRADIENT, "forward"): (watch_layer, lower_rate, normalise, wider_format),
    (FindingKind.NONFINITE_GRADIENT, "loss"): (stable_loss, detect_anomaly, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "backward"): (detect_anomaly, watch_layer, wider_format),
    (FindingKind.NONFINITE_GRADIENT, "optimizer_step"): (larger_eps, wider_format, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large"): (lower_rate, clip, warm_up),
    (FindingKind.NONFINITE_GRADIENT, "unscaled_inputs"): (scale_inputs, normalise, lower_rate),
    (FindingKind.NONFINITE_GRADIENT, "unknown"): (detect_anomaly, watch_layer),
    (FindingKind.DEAD_UNITS, "initialisation"): (initialise_named, normalise),
    (FindingKind.DEAD_UNITS, "learning_rate_too_large"): (lower_rate, leak, warm_up, clip),
    (FindingKind.DEAD_UNITS, "unscaled_inputs"): (scale_inputs, lower_rate, normalise),
    (FindingKind.DEAD_UNITS, "unknown"): (leak, initialise_named, lower_rate),
    (FindingKind.SATURATED_ACTIVATION, "unscaled_inputs"): (scale_inputs, normalise, initialise),
    (FindingKind.SATURATED_ACTIVATION, "weight_scale"): (initialise, normalise, swap_activations),
    (FindingKind.SATURATED_ACTIVATION, "drift"): (lower_rate, normalise, swap_activations),
    (FindingKind.SATURATED_ACTIVATION, "unknown"): (normalise, initialise, swap_activations),
    (FindingKind.LOSS_PLATEAU, "vanishing_gradient"): (initialise, normalise, residuals, swap_activations),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_small"): (raise_rate, find_rate),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_large"): (lower_rate, warm_up, find_rate),
    (FindingKind.LOSS_PLATEAU, "saturation"): (scale_inputs, initialise, normalise, swap_activations),
    (FindingKind.LOSS_PLATEAU, "dead_units"): (leak, initialise, lower_rate),
    (FindingKind.LOSS_PLATEAU, "no_signal_in_data"): (overfit_batch,),
    (FindingKind.LOSS_PLATEAU, "unknown"): (overfit_batch, find_rate),
    (FindingKind.NO_GRADIENT, "detached"): (reconnect,),
    (FindingKind.NO_GRADIENT, "unused"): (use_or_freeze,),
    (FindingKind.NO_GRADIENT, "unknown"): (use_or_freeze,),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_small"): (raise_rate, find_rate),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_large"): (lower_rate, warm_up),
    (FindingKind.UPDATE_RATIO, "unscaled_inputs"): (scale_inputs, normalise, lower_rate),
    (FindingKind.UPDATE_RATIO, "unknown"): (find_rate,),
}
"""Every kind has a row for the cause `unknown`, which serves the causes that have no row."""


def suggest(finding: Finding, history: History) -> tuple[Suggestion, ...]:
    """What to change, best first, in code that names the user's own layers.

    Args:
        finding: what was found.
        history: tells which layers and activations the model has, and the learning rate.

    Returns:
        The suggestions; those that do not apply to the model are left out. The code is Python to paste.

    Example:
        >>> from lightning_gradflow.findings import Severity
        >>> finding = Finding(FindingKind.NO_GRADIENT, Severity.INFO, step=8, layers=("head.1",), cause="unused")
        >>> print(suggest(finding, History())[0].code)
        for name in ("head.1",):
            model.get_submodule(name).requires_grad_(False)
    """
    cures = CURES.get((finding.kind, finding.cause), CURES[finding.kind, "unknown"])
    site = survey(finding, history)
    return tuple(suggestion for cure in cures for suggestion in cure(site))
