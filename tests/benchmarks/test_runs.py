"""A run that is judged from its record is judged as it was while it trained.

Findings are compared as text: their evidence may hold NaN, which differs from itself.
"""

from dataclasses import replace

import numpy as np
import pytest

from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.history import History
from tests.benchmarks import runs
from tests.benchmarks.limits import Limit, Remembered, try_limits
from tests.benchmarks.verdicts import verdict
from tests.benchmarks.zoo.case import Case, seeded
from tests.benchmarks.zoo.data import digits
from tests.benchmarks.zoo.task import Task


@pytest.fixture(scope="module", params=["sigmoid_10", "thawing", "lstm_rows"])
def run(request):
    return runs.train(request.param, 0)


def test_a_replay_finds_what_was_found_in_the_training(run):
    assert repr(runs.replay(run.history, runs.default_detectors(), explains=run.explains)) == repr(run.findings)


def test_no_part_of_the_monitor_failed(run):
    assert (run.crash, run.faults) == ("", ())


def test_a_finding_is_told_when_it_was_found_or_at_the_end(run):
    for finding, step in zip(run.findings, run.told, strict=True):
        assert step == finding.step or step == run.steps - 1


def test_a_run_comes_back_from_its_file(run, tmp_path):
    runs.save(run, tmp_path)
    again = runs.load(run.case, run.seed, tmp_path)
    assert (again.case, again.seed, again.told) == (run.case, run.seed, run.told)
    assert repr(again.findings) == repr(run.findings)
    np.testing.assert_array_equal(again.record.norm, run.record.norm)
    assert repr(runs.rejudged(again, runs.default_detectors()).findings) == repr(run.findings)


def test_a_detector_that_remembers_answers_as_the_detector_itself(run):
    remembered = [Remembered(detector) for detector in runs.default_detectors()]
    for _ in range(2):
        for one in remembered:
            one.rewind()
        assert repr(runs.replay(run.history, remembered, explains=run.explains)) == repr(run.findings)


def test_a_limit_is_tried_as_if_it_were_the_default(run):
    limit = Limit(LossPlateau, "window", (40, 60))
    tried = try_limits(run, [limit])[limit.name]
    assert set(tried) == {40, 60, limit.default}
    for value, one in tried.items():
        plain = [replace(d, window=value) if isinstance(d, LossPlateau) else d for d in runs.default_detectors()]
        alarms = runs.rejudged(run, plain).alarms
        judged = verdict(runs.CASES[run.case], run.seed, run.steps, alarms, runs.EVERY_N_STEPS)
        assert one.is_right == (judged.outcome in ("right", "silent"))


def test_what_was_told_before_a_training_died_counts(monkeypatch):
    class Dies(Task):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    monkeypatch.setitem(
        runs.CASES, "dies", Case("dies", seeded(lambda: Dies(runs.CASES["sigmoid_10"].build(0).net)), digits, 20)
    )
    run = runs.train("dies", 0)
    assert run.crash == "RuntimeError: out of luck"
    assert run.steps == 3
    assert [str(finding.kind) for finding in run.findings] == ["vanishing_gradient"]
    assert repr(runs.replay(run.history, runs.default_detectors(), explains=run.explains)) == repr(run.findings)


def test_nothing_is_found_in_an_empty_history():
    assert runs.replay(History().state_dict(), runs.default_detectors()) == ()
