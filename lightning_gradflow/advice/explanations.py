"""What a finding means, in a sentence for what is seen and one for why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from string import Formatter

from lightning_gradflow.findings import Finding, FindingKind

Text = tuple[str, ...]
"""A sentence: its head, and details that are left out where the evidence has no number for them."""

SEEN: dict[FindingKind, Text] = {
    FindingKind.VANISHING_GRADIENT: (
        "The gradient vanishes {down}",
        "it gets {fold} times smaller over {points} points of the network",
        "at the pace of the first steps the weights need {wait_steps} steps to grow",
    ),
    FindingKind.EXPLODING_GRADIENT: (
        "The gradient explodes in {layers}",
        "it gets {fold} times larger over {points} points of the network",
        "its total norm of {grad_norm_total} is {growth} times the median of this run so far",
        "the loss is {loss}, where it was {highest_loss} at most",
        "the first outputs of the network, {output_rms}, are {output_growth} times as large as its inputs",
    ),
    FindingKind.NONFINITE_GRADIENT: (
        "The gradient is NaN or infinite",
        "{nonfinite_layers} of the layers have such entries",
        "the loss is {loss}",
    ),
    FindingKind.DEAD_UNITS: (
        "Units are dead at {layers}: they stand on the flat side for every sample",
        "{dead_fraction} of the units in the worst place",
        "activations with dead units: {activations}",
    ),
    FindingKind.SATURATED_ACTIVATION: (
        "The activation saturates at {layers}",
        "{saturated_fraction} of its outputs are at the bounds",
        "it multiplies the gradient that passes back by {activation_gain}",
    ),
    FindingKind.LOSS_PLATEAU: (
        "The loss has stopped falling",
        "it moved by {progress} in {steps} steps",
        "it stands at {loss}",
    ),
    FindingKind.LOSS_MISMATCH: ("The loss function gets something that it is not made for",),
    FindingKind.MIXED_SAMPLES: (
        "The samples of a batch are mixed in {layers}",
        "its {batch_size} samples are taken for time steps, and the {time_steps} time steps for samples",
    ),
    FindingKind.NO_GRADIENT: ("No gradient ever reaches {layers}, although the optimizer holds the parameters",),
    FindingKind.UPDATE_RATIO: (
        "The updates are out of proportion to the weights in {layers}",
        "one step changes them by {update_ratio} times their norm",
        "the largest was step {largest_step}",
        "all {planned_steps} planned steps together by {reach} at most",
        "clipping leaves {clip_factor} of the gradient",
        "the loss is {growth} times what it was",
        "the weights have grown to {weight_growth} times what they were",
    ),
}
"""What is seen, for each kind."""

_LITTLE = ("Little or nothing is learnt", "it has had {steps} steps", "the loss is {loss}")

SEEN_SO: dict[tuple[FindingKind, str], Text] = {
    (FindingKind.EXPLODING_GRADIENT, "unscaled_inputs"): (
        "Inputs are far too large, and make the gradient explode",
        "feature {columns}",
        "such features in all: {features}",
    ),
    (FindingKind.SATURATED_ACTIVATION, "score_scale"): (
        "The softmax chooses one position each at {layers}",
        "the largest score is {softmax_gap} above the next one (median)",
    ),
    (FindingKind.LOSS_PLATEAU, "weight_scale"): _LITTLE,
    (FindingKind.LOSS_PLATEAU, "unscaled_inputs"): _LITTLE,
    (FindingKind.LOSS_PLATEAU, "recurrence"): _LITTLE,
    (FindingKind.LOSS_PLATEAU, "symmetry"): _LITTLE,
    (FindingKind.NO_GRADIENT, "initialisation"): (
        "The weights of {layers} are zero, and so is the gradient that would change them",
    ),
    (FindingKind.NO_GRADIENT, "detached"): (
        "No gradient of the loss ever reaches {layers}, although the optimizer holds the parameters",
    ),
    (FindingKind.NO_GRADIENT, "not_optimized"): ("{layers} get a gradient, and no optimizer holds their parameters",),
    (FindingKind.UPDATE_RATIO, "rounding"): (
        "The weights of {layers} stay as they are, although the optimizer steps",
        "{unchanged_fraction} of what a step is to gain is lost",
    ),
    (FindingKind.DEAD_UNITS, "symmetry"): ("All units of a layer are copies of one another, or nearly, in {layers}",),
    (FindingKind.UPDATE_RATIO, "weight_scale"): (
        "The weights of {layers} are far too small",
        "a step changes them by {update_ratio} times their norm (median)",
    ),
    (FindingKind.UPDATE_RATIO, "weight_decay"): (
        "The weights of {layers} are all but gone",
        "they have {weight_growth} times the norm they started with",
        "the loss is {loss}",
    ),
    (FindingKind.UPDATE_RATIO, "overwritten"): (
        "The weights of {layers} were changed by far more than the optimizer's steps can do",
        "to {weight_growth} times their norm",
        "the loss is {loss}, where it was {loss_before}",
    ),
}
"""What is seen where the cause makes it something else."""

_FEATURES = "features of the input that are too large: {features}; the worst, by index: {columns}"

BECAUSE: dict[tuple[FindingKind, str], Text] = {
    (FindingKind.VANISHING_GRADIENT, "saturation"): (
        "Most of it is lost in the bounded activations, which pass little on even where they do not saturate",
        "each multiplies the gradient by {activation_gain} (median)",
        "the weights of a layer by {weight_gain}",
    ),
    (FindingKind.VANISHING_GRADIENT, "weight_scale"): (
        "The weights are too small for the depth",
        "those of a layer multiply the gradient by {weight_gain} (median)",
        "the gains of norm layers were drawn around 0, and are {gain_rms} (rms), where 1 is usual",
        "all planned steps together move them by {gain_reach} at most",
    ),
    (FindingKind.VANISHING_GRADIENT, "depth"): (
        "No layer loses much by itself, but the losses multiply and there are many layers",
        "a factor of {per_point} at each point",
    ),
    (FindingKind.VANISHING_GRADIENT, "recurrence"): (
        "It is lost in the recurrence, which multiplies it by less than one again and again",
        "through time by {time_decay} a step",
        "after {memory_steps} of the {time_steps} steps a third of it is left",
        "from the last layer of the stack to the first a share of {stack_gain} is left",
    ),
    (FindingKind.VANISHING_GRADIENT, "underflow"): (
        "It falls below the smallest number of its format, such as 6e-8 in fp16, and is rounded to zero",
        "nothing is left at {lost_share} of the {points} points",
        "where it comes from the loss it is {times} times that number",
    ),
    (FindingKind.VANISHING_GRADIENT, "dead_units"): (
        "Most of it is lost in rectifiers with units that pass nothing on",
        "each multiplies the gradient by {activation_gain} (median)",
    ),
    (FindingKind.VANISHING_GRADIENT, "learning_rate_too_large"): (
        "It came through at first: steps that were far too large for the weights have overwritten them",
    ),
    (FindingKind.EXPLODING_GRADIENT, "weight_scale"): (
        "The weights are too large for the depth",
        "those of a layer multiply the gradient by {weight_gain} (median)",
    ),
    (FindingKind.EXPLODING_GRADIENT, "depth"): (
        "No layer adds much by itself, but the gains multiply and there are many layers",
        "a factor of {per_point} at each point",
    ),
    (FindingKind.EXPLODING_GRADIENT, "recurrence"): (
        "It grows through time: the recurrence multiplies it by more than one at each time step",
        "a factor of {time_decay} a step over {time_steps} steps",
        "the spectral radius of its weights is {recurrent_radius}",
    ),
    (FindingKind.EXPLODING_GRADIENT, "learning_rate_too_large"): (
        "The norm leaves its own past behind while the loss rises: the steps are too large",
    ),
    (FindingKind.NONFINITE_GRADIENT, "forward"): (
        "It began in the forward pass: {first} is the first layer whose output is not finite",
        "weights that are not finite by now: in {spoilt_layers}, so a step between two samples may have made it",
    ),
    (FindingKind.NONFINITE_GRADIENT, "initialisation"): (
        "Weights or biases of {first} were NaN or infinite before the first step: never initialised, or loaded so",
        "in {spoilt_layers}",
    ),
    (FindingKind.NONFINITE_GRADIENT, "loss"): (
        "It began behind the last layer: the outputs of all layers are finite and the loss is not",
    ),
    (FindingKind.NONFINITE_GRADIENT, "backward"): (
        "It began in the backward pass, at {first}: all outputs and the loss are finite",
    ),
    (FindingKind.NONFINITE_GRADIENT, "optimizer_step"): (
        "A step of the optimizer has made weights NaN or infinite, in {first} for one",
        "they are held in {weight_bits} bits, and in fp16 the usual eps of Adam, 1e-8, is zero",
    ),
    (FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large"): (
        "The loss, the gradient or the weights left their range step by step before that: the steps are too large",
    ),
    (FindingKind.EXPLODING_GRADIENT, "unscaled_inputs"): (
        "Weights are made for inputs of about 1, so all that follows from these is too large",
        "the first outputs of the network are {output_rms}",
        "the gradients of {layers} are so too",
        "the gradient gets {fold} times larger over {points} points of the network",
        "its total norm of {grad_norm_total} is {growth} times the median of this run so far",
        "the loss is {loss}, where it was {highest_loss} at most",
    ),
    (FindingKind.NONFINITE_GRADIENT, "unscaled_inputs"): (
        "The inputs are so large that the numbers overflow",
        _FEATURES,
    ),
    (FindingKind.DEAD_UNITS, "initialisation"): (
        "They were dead from the first samples on: the initial weights or biases",
    ),
    (FindingKind.DEAD_UNITS, "learning_rate_too_large"): (
        "They were alive at first and died in training: a step that was too large pushed them there",
    ),
    (FindingKind.DEAD_UNITS, "unscaled_inputs"): (
        "The inputs are so large that the steps after them pushed them there",
        _FEATURES,
    ),
    (FindingKind.DEAD_UNITS, "symmetry"): ("They start from the same weights, and steps hardly make them differ",),
    (FindingKind.SATURATED_ACTIVATION, "unscaled_inputs"): (
        "The inputs are too large for the weights, and next to nothing stands between them and it",
        _FEATURES,
    ),
    (FindingKind.SATURATED_ACTIVATION, "weight_scale"): (
        "It is so from the start: the weights before it are too large, or a bias holds it there",
        "all gates are shut, {gate_opening} of a signal comes through, and no step that is planned opens them",
    ),
    (FindingKind.SATURATED_ACTIVATION, "score_scale"): (
        "It is so from the start, and next to no gradient comes through: what makes the scores is far too large",
    ),
    (FindingKind.SATURATED_ACTIVATION, "drift"): ("It was not so at the start: the weights grew in training",),
    (FindingKind.LOSS_PLATEAU, "unscaled_inputs"): (
        "The inputs are not of the size that the weights of {first} are made for",
        "they are all but the same: their deviation is {input_deviation} and their mean {input_mean} (rms)",
        _FEATURES,
        "the first outputs were {output_rms} (rms), and the targets differ by {target_deviation}",
    ),
    (FindingKind.LOSS_PLATEAU, "weight_scale"): (
        "The weights that {layers} started from are too large",
        "the table of the embedding is {embedding_rms} (rms), where 1 is usual",
        "the first scores that the loss got had a deviation of {score_deviation} over the classes, where 1 is usual",
        "they make up the loss, which falls by {loss_by_size} % for each 1 % that they are smaller",
        "they are {weight_size} times as large as what keeps the size of a signal",
        "each makes what little two inputs differ by {layer_gain} times as large, and the outputs are noise",
        "all steps of the run together change them by {reach} times their norm at most",
        "at the pace of most steps so far the whole run changes them by {usual_reach} times their norm at most",
    ),
    (FindingKind.UPDATE_RATIO, "weight_scale"): (
        "They were drawn so, and the learning rate is made for usual ones",
        "they were {weight_size} times as large as what keeps the size of a signal (median)",
    ),
    (FindingKind.LOSS_PLATEAU, "recurrence"): (
        "The state of {layers} keeps nothing: the recurrent weights it started from are far too large",
        "their spectral radius is {recurrent_radius}, where 1 is usual",
    ),
    (FindingKind.LOSS_PLATEAU, "symmetry"): (
        "The weights of {layers} were drawn with a mean, such as all positive, and give all units nearly the same",
        "units differ by {unit_spread} times their norm, where 1.2 is usual",
    ),
    (FindingKind.LOSS_PLATEAU, "vanishing_gradient"): ("The first layers get next to no gradient and cannot learn",),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_small"): (
        "The steps are too small to get anywhere",
        "one of {line_best_factor} times the length would lower the loss of other batches by {line_gain_far}",
        "clipping leaves {clip_factor} of the gradient",
    ),
    (FindingKind.LOSS_PLATEAU, "learning_rate_too_large"): (
        "The steps are so large that they undo, or have undone, what was learnt",
        "along a step the curvature is {sharpness}, and above 2 it overshoots",
    ),
    (FindingKind.LOSS_PLATEAU, "dead_units"): ("Dead units block the signal",),
    (FindingKind.LOSS_PLATEAU, "saturation"): ("Saturated activations block the signal",),
    (FindingKind.LOSS_PLATEAU, "no_signal_in_data"): (
        "The targets do not seem to follow from the inputs: what little was learnt is these samples by heart",
        "the cosine between the gradients of two halves of the data is {gradient_cosine}",
    ),
    (FindingKind.LOSS_MISMATCH, "unscaled_targets"): (
        "The targets are far larger than the outputs of {layers}, which are made to be of size 1",
        "they are off by {error} (rms), and the outputs are {output_rms}",
        "what tells targets apart is {target_deviation}",
    ),
    (FindingKind.LOSS_MISMATCH, "unreachable_targets"): (
        "The activation that gives the outputs is bounded, and targets lie beyond its bounds, where no weights reach",
        "{targets_beyond} of their variance is out of reach",
    ),
    (FindingKind.LOSS_MISMATCH, "softmax_twice"): (
        "cross_entropy has a softmax of its own, and gets the output of another one: the loss cannot come near 0",
    ),
    (FindingKind.LOSS_MISMATCH, "bounded_scores"): (
        "cross_entropy gets the output of a sigmoid or tanh: scores that cannot differ by more than 1, or 2",
        "no class can get a probability near 1, and the loss cannot come near 0",
    ),
    (FindingKind.LOSS_MISMATCH, "sigmoid_twice"): (
        "binary_cross_entropy_with_logits has a sigmoid of its own, and gets the output of another one",
        "no probability below one half can come out",
    ),
    (FindingKind.LOSS_MISMATCH, "no_log_softmax"): (
        "nll_loss takes logarithms of probabilities, as log_softmax gives them, and gets probabilities or scores",
    ),
    (FindingKind.LOSS_MISMATCH, "broadcast"): (
        "Outputs and targets differ in shape, as (N, 1) and (N,) do, and are broadcast to (N, N)",
        "each output is held against all targets, and the best that can be learnt is their mean",
    ),
    (FindingKind.MIXED_SAMPLES, "batch_first"): (
        "batch_first is False there, and the input is (batch, time, features)",
    ),
    (FindingKind.NO_GRADIENT, "detached"): (
        "The graph is cut behind them: the next layer, or the loss, takes their output detached, as data or rounded",
        "what arrives is exactly zero, in all of {zero_samples} samples",
        "what they get is that of a penalty on the weights, for no output had a gradient in {penalty_samples} samples",
    ),
    (FindingKind.NO_GRADIENT, "initialisation"): (
        "One factor gets the others times what comes back, and all of them started from zero: no step will ever help",
    ),
    (FindingKind.NO_GRADIENT, "unused"): ("They take no part in the loss",),
    (FindingKind.NO_GRADIENT, "not_optimized"): (
        "The optimizer was made without them, or before they were, or they are in a list that parameters() passes over",
    ),
    (FindingKind.UPDATE_RATIO, "rounding"): (
        "They are in a 16-bit format, and steps below half of the spacing of its numbers are rounded away",
        "that is up to 1/256 of a weight in bf16, and 1/2048 in fp16",
    ),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_small"): (
        "At that pace they hardly move: the learning rate is too small (0.001 is a usual ratio)",
    ),
    (FindingKind.UPDATE_RATIO, "weight_decay"): (
        "The weight decay, or a penalty in the loss, takes more from them than the gradient gives",
    ),
    (FindingKind.UPDATE_RATIO, "overwritten"): (
        "Something else has written to them, such as a checkpoint that was loaded in part, and what was learnt is lost",
    ),
    (FindingKind.UPDATE_RATIO, "unscaled_inputs"): (
        "The inputs are so large that each step overwrites the weights, and the loss is the worse for it",
        _FEATURES,
    ),
    (FindingKind.UPDATE_RATIO, "learning_rate_too_large"): (
        "They are overwritten, to the harm of the loss: the learning rate is too large (0.001 is a usual ratio)",
    ),
}
"""Why, for each kind and cause."""

UNKNOWN = "The measurements do not tell why"
"""Why, for every cause that is not in the table."""

_PERCENT = frozenset(
    {"dead_fraction", "lost_share", "saturated_fraction", "progress", "line_gain_far", "line_shuffled"}
    | {"unchanged_fraction"}
)
_COUNT = frozenset(
    {"points", "layers", "underflowed_points", "nonfinite_layers", "activations", "features"}
    | {"zero_samples", "penalty_samples", "largest_step", "planned_steps", "steps", "time_steps", "wait_steps"}
    | {"batch_size"}
)
_MOST_NAMES = 3


def explain(finding: Finding) -> str:
    r"""What was found and why, in two plain sentences with the layers and the numbers.

    A detail for which the evidence has no number is left out; a cause that is not in the table is called unknown.

    Args:
        finding: its `message` is not looked at.

    Returns:
        The text, without markup.

    Example:
        >>> from lightning_gradflow.findings import Severity
        >>> evidence = {"span": -6.2, "points": 21.0, "activation_gain": 0.24}
        >>> finding = Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 0, ("fc1",), "saturation", "", evidence)
        >>> print(explain(finding).partition(". ")[0])
        The gradient vanishes in fc1: it gets 1.6e6 times smaller over 21 points of the network
    """
    fields = _fields(finding)
    because = BECAUSE.get((finding.kind, finding.cause), (UNKNOWN,))
    seen = SEEN_SO.get((finding.kind, finding.cause), SEEN[finding.kind])
    return f"{_sentence(seen, fields)} {_sentence(because, fields)}"


def names(layers: tuple[str, ...]) -> str:
    """The first three layers, and how many more there are.

    Example:
        >>> names(("a", "b", "c", "d"))
        'a, b, c and 1 more'
    """
    if not layers:
        return "the model"
    more = len(layers) - _MOST_NAMES
    if more > 0:
        return f"{', '.join(layers[:_MOST_NAMES])} and {more} more"
    return " and ".join(filter(None, (", ".join(layers[:-1]), layers[-1])))


def number(value: float) -> str:
    """Three significant digits, as short as they can be.

    Example:
        >>> [number(x) for x in (0.2401, 21.0, 0.00001234, 4.2e12, float("nan"))]
        ['0.24', '21', '1.2e-5', '4.2e12', 'nan']
    """
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _sentence(text: Text, fields: Mapping[str, str]) -> str:
    head, *details = (part.format_map(fields) for part in text if _wanted(part) <= set(fields))
    colon = "; " if ": " in head else ": "  # a head may hold a colon of its own
    return head + (colon + "; ".join(details) if details else "") + "."


def _down(layers: tuple[str, ...]) -> str:
    """From which layer down: layers come worst first, so that the last one is where it begins."""
    if len(layers) < 2:
        return f"in {names(layers)}"
    return f"from {layers[-1]} down to {layers[0]} ({len(layers)} layers)"


def _wanted(part: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(part) if name}


def _fields(finding: Finding) -> dict[str, str]:
    evidence = dict(finding.evidence)
    if not math.isnan(span := evidence.get("span", math.nan)):
        evidence["fold"] = 10.0 ** min(abs(span), 300.0)
    if not math.isnan(slope := evidence.get("slope", math.nan)):
        # the slope is taken towards the first layer: below zero it shrinks on the way
        evidence["per_point"] = 10.0 ** max(min(slope, 300.0), -300.0)
    if not math.isnan(bits := evidence.get("headroom", math.nan)):
        evidence["times"] = 2.0 ** max(min(bits, 1000.0), -1000.0)
    fields = {"layers": names(finding.layers), "first": finding.layers[0] if finding.layers else "the model"}
    for key, value in evidence.items():
        if (math.isnan(value) and key != "loss") or (key == "nonfinite_layers" and value == 0):
            continue  # a NaN loss is news, any other NaN was not measured
        if key == "spoilt_layers":
            fields[key] = "1 layer" if value == 1 else f"{value:.0f} layers"
        elif key in _PERCENT:
            fields[key] = (f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}").replace("-0.0%", "0.0%")
        elif key in _COUNT:
            fields[key] = f"{value:.0f}"
        else:
            fields[key] = number(value)
    if columns := [key for key in fields if key.startswith("feature_")]:
        fields["columns"] = ", ".join(f"{key.removeprefix('feature_')} (rms {fields[key]})" for key in columns)
    fields["down"] = _down(finding.layers)
    # as evidence `layers` is a count; in a sentence it means their names
    fields["layers"] = names(finding.layers)
    return fields
