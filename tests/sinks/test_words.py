from dataclasses import replace

import numpy as np
import pytest

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Row
from lightning_gradflow.sinks import summary
from lightning_gradflow.sinks.base import scalars
from lightning_gradflow.sinks.report import page
from lightning_gradflow.sinks.words import effective_depth, shown, verdict
from tests import made_up

PLATEAU, DEAD = FindingKind.LOSS_PLATEAU, FindingKind.DEAD_UNITS


def test_a_finding_that_went_over_into_a_worse_one_is_shown_once():
    early = Finding(PLATEAU, Severity.INFO, step=10, resolved_step=40)
    late = Finding(PLATEAU, Severity.WARNING, step=40)
    assert shown([early, late]) == [late]


def test_a_finding_that_was_over_is_shown_beside_a_later_one():
    early = Finding(PLATEAU, Severity.WARNING, step=10, resolved_step=30)
    late = Finding(PLATEAU, Severity.WARNING, step=40)
    assert shown([early, late]) == [late, early]


def test_findings_of_other_kinds_hide_nothing():
    early = Finding(PLATEAU, Severity.INFO, step=10, resolved_step=40)
    other = Finding(DEAD, Severity.INFO, step=40)
    assert shown([early, other]) == [other, early]


@pytest.mark.parametrize(
    ("resolved_step", "said"),
    [(None, "half of the units are dead."), (50, "No sign of trouble in the gradients any more")],
)
def test_what_an_alarm_has_become_is_no_all_clear(resolved_step, said):
    alarm = Finding(DEAD, Severity.WARNING, step=10, resolved_step=40)
    left = Finding(
        DEAD, Severity.INFO, 40, resolved_step=resolved_step, message="half of the units are dead. So it is."
    )
    other = Finding(PLATEAU, Severity.INFO, step=40, message="the loss stands still.")
    assert verdict(replace(made_up.view(), findings=(alarm, left, other))).startswith(said)


def test_the_effective_depth_is_said_wherever_a_run_is_shown():
    view = made_up.view()  # a decade at each of seven points: the last two of four layers get a thousandth or more
    said = "Effective depth: 2 of 4 layers get a thousandth of the last layer's signal or more."
    assert effective_depth(view) == said
    assert said in " ".join(summary(view).split())
    assert said.replace("'", "&#x27;") in page(view, figures=False)
    assert scalars(view.history)["gradflow/effective_depth"] == 2


def test_without_a_signal_nothing_is_said_of_it():
    shown = History()
    shown.append(Row(0, scalars={"loss": 2.3}))
    assert effective_depth(made_up.view(shown)) == ""
    assert "gradflow/effective_depth" not in scalars(shown)


def test_a_sample_without_signal_does_not_hide_the_one_before():
    shown = made_up.history(rows=2)
    shown.append(Row(20, {"grad_norm": np.ones(4)}))
    assert effective_depth(made_up.view(shown)).startswith("Effective depth: 2 of 4 layers")
