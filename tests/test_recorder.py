import io
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_gradflow import advice
from lightning_gradflow.border import RAISE_VARIABLE, Border
from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.findings import (
    WARNINGS,
    Action,
    Finding,
    FindingKind,
    GradFlowWarning,
    Severity,
    VanishingGradientWarning,
)
from lightning_gradflow.history import Point, Row
from lightning_gradflow.recorder import Recorder
from lightning_gradflow.sinks.base import Sink

INFO, WARNING, CRITICAL = Severity.INFO, Severity.WARNING, Severity.CRITICAL
LAYERS = ["net.0", "net.2", "net.4", "net.6", "net.8"]


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.delenv(RAISE_VARIABLE)


@dataclass(frozen=True)
class Says:
    """A detector that says the same at every row."""

    kind: FindingKind = FindingKind.VANISHING_GRADIENT
    severity: Severity = WARNING

    def judge(self, history):
        return [Finding(self.kind, self.severity, history.rows[-1].step, ("net.0",))]


class Fails:
    """A detector that raises."""

    def judge(self, history):
        raise RuntimeError("no verdict")


class FailsToo(Fails):
    """Another one."""


class Keeps(Sink):
    """A sink that keeps what it is shown, and raises in one of its methods if told so."""

    def __init__(self, name="keeps", fails_in=None):
        self.name = name
        self.seen = []
        self._fails_in = fails_in

    def _take(self, hook, what):
        self.seen.append((hook, what))
        if hook == self._fails_in:
            raise OSError("disk full")

    def on_row(self, view):
        self._take("row", view.step)

    def on_finding(self, finding, view):
        self._take("finding", finding.kind.value)

    def on_end(self, view):
        self._take("end", view.step)


def recorder(*detectors, sinks=(), **how):
    made = Recorder(detectors, Border(), **how)
    made.history.layer_axis.merge(LAYERS)
    made.history.add_points([Point(name, name) for name in LAYERS])
    made.sinks = list(sinks)
    return made


def row(step, decades=0.0):
    return Row(step, {"delta_norm": np.logspace(-decades, 0, len(LAYERS))})


def run(made, steps):
    """Healthy steps, each the end of a fit."""
    for step in range(steps):
        made.add(row(step), step=step)
        made.end()


def warned(made, rows):
    """The categories of what is warned of while rows are added."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for one in rows:
            made.add(one, step=one.step)
    return [warning.category for warning in told]


# -- rows and findings


def test_a_row_goes_into_the_history():
    made = recorder()
    made.add(row(4), step=5, progress=0.5)
    assert made.history.steps.tolist() == [4]
    assert (made.view.step, made.view.progress) == (5, 0.5)


def test_what_a_real_detector_finds_is_opened_explained_and_given_advice():
    made = recorder(VanishingGradient())
    with pytest.warns(VanishingGradientWarning):
        (opened,) = made.add(row(0, decades=9), step=0)
    assert made.findings == (opened,)
    assert opened.message == advice.explain(opened) != ""
    assert opened.suggestions == advice.suggest(opened, made.history) != ()


def test_without_suggestions_the_finding_is_the_same():
    with_them, without = recorder(VanishingGradient()), recorder(VanishingGradient(), suggest=False)
    for made in (with_them, without):
        with pytest.warns(VanishingGradientWarning):
            made.add(row(0, decades=9), step=0)
    assert with_them.findings == without.findings
    assert without.findings[0].suggestions == ()


def test_a_finding_is_resolved_when_the_rows_are_healthy_again():
    made = recorder(VanishingGradient())
    warned(made, [row(0, 9), row(1), row(2), row(3)])
    assert made.findings[0].resolved_step == 3


# -- sinks


def test_a_sink_sees_each_row_and_each_opened_finding_and_the_end_once():
    sink = Keeps()
    made = recorder(Says(severity=INFO), sinks=[sink])
    made.add(row(0), step=0)
    made.add(row(1), step=1)
    made.end()
    made.end()
    assert sink.seen == [("row", 0), ("finding", "vanishing_gradient"), ("row", 1), ("end", 1)]


def test_the_end_of_a_run_without_rows_is_not_shown():
    sink = Keeps()
    recorder(sinks=[sink]).end()
    assert sink.seen == []


def test_a_second_fit_has_an_end_of_its_own():
    sink = Keeps()
    made = recorder(sinks=[sink])
    for step in (0, 1):
        made.add(row(step), step=step)
        made.end()
    assert [hook for hook, _ in sink.seen] == ["row", "end", "row", "end"]


@pytest.mark.parametrize("hook", ["row", "finding", "end"])
def test_a_sink_that_raises_is_switched_off_with_one_warning(hook):
    sink = Keeps("broken", fails_in=hook)
    made = recorder(Says(severity=INFO), sinks=[sink])
    with pytest.warns(GradFlowWarning, match=r"output to broken is switched off \(OSError: disk full\)") as told:
        run(made, steps=3)
    assert len(told) == 1
    assert sink.seen[-1][0] == hook


@pytest.mark.parametrize("name", ["other", "broken"])
def test_the_other_sinks_go_on_even_namesakes(name):
    broken, other = Keeps("broken", fails_in="row"), Keeps(name)
    made = recorder(sinks=[broken, other])
    with pytest.warns(GradFlowWarning):
        made.add(row(0), step=0)
    made.add(row(1), step=1)
    assert [len(broken.seen), len(other.seen)] == [1, 2]


# -- detectors that raise


def test_a_detector_that_raises_is_switched_off_with_one_warning():
    made = recorder(Fails())
    with pytest.warns(GradFlowWarning, match=r"detector Fails is switched off \(RuntimeError: no verdict\)") as told:
        run(made, steps=3)
    assert len(told) == 1


def test_the_other_detectors_go_on():
    made = recorder(Fails(), Says(severity=INFO), FailsToo())
    with pytest.warns(GradFlowWarning) as told:
        opened = made.add(row(0), step=0)
    assert [finding.kind for finding in opened] == ["vanishing_gradient"]
    assert len(told) == 2


def test_advice_that_fails_leaves_the_finding(monkeypatch):
    monkeypatch.setattr(advice, "suggest", Fails().judge)
    made = recorder(Says(severity=INFO))
    with pytest.warns(GradFlowWarning, match="advice is switched off"):
        (opened,) = made.add(row(0), step=0)
    assert opened.message
    assert opened.suggestions == ()


# -- warnings


@pytest.mark.parametrize("kind", FindingKind)
@pytest.mark.parametrize("severity", [WARNING, CRITICAL])
def test_an_alarm_is_warned_of_once_in_its_category(kind, severity):
    assert warned(recorder(Says(kind, severity)), [row(step) for step in range(5)]) == [WARNINGS[kind]]


@pytest.mark.parametrize("kind", FindingKind)
def test_info_is_never_warned_of(kind):
    assert warned(recorder(Says(kind, INFO)), [row(step) for step in range(5)]) == []


def test_a_recorder_that_does_not_tell_warns_of_nothing():
    made = recorder(Says())
    made.tells = False
    assert warned(made, [row(0)]) == []
    assert made.findings


def test_the_warning_says_where_what_and_what_to_do():
    made = recorder(VanishingGradient())
    with pytest.warns(VanishingGradientWarning) as told:
        (opened,) = made.add(row(7, decades=9), step=7)
    assert str(told[0].message) == f"step 7: {opened.message} What to do: {opened.suggestions[0].title}."


def test_at_most_twenty_warnings_are_raised_in_a_run():
    made = recorder(VanishingGradient())
    sick_and_well = [row(step, decades=9.0 if step % 8 < 4 else 0.0) for step in range(8 * 30)]
    assert warned(made, sick_and_well) == [VanishingGradientWarning] * 20
    assert len(made.findings) == 30


def test_a_filter_that_makes_the_warning_an_error_ends_the_run():
    made = recorder(VanishingGradient(), sinks=[sink := Keeps()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=VanishingGradientWarning)
        with pytest.raises(VanishingGradientWarning):
            made.add(row(0, decades=9), step=0)
    assert ("finding", "vanishing_gradient") in sink.seen


# -- state


def test_a_loaded_recorder_goes_on_as_the_one_that_was_saved():
    saved, loaded = recorder(VanishingGradient()), Recorder([VanishingGradient()], Border())
    assert warned(saved, [row(0, 9), row(1, 9)]) == [VanishingGradientWarning]
    saved.actions = [Action(1, "reinit", ("net.0",))]
    file = io.BytesIO()
    torch.save(to_checkpoint(saved.state_dict()), file)
    file.seek(0)
    loaded.load_state_dict(from_checkpoint(torch.load(file, weights_only=True)))
    assert warned(loaded, [row(2, 9)]) == []  # what lasts was told before
    warned(saved, [row(2, 9)])
    assert loaded.findings == saved.findings
    assert loaded.actions == saved.actions
    assert loaded.history.steps.tolist() == [0, 1, 2]
