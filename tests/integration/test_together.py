"""Each callback alone, any set of them side by side, and GradFlow find the same."""

import itertools
import warnings
from dataclasses import replace

import pytest

from lightning_gradflow import AutoMitigator, FindingKind, GradFlow, GradNormLogger, PlateauDetector, SaturationMonitor
from tests.benchmarks.zoo import HEALTHY, SICK, quiet_trainer

KINDS = {
    GradNormLogger: {
        FindingKind.VANISHING_GRADIENT,
        FindingKind.EXPLODING_GRADIENT,
        FindingKind.NONFINITE_GRADIENT,
        FindingKind.NO_GRADIENT,
        FindingKind.UPDATE_RATIO,
    },
    SaturationMonitor: {FindingKind.DEAD_UNITS, FindingKind.SATURATED_ACTIVATION},
    PlateauDetector: {FindingKind.LOSS_PLATEAU, FindingKind.LOSS_MISMATCH, FindingKind.MIXED_SAMPLES},
    AutoMitigator: set(),
}
SETS = [kinds for n in (1, 2, 3, 4) for kinds in itertools.combinations(KINDS, n)]


def _findings(callbacks, case="relu_24_default_init", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SICK[case].fit(0, callbacks=callbacks, max_steps=330, **kwargs)
    return callbacks[0].findings


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        return _findings([GradFlow(report=False, console=False)])


def test_the_run_has_something_for_each_kind_of_monitor(whole):
    kinds = {finding.kind for finding in whole}
    assert all(kinds & mine for mine in KINDS.values() if mine)


@pytest.mark.parametrize("classes", SETS, ids=lambda classes: "+".join(kind.__name__ for kind in classes))
def test_a_set_of_callbacks_finds_what_gradflow_finds_of_its_kinds(whole, classes):
    mine = set().union(*(KINDS[kind] for kind in classes)) or set(FindingKind)  # the mitigator alone finds everything
    expected = [finding for finding in whole if finding.kind in mine]
    callbacks = [kind() for kind in classes]
    found = list(_findings(callbacks))
    if GradNormLogger not in classes and found[0].kind in mine - KINDS[GradNormLogger]:
        # what is info there because it follows from something else is an alarm where nobody looks for that
        found = [replace(finding, severity=other.severity) for finding, other in zip(found, expected, strict=True)]
    assert found == expected
    assert all(callback.findings == callbacks[0].findings for callback in callbacks)


def test_what_follows_from_a_fault_is_an_alarm_where_nobody_looks_for_the_fault(whole):
    def severity(findings):
        return {str(f.severity) for f in findings if f.kind is FindingKind.LOSS_PLATEAU}

    assert severity(whole) == {"info"}
    assert severity(_findings([PlateauDetector()])) == {"warning"}


def test_the_order_of_the_callbacks_does_not_matter(whole):
    assert _findings([AutoMitigator(), PlateauDetector(), SaturationMonitor(), GradNormLogger()]) == whole


def test_a_set_without_mitigator_gives_no_suggestions(whole):
    assert all(finding.suggestions for finding in whole)
    assert all(not finding.suggestions for finding in _findings([GradNormLogger()]))


def test_callbacks_side_by_side_share_one_history():
    callbacks = [GradNormLogger(), SaturationMonitor()]
    HEALTHY["relu_mlp"].fit(0, callbacks=callbacks)
    assert callbacks[0].history is callbacks[1].history


def test_gradflow_beside_a_part_of_it_is_refused():
    with pytest.raises(ValueError, match=r"callbacks must hold each monitor once .* got .*GradNormLogger"):
        HEALTHY["relu_mlp"].fit(0, callbacks=[GradFlow(), GradNormLogger()])


def test_two_gradflows_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradFlow`"):
        quiet_trainer(callbacks=[GradFlow(), GradFlow()])


def test_the_smallest_interval_of_a_set_counts():
    monitors = [GradNormLogger(every_n_steps=30), SaturationMonitor(every_n_steps=10)]
    HEALTHY["relu_mlp"].fit(0, callbacks=monitors, max_steps=31)
    assert monitors[0].history.steps.tolist() == [0, 1, 2, 4, 8, 10, 20, 30]


def test_the_interval_is_that_of_the_logger_unless_it_is_given():
    flow = GradFlow(report=False, console=False)
    HEALTHY["relu_mlp"].fit(0, callbacks=[flow], max_steps=41, log_every_n_steps=20)
    assert flow.history.steps.tolist() == [0, 1, 2, 4, 8, 16, 20, 40]


def test_the_window_of_the_saturation_monitor_counts_beside_the_others():
    flow = GradFlow(every_n_steps=1, saturation=SaturationMonitor(window=7), report=False, console=False)
    HEALTHY["relu_mlp"].fit(0, callbacks=[flow], max_steps=10)
    known = [row.step for row in flow.history.rows if not all(v != v for v in row.values["dead_fraction"])]
    assert known[0] == 6  # the seventh sample
