"""Re-initialisation of the layers that a finding is about: from data where that can be had, else by the book."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_gradflow.detectors.known import first_values
from lightning_gradflow.detectors.small_gains import drawn_gains
from lightning_gradflow.detectors.zero_weights import zero_weights
from lightning_gradflow.findings import Finding, FindingKind
from lightning_gradflow.history import History
from lightning_gradflow.probes.layers import ROOT, module_named
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.adjustment import Centre, centre_of
from lightning_gradflow.remedies.around import activations_around, gates_of, layers_before, layers_up_to
from lightning_gradflow.remedies.attention import draw_attention
from lightning_gradflow.remedies.bare import Bare, initialise_bare, with_bare
from lightning_gradflow.remedies.critical import Treated, make_critical
from lightning_gradflow.remedies.draw_zeros import draw_zeros
from lightning_gradflow.remedies.fill import fill_missing
from lightning_gradflow.remedies.fit_outputs import fit_outputs
from lightning_gradflow.remedies.fresh import looks_fresh
from lightning_gradflow.remedies.gate_signs import turn_signs
from lightning_gradflow.remedies.norm_gains import reset_biases, reset_far_biases, reset_gains, reset_shutting
from lightning_gradflow.remedies.optimizer_state import forget
from lightning_gradflow.remedies.output_scaling import TargetScale
from lightning_gradflow.remedies.plan import TOO_LARGE, TOO_SMALL
from lightning_gradflow.remedies.recurrent_treatment import treat
from lightning_gradflow.remedies.scores import calm_scores
from lightning_gradflow.remedies.sick_layers import FAR, MAX_OFF, MAX_SPREAD, size_of
from lightning_gradflow.remedies.symmetry import break_symmetry
from lightning_gradflow.remedies.tables import draw_tables, has_short_rows, tied_embeddings
from lightning_gradflow.remedies.textbook import gain_between, initialise, name_for
from lightning_gradflow.remedies.training import RehearsalError, Training
from lightning_gradflow.remedies.unusual import draw_unusual
from lightning_gradflow.remedies.weights import parameters_of

_RECURRENCES = (nn.RNNBase, nn.RNNCellBase)
_SATURATED = 0.5  # of an activation's outputs, at its bounds; of a gate that is what it is for
_NOTHING = 1e-2  # times what keeps the size of a signal
_SMALLER = 0.5  # times what outputs were that were too large, for weights that cure it


@dataclass(frozen=True)
class Reinit:
    """What was drawn anew.

    Args:
        layers: in order of execution, but for recurrences and embeddings, which stand before the others.
        before: what was measured before, such as the `span` of the gains in decades.
        after: the same with the new weights.
        centres: layers whose inputs lie far from 0, with the mean and the spread of these inputs.
        targets: where the targets of an output layer lie, that was made for them.
        note: what else was done.
    """

    layers: tuple[str, ...]
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    centres: Mapping[str, Centre] = field(default_factory=dict)
    targets: TargetScale | None = None
    note: str = ""


def reinitialise(
    training: Training, finding: Finding, *, only_far: bool = False, fits_outputs: bool = True
) -> Reinit | None:
    """Draws layers anew, and lets the optimizers forget what they know of them.

    Where the bias of gates has the sign that stops the signal it gets the other one, and nothing else is done (see
    `turn_signs`). Recurrences are treated as `recurrent_treatment.treat` says, where the finding is about them.
    Everything else is made critical on a batch of the run (see `make_critical`). Where that leaves outputs too large,
    layers of the user's own loops are treated as recurrences are. Tables that a finding is about are drawn with
    rows of length 1 (see `draw_tables`), and the optimizers forget all that they know. Else recurrences and embeddings
    that no usual initialisation gives are drawn by the book then, unless `only_far` is set (see `draw_unusual`). Where
    no batch can be had, the layers that the finding names are drawn by the initialisation that suits the activations
    around them (see `textbook`).

    Output layers whose targets are far larger than what they give start where these are (see `fit_outputs`).

    Bare matrices, which modules of the user's own multiply with, count as layers in all of this (see `bare`).

    Args:
        training: the run, between two optimizer steps.
        finding: what is to be cured.
        only_far: whether only layers count as sick that are so by far; nothing is done by the book then.
        fits_outputs: whether an output layer may be made for its targets; steps in their unit have to follow.

    Returns:
        What was done; None where no layer can be treated, or none is sick.
    """
    if finding.kind is FindingKind.VANISHING_GRADIENT and not only_far:
        turned = turn_signs(training)
        if turned is not None:
            return Reinit(tuple(turned.changed), {"span": turned.before}, {"span": turned.after})
    if finding.cause == "recurrence":
        return _through_time(training, finding)
    if (finding.kind, finding.cause) == (FindingKind.NO_GRADIENT, "initialisation"):
        return _without_zeros(training, finding)
    if (finding.kind, finding.cause) == (FindingKind.LOSS_MISMATCH, "unscaled_targets"):
        return fit_targets(training) if fits_outputs else None
    if (finding.kind, finding.cause) == TOO_SMALL and has_short_rows(training.model):
        return None
    if training.rehearse is not None:
        try:
            done = _from_data(training, finding, only_far, fits_outputs)
        except RehearsalError:
            pass
        else:
            # what shuts an output may be its bias alone, which no gain tells of, and neither does one of weights whose
            # size a normalisation takes away again
            is_output = finding.kind is FindingKind.SATURATED_ACTIVATION and "reach" in finding.evidence
            if done is None and "output_growth" in finding.evidence and not only_far:
                return _through_time(training, replace(finding, layers=_of_own_loops(training, finding.layers)))
            if done is not None or not (is_output or "weight_size" in finding.evidence):
                return done
    return None if only_far else _by_the_book(training, finding)


def fit_targets(training: Training) -> Reinit | None:
    """Lets an output layer start where its targets are."""
    if training.rehearse is None:
        return None
    with training.rehearse() as (module, run):
        done = fit_outputs(module, run)
        if done is None:
            return None
        fresh = {name: [p.detach().clone() for p in parameters] for name, parameters in done.changed.items()}
    if not _copied(training.model, fresh):
        return None
    # what an optimizer knows of all layers is the size that the error has given their gradients
    forget(training.optimizers, training.model.parameters())
    numbers = {"target_mean": float(done.scale.mean.mean()), "target_deviation": done.scale.deviation}
    return Reinit(tuple(name or ROOT for name in fresh), after=numbers, targets=done.scale)


def _of_own_loops(training: Training, layers: Sequence[str]) -> tuple[str, ...]:
    """Those that are none of torch's recurrences: what blows up of these has been drawn, and the others are well."""
    theirs = {name or ROOT for name, part in training.model.named_modules() if isinstance(part, _RECURRENCES)}
    return tuple(name for name in layers if name not in theirs)


def _through_time(training: Training, finding: Finding) -> Reinit | None:
    with with_bare(training) as (whole, uses):
        treated = treat(whole, finding, uses)
    if treated is None:
        return None
    centres = _centres(training, treated.layers)
    return Reinit(treated.layers, treated.before, treated.after, centres, note=treated.note)


def _without_zeros(training: Training, finding: Finding) -> Reinit | None:
    """Draws what is zero and no step can change; critically, where a batch can be had.

    Then so is what was zero in the first sample, and has come free by next to nothing, as by the biases around it.
    """
    around = activations_around(training.history.points)
    outer = zero_weights(training.history).outer  # zeros at the end of a product leave it what it is, and move
    layers = [name for name in finding.layers if name not in outer] or finding.layers
    first = zip(training.history.layers, first_values(training.history, "zero_weights"), strict=True)
    born = {name for name, count in first if count > 0 and name not in outer and _is_next_to_nothing(training, name)}
    if training.rehearse is not None:
        try:
            with training.rehearse() as (module, run):
                drawn = draw_zeros(module, layers, around, training.seed)
                treated = make_critical(module, run, training.seed, only={*drawn, *born})
                drawn |= treated.changed
                fresh = {name: [p.detach().clone() for p in parameters] for name, parameters in drawn.items()}
            changed = _copied(training.model, fresh)
            forget(training.optimizers, changed)
            centres = treated.centres if changed else {}
            return Reinit(tuple(name or ROOT for name in fresh), centres=centres) if changed else None
        except RehearsalError:
            pass
    drawn = draw_zeros(training.model, layers, around, training.seed)
    forget(training.optimizers, (p for parameters in drawn.values() for p in parameters))
    return Reinit(tuple(name or ROOT for name in drawn)) if drawn else None


def _is_next_to_nothing(training: Training, layer: str) -> bool:
    weight = getattr(module_named(training.model, layer), "weight", None)
    is_plain = isinstance(weight, Tensor) and weight.dim() > 1 and not is_sharded(weight)
    return is_plain and size_of(module_named(training.model, layer)) < _NOTHING


def _from_data(training: Training, finding: Finding, only_far: bool, fits_outputs: bool) -> Reinit | None:
    assert training.rehearse is not None
    is_of_tables = (finding.kind, finding.cause) == TOO_LARGE
    with training.rehearse() as (module, run):
        drawn: dict[str, Sequence[nn.Parameter]] = {}
        far_biases: dict[str, Sequence[nn.Parameter]] = {}
        is_far_out = "output_growth" in finding.evidence
        is_dead = (finding.kind, finding.cause) == (FindingKind.DEAD_UNITS, "initialisation")
        if not only_far:
            drawn |= fill_missing(module, training.seed)
            # a table of zeros beside those that are too large is so on purpose
            drawn |= draw_unusual(module, run, training.seed, with_small_tables=not is_of_tables)
            drawn |= draw_attention(module, training.seed)
            drawn |= reset_gains(module, drawn_gains(training.history))
            points = training.history.points
            kept = gates_of(training.history) | {point.name for point in points[-1:]}
            drawn |= reset_biases(module, kept)
            kept |= {point.name for point in [point for point in points if point.is_layer][-1:]}
            if is_dead:
                drawn |= reset_shutting(module, layers_up_to(points, finding.layers), kept)
            far_biases = reset_far_biases(module, kept) if is_far_out else {}
            drawn |= far_biases
        if (finding.kind, finding.cause) == (FindingKind.DEAD_UNITS, "symmetry"):
            around = activations_around(training.history.points)
            drawn |= break_symmetry(module, finding.layers, around, training.seed)
        max_off, max_spread = FAR if only_far else MAX_OFF, _max_spread(finding, training.history, only_far)
        bare = Bare(module, run)
        if is_of_tables:
            names = dict.fromkeys((*finding.layers, *tied_embeddings(module)))
            drawn |= draw_tables(module, names, bare.multiplied, training.seed)
        drawn |= bare.draw_loops(module, training.seed)
        whole = bare.layers(module, with_loops=False)
        shut = finding.layers if "gate_opening" in finding.evidence else ()
        # no gain tells of a size that a norm takes away again, nor of what units have in common
        always = finding.layers if {"weight_size", "unit_spread"} & finding.evidence.keys() else shut
        if is_dead and not only_far:
            always = layers_before(training.history.points, finding.layers)  # no gain tells of the end of a dead branch
        gates = gates_of(training.history) - {*shut}
        treated = make_critical(
            whole, whole.routed(run), training.seed, max_off, max_spread, gates=gates, always=always
        )
        if is_far_out and not far_biases and not _helps_outputs(treated):
            return None
        if "unit_spread" in finding.evidence and not {*finding.layers} & {name or ROOT for name in treated.changed}:
            return None
        drawn |= bare.owners(module, treated.changed)
        drawn |= {} if only_far else calm_scores(module, run)
        fitted = fit_outputs(module, run) if fits_outputs else None
        drawn |= fitted.changed if fitted is not None else {}
        fresh = {name: [p.detach().clone() for p in parameters] for name, parameters in drawn.items()}
    changed = _copied(training.model, fresh)
    if not changed:
        return None
    # what an optimizer knows of other layers is the size that tables or targets have given their gradients
    is_all = is_of_tables or fitted is not None
    forget(training.optimizers, training.model.parameters() if is_all else changed)
    before, after = treated.spans
    layers = tuple(name or ROOT for name in fresh)
    targets = fitted.scale if fitted is not None else None
    return Reinit(layers, {"span": before}, {"span": after}, treated.centres, targets)


def _helps_outputs(treated: Treated) -> bool:
    """Whether outputs that were too large are not any more: a loss that falls from there would fall without it too.

    Outputs that are the same for all samples, as behind a recurrence at its bounds, have no spread, however large.
    Those of a layer that was drawn lie around 0.
    """
    before, after = treated.outputs
    is_drawn = any(name in treated.after and not treated.after[name].follower for name in treated.changed)
    return not after > before * _SMALLER or (is_drawn and after < MAX_SPREAD)


def _centres(training: Training, layers: Sequence[str]) -> dict[str, Centre]:
    """Where the inputs of the linear layers of a loop lie, over all its steps."""
    if training.rehearse is None:
        return {}
    seen: dict[str, list[Tensor]] = {}
    with training.rehearse() as (module, run):
        handles = []
        for name in layers:
            layer = module_named(module, name)
            if isinstance(layer, nn.Linear):
                inputs = seen.setdefault(name, [])
                handles.append(layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.extend(args[:1])))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        found = {name: centre_of(module.get_submodule(name), torch.cat(x)) for name, x in seen.items() if x}
    return {name: centre for name, centre in found.items() if centre is not None}


def _max_spread(finding: Finding, history: History, only_far: bool) -> float:
    """How far outputs may spread: behind large inputs it is usual, and too much where activations saturate.

    These may do so below another alarm: what they hold back of the signal hides how large the weights before them are.
    """
    if finding.kind is FindingKind.SATURATED_ACTIVATION:
        return MAX_SPREAD
    if finding.kind is FindingKind.NONFINITE_GRADIENT and not only_far:  # something overflows on such outputs
        return MAX_SPREAD
    shares = history["saturated_fraction"]
    gates = history["gate_fraction"]
    at_bounds = shares.size > 0 and bool(((shares[-1] > _SATURATED) & ~(gates[-1] > _SATURATED)).any())
    return MAX_SPREAD if at_bounds else math.inf


@torch.no_grad()
def _copied(model: nn.Module, fresh: Mapping[str, Sequence[Tensor]]) -> list[nn.Parameter]:
    changed = []
    for name, values in fresh.items():
        # of a parametrized layer some have treated its own ones alone, which come first
        for parameter, value in zip(parameters_of(model.get_submodule(name)), values, strict=False):
            if parameter.requires_grad:
                parameter.copy_(value)
                parameter.grad = None
                changed.append(parameter)
    return changed


def _by_the_book(training: Training, finding: Finding) -> Reinit | None:
    if "gain_rms" in finding.evidence:  # nothing else is wrong
        gains = reset_gains(training.model, finding.layers)
        forget(training.optimizers, (p for parameters in gains.values() for p in parameters))
        return Reinit(tuple(gains)) if gains else None
    around = activations_around(training.history.points)
    modules = dict(training.model.named_modules())
    owners = Counter(p for module in modules.values() for p in module.parameters(recurse=False))
    generator = torch.Generator().manual_seed(training.seed)
    # the layers that a finding of depth names are those that suffer; all that the signal passes have a part in it
    is_of_depth = finding.kind in (FindingKind.VANISHING_GRADIENT, FindingKind.EXPLODING_GRADIENT)
    changed: list[nn.Parameter] = []
    layers = []
    for name, (before, after) in around.items():  # in order of execution, so that a seed gives the same weights
        if name not in modules or not (name in finding.layers or (is_of_depth and after)):
            continue
        if name not in finding.layers and not _look_fresh(modules[name]):
            continue
        # what is right for one of several owners is wrong for the others
        if any(owners[p] > 1 for p in modules[name].parameters(recurse=False)):
            continue
        fresh = initialise(modules[name], name_for(after), generator, before=before, after=after)
        fresh = fresh or initialise_bare(modules[name], generator, gain_between(before, after))
        if fresh:
            layers.append(name)
            changed += fresh
    forget(training.optimizers, changed)
    return Reinit(tuple(layers)) if layers else None


def _look_fresh(module: nn.Module) -> bool:
    weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    return all(is_sharded(p) or looks_fresh(p) for p in weights)
