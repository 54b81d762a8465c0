"""What each remedy does to a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.history import History
from lightning_gradflow.probes.layers import module_named
from lightning_gradflow.remedies.patient import Patient, Treatment
from lightning_gradflow.remedies.plan import UNTOUCHED
from lightning_gradflow.remedies.readers import centres_behind
from lightning_gradflow.remedies.recurrent import GATED
from lightning_gradflow.remedies.recycle import recycle
from lightning_gradflow.remedies.reinit import Reinit, reinitialise
from lightning_gradflow.remedies.slowing import USUAL_RATIO, slow_down, slow_down_anew
from lightning_gradflow.remedies.training import Rehearsal, RehearsalError

_MAX_RATIO = 0.03  # the same at most, for weights that were just drawn: gated recurrences take larger steps


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
    with patient.training.whole() as training:
        done = reinitialise(training, finding, only_far=finding.cause in ("learning_rate_too_large", "drift"))
        behind = centres_behind(training, done.layers) if done is not None and finding.cause == "recurrence" else {}
    if done is None:
        return None
    patient.held.centre({**behind, **done.centres})
    _clip_new(patient, done.layers)
    before, after = slow_down_anew(patient)
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after})


def _clip_new(patient: Patient, layers: Sequence[str]) -> None:
    """Clips the gradients of weights that were just drawn: the learning rate was not chosen for them."""
    if patient.held.clipper is not None:
        patient.held.clipper.restart()
    elif "clip" in patient.allow:
        # while nothing is known of their gradients, only the size of the steps says what is too much
        ratio = USUAL_RATIO if _is_plain_recurrence(patient, layers) else _MAX_RATIO
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
    keeps = patient.has_past and inputs_jumped(patient.training.history)
    if patient.has_past and not keeps and (patient.finding.kind, patient.finding.cause) != UNTOUCHED:
        return None
    with patient.training.whole() as whole:
        # what is rehearsed is whole; what is folded, and trains from then on, are the parts
        training = replace(patient.training, rehearse=whole.rehearse, averaged=whole.averaged)
        drawn: list[Reinit] = []
        draws = "reinit" in patient.allow and not keeps and whole is patient.training

        def draw(rehearse: Rehearsal) -> None:
            scaled = replace(training, rehearse=rehearse)
            far = reinitialise(scaled, patient.finding, only_far=True)
            # where one is far off, the others were drawn as badly
            rest = reinitialise(scaled, patient.finding) if far is not None else None
            drawn.extend(anew for anew in (far, rest) if anew is not None)

        done = patient.held.scaling.start(training, keep_function=keeps, before_fold=draw if draws else None)
    if done is None:
        return None
    for anew in drawn:
        patient.held.centre(anew.centres)
        _clip_new(patient, anew.layers)
    before, after = slow_down_anew(patient) if not keeps else ({}, {})
    names = dict.fromkeys(name for anew in drawn for name in anew.layers)
    note = f"drawn anew as well: {', '.join(names)}" if names else ""
    return Treatment(done.layers, {**done.before, **before}, {**done.after, **after}, note)


def _rollback(patient: Patient) -> Treatment | None:
    """The weights have been put back already; what is left is to go on more slowly, where the rate is to blame."""
    changed = slow_down(patient)
    return Treatment(before=changed[0], after=changed[1]) if changed is not None else None


_TREATMENTS: dict[str, Callable[[Patient], Treatment | None]] = {
    "clip": _clip,
    "reinit": _reinit,
    "recycle": _recycle,
    "rollback": _rollback,
    "scale_inputs": _scale_inputs,
}
