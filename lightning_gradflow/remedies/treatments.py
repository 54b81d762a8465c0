"""What each remedy does to a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from torch import nn

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History
from lightning_gradflow.probes.layers import ROOT, module_named
from lightning_gradflow.remedies.adjustment import Centre
from lightning_gradflow.remedies.patient import Patient, Treatment
from lightning_gradflow.remedies.plan import CHAOTIC, TOO_SMALL, UNTOUCHED
from lightning_gradflow.remedies.readers import centres_behind
from lightning_gradflow.remedies.recurrent import GATED
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.reinit import Reinit, fit_targets, reinitialise
from lightning_gradflow.remedies.slowing import GATED_RATIO, MAX_RATIO, USUAL_RATIO, slow_down, slow_down_anew
from lightning_gradflow.remedies.snapshot import Snapshot
from lightning_gradflow.remedies.training import Rehearsal, RehearsalError, Training

_OTHER_REASONS = ("learning_rate_too_large", "drift")
_GROWN = 1.0  # decades: layers that change the signal by less together have no say in whether a network learns


def treat(remedy: str, patient: Patient) -> Treatment | None:
    """Applies a remedy, one of `plan.REMEDIES`; None where it has nothing to do here, and then nothing has changed."""
    try:
        return _TREATMENTS[remedy](patient)
    except RehearsalError:
        return None


def _clip(patient: Patient) -> Treatment | None:
    patient.held.start_clipping(patient.training)
    norms = patient.training.history.scalar("grad_norm_total")
    return Treatment(before={"grad_norm_total": float(norms[-1])} if norms.size else {})


def _reinit(patient: Patient) -> Treatment | None:
    finding = patient.finding
    if finding.cause == "unscaled_inputs" and inputs_jumped(patient.training.history):
        return None  # the weights are drawn on one batch, and this one stands out
    done, folded = _drawn_on_scaled(patient)
    behind: Mapping[str, Centre] = {}
    if done is None:
        with patient.training.whole() as training:
            done = _drawn(training, finding, fits_outputs=training is patient.training)
            behind = centres_behind(training, done.layers) if done is not None and finding.cause == "recurrence" else {}
    if done is None:
        return None
    patient.held.centre({**behind, **done.centres})
    if done.targets is not None:
        patient.held.scale_outputs(done.targets)
    _clip_new(patient, done.layers)
    before, after = slow_down_anew(patient)
    note = f"the scale of the inputs folded into {', '.join(folded)}" if folded else done.note
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after}, note)


def _drawn_on_scaled(patient: Patient) -> tuple[Reinit | None, tuple[str, ...]]:
    """Draws anew what is sick on standardised inputs, where these are unscaled, and folds their scale in.

    Weights that are too small hide how large the inputs are. Those that are drawn for raw inputs are made for the
    largest column, and the others drown.

    Returns:
        What was drawn, and the layers that take the inputs; None and () where nothing was done.
    """
    training, finding = patient.training, patient.finding
    is_from_start = not patient.has_past and not inputs_jumped(training.history)
    is_sure = finding.cause not in (*_OTHER_REASONS, "forward", "recurrence")
    if not (is_from_start and is_sure and "scale_inputs" in patient.allow) or training.unsharded is not None:
        return None, ()
    drawn: list[Reinit] = []

    def draw(rehearse: Rehearsal, layers: Collection[str]) -> bool:
        now = Snapshot.take(training.model, training.optimizers)
        done = reinitialise(replace(training, rehearse=rehearse), finding)
        if done is None or not {name or ROOT for name in layers} <= set(done.layers):
            now.restore(training.model, training.optimizers)  # weights that stay are made for the inputs as they are
            return False
        drawn.append(done)
        return True

    try:
        folded = patient.held.scaling.start(training, before_fold=draw, are_new=True)
    except RehearsalError:  # then by the book
        return None, ()
    return (drawn[0], folded.layers) if folded is not None else (None, ())


def _drawn(training: Training, finding: Finding, *, fits_outputs: bool) -> Reinit | None:
    """Draws anew what is sick; of what may have other reasons only what is so by far."""
    is_far = finding.cause in (*_OTHER_REASONS, "forward") and not _is_of_birth(training, finding)
    done = reinitialise(training, finding, only_far=is_far, fits_outputs=fits_outputs)
    if done is None:
        return None
    rest: Reinit | None = None
    if finding.cause == "forward":  # nothing was known of what lies behind numbers that are not finite
        rest = reinitialise(training, finding, fits_outputs=fits_outputs)
    elif (finding.kind, finding.cause) == CHAOTIC:  # what else is far off was drawn as badly
        rest = reinitialise(training, replace(finding, cause="unknown"), only_far=True, fits_outputs=False)
    elif (finding.kind, finding.cause) == TOO_SMALL and (drawn := _plain_recurrences(training, done.layers)):
        # usual weights forget as well: these were drawn a moment ago
        rest = reinitialise(training, replace(finding, cause="recurrence", layers=drawn))
    if rest is None:
        return done
    return Reinit(
        layers=tuple(dict.fromkeys((*done.layers, *rest.layers))),
        before={**rest.before, **done.before},
        after={**done.after, **rest.after},
        centres={**done.centres, **rest.centres},
        targets=rest.targets or done.targets,
        note="; ".join(filter(None, (done.note, rest.note))),
    )


def _plain_recurrences(training: Training, layers: Sequence[str]) -> tuple[str, ...]:
    """Torch's recurrences without gates among some layers."""
    kinds = (nn.RNN, nn.RNNCell)
    return tuple(name for name in layers if isinstance(module_named(training.model, name), kinds))


def _is_of_birth(training: Training, finding: Finding) -> bool:
    """Whether it comes from the weights that the run started with, together: none of them has to be far off for that.

    Outputs were never finite; or steps were too large for weights that made the gradient grow more than tenfold with
    depth from the start: a rate that is small enough for all of them is too small to learn with.
    """
    if finding.cause == "forward":
        losses = training.history.losses
        return bool(losses.size) and not np.isfinite(losses).any()
    if finding.cause != "learning_rate_too_large" or training.rehearse is None or not len(training.history):
        return False
    profile = depth_profile(training.history, 0)
    return profile is not None and profile.span > _GROWN


def _clip_new(patient: Patient, layers: Sequence[str]) -> None:
    """Clips the gradients of weights that were just drawn: the learning rate was not chosen for them."""
    if patient.held.clipper is not None:
        patient.held.clipper.restart()
    elif "clip" in patient.allow:
        # while nothing is known of their gradients, only the size of the steps says what is too much
        ratio = USUAL_RATIO if _is_plain_recurrence(patient, layers) else GATED_RATIO
        patient.held.start_clipping(replace(patient.training, history=History()), max_ratio=ratio)


def _is_plain_recurrence(patient: Patient, layers: Sequence[str]) -> bool:
    """Whether recurrences without gates were drawn anew: what a step changes counts once for each time step there."""
    modules = [module_named(patient.training.model, name) for name in layers]
    return patient.finding.cause == "recurrence" and not any(isinstance(module, GATED) for module in modules)


def _recycle(patient: Patient) -> Treatment | None:
    with patient.training.whole() as training:
        done = recycle(training, patient.finding)
    return Treatment(done.layers, done.before, done.after) if done is not None else None


def _scale_inputs(patient: Patient) -> Treatment | None:
    """Unscaled inputs hide what else is wrong: what is far off any usual size on scaled ones is drawn anew with it."""
    keeps = inputs_jumped(patient.training.history)
    if keeps and not patient.has_past:  # a batch that stands out is no measure of those to come
        return None
    if patient.has_past and not keeps and (patient.finding.kind, patient.finding.cause) != UNTOUCHED:
        return None
    with patient.training.whole() as whole:
        # what is rehearsed is whole; what is folded, and trains from then on, are the parts
        training = replace(patient.training, rehearse=whole.rehearse, averaged=whole.averaged)
        drawn: list[Reinit] = []
        draws = "reinit" in patient.allow and not keeps and whole is patient.training

        def draw(rehearse: Rehearsal, _layers: Collection[str]) -> bool:
            scaled = replace(training, rehearse=rehearse)
            far = reinitialise(scaled, patient.finding, only_far=True)
            # where one is far off, the others were drawn as badly
            rest = reinitialise(scaled, patient.finding) if far is not None else None
            drawn.extend(anew for anew in (far, rest) if anew is not None)
            # beside a loss that is all of targets nobody could see what scaled inputs are worth
            with suppress(RehearsalError):
                fitted = fit_targets(scaled) if not any(anew.targets for anew in drawn) else None
                drawn.extend([fitted] if fitted is not None else [])
            return True

        done = patient.held.scaling.start(training, keep_function=keeps, before_fold=draw if draws else None)
    if done is None:
        return None
    for anew in drawn:
        patient.held.centre(anew.centres)
        if anew.targets is not None:
            patient.held.scale_outputs(anew.targets)
        _clip_new(patient, anew.layers)
    before, after = slow_down_anew(patient) if not keeps else ({}, {})
    names = dict.fromkeys(name for anew in drawn for name in anew.layers)
    note = f"drawn anew as well: {', '.join(names)}" if names else ""
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after}, note)


def _rollback(patient: Patient) -> Treatment | None:
    """The weights have been put back already; what is left is to go on more slowly, where the rate is to blame."""
    changed = slow_down(patient)
    if changed is None:
        return None
    note = "gradients are clipped, and the rate stays as it is" if MAX_RATIO in changed[1] else ""
    # a run that went well and broke: what broke it may have been a batch, and come again
    went_back = patient.has_past and patient.good_step < patient.training.history.rows[-1].step
    if went_back and patient.held.clipper is None and "clip" in patient.allow:
        patient.held.start_clipping(patient.training, until=patient.good_step)
        note = "from now on gradients are clipped to what was usual, and steps that are not finite are left out"
    return Treatment(before=changed[0], after=changed[1], note=note)


_TREATMENTS: dict[str, Callable[[Patient], Treatment | None]] = {
    "clip": _clip,
    "reinit": _reinit,
    "recycle": _recycle,
    "rollback": _rollback,
    "scale_inputs": _scale_inputs,
}
