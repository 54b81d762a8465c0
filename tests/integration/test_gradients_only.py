"""Gradients at every step and all else now and then: what is read when, what is judged, and that nothing is lost."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.modules import module as module_hooks

from lightning_gradflow import FindingKind, GradFlow, GradNormLogger, SaturationMonitor
from tests.integration.traces import Tiny, Validated, data, fit, flow, process_traces

STEPS = 55
WHOLE = [0, 1, 2, 4, 8, 16, 32, 50]
SIZE = {"grad_norm", "grad_rms", "grad_nonfinite_fraction", "grad_missing_fraction"}


def _fit(*monitors, model=None, steps=STEPS, **kwargs):
    model = model or Tiny()
    fit(list(monitors), model, train=data(steps), max_epochs=-1, max_steps=steps, **kwargs)
    return model


def _whole_steps(monitor):
    return [row.step for row in monitor.history.rows if not row.gradients_only]


@pytest.fixture(scope="module")
def pair():
    """The gradients at every step, and everything at every step, of the same run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        alone, everything = GradNormLogger(every_n_steps=1), flow(every_n_steps=1)
        _fit(alone)
        _fit(everything)
    return alone.history, everything.history


def test_each_step_is_a_row_and_some_of_them_hold_everything(pair):
    alone, _ = pair
    assert alone.steps.tolist() == list(range(STEPS))
    assert [row.step for row in alone.rows if not row.gradients_only] == WHOLE


def test_the_gradients_are_those_that_a_whole_sample_reads(pair):
    alone, everything = pair
    for metric in SIZE:
        np.testing.assert_array_equal(alone[metric], everything[metric])
    np.testing.assert_array_equal(alone.scalar("grad_norm_total"), everything.scalar("grad_norm_total"))


def test_a_row_of_gradients_alone_holds_nothing_else(pair):
    alone, _ = pair
    rows = [row for row in alone.rows if row.gradients_only]
    assert all(set(row.values) <= SIZE and not row.histograms and not row.calls for row in rows)


def test_rows_that_hold_everything_are_those_of_any_other_run(pair):
    alone, everything = pair
    at = np.isin(everything.steps, WHOLE)
    for metric in ("delta_norm", "output_rms", "update_ratio", "weight_norm", "grad_mean_abs"):
        np.testing.assert_array_equal(alone[metric][at], everything[metric][at])
        assert np.isnan(alone[metric][~at]).all()


def test_no_loss_is_missing(pair):
    alone, everything = pair
    np.testing.assert_array_equal(alone.losses, everything.losses)
    np.testing.assert_array_equal(alone.loss_steps, everything.loss_steps)


def test_between_whole_samples_the_forward_pass_is_left_alone():
    watched = []

    class Looks(Tiny):
        def training_step(self, batch, batch_idx):
            watched.append(bool(module_hooks._global_forward_hooks))
            return super().training_step(batch, batch_idx)

    _fit(GradNormLogger(every_n_steps=1), model=Looks())
    assert [step for step, is_watched in enumerate(watched) if is_watched] == WHOLE
    assert process_traces() == []


def test_the_weights_are_those_of_a_run_without_it():
    plain, watched = _fit(), _fit(GradNormLogger(every_n_steps=1))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


@pytest.mark.parametrize(
    ("monitors", "often", "whole"),
    [
        (lambda: [GradNormLogger(5)], 5, 50),
        (lambda: [GradNormLogger(7)], 7, 56),
        (lambda: [GradNormLogger(52)], 52, 52),
        (lambda: [GradNormLogger(5, signal_every_n_steps=10)], 5, 10),
        (lambda: [GradNormLogger(signal_every_n_steps=10)], 10, 10),
        (lambda: [GradNormLogger(5), SaturationMonitor()], 5, 50),
        (lambda: [GradNormLogger(5), SaturationMonitor(10)], 5, 10),
        (lambda: [GradNormLogger(10), SaturationMonitor(5)], 5, 5),
        (lambda: [flow(every_n_steps=15, gradients=GradNormLogger(5))], 5, 15),
        (lambda: [flow(every_n_steps=None, gradients=GradNormLogger(5))], 5, 50),
    ],
)
def test_who_asks_for_more_gets_it(monitors, often, whole):
    made = monitors()
    _fit(*made)
    early = {step for step in (0, 1, 2, 4, 8, 16, 32) if step < whole}
    assert made[0].history.steps.tolist() == sorted(early | set(range(0, STEPS, often)))
    assert _whole_steps(made[0]) == sorted(early | set(range(0, STEPS, whole)))


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_an_interval_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"signal_every_n_steps must be a whole number in \[1, inf\)"):
        GradNormLogger(signal_every_n_steps=value)


def test_findings_come_from_whole_samples():
    class Vanishing(Tiny):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(*[m for _ in range(9) for m in (torch.nn.Linear(4, 4), torch.nn.Sigmoid())])
            self.net.append(torch.nn.Linear(4, 1))

    often, seldom = GradNormLogger(1), GradNormLogger(50)
    for monitor in (often, seldom):
        with pytest.warns(match="vanish"):
            _fit(monitor, model=Vanishing())
    assert often.findings == seldom.findings
    assert FindingKind.VANISHING_GRADIENT in {finding.kind for finding in often.findings}


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_a_gradient_that_is_not_finite_is_told_at_its_own_step():
    class Breaks(Tiny):
        def on_before_zero_grad(self, optimizer):
            pass

        def on_after_backward(self):
            if self.global_step == 13:
                self.net[0].weight.grad[0, 0] = math.nan

    monitor = GradNormLogger(1)
    _fit(monitor, model=Breaks(), steps=15)
    assert [f.step for f in monitor.findings if f.kind is FindingKind.NONFINITE_GRADIENT] == [13]


def test_a_logger_gets_a_line_at_every_step(tmp_path):
    logger = CSVLogger(tmp_path)
    _fit(GradNormLogger(1), logger=logger)
    with Path(logger.log_dir, "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows if row["gradflow/grad_norm_total"]] == list(range(STEPS))
    assert [int(row["step"]) for row in rows if row["gradflow/delta_span"]] == WHOLE


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulated_steps_have_one_row_each(accumulate):
    monitor = GradNormLogger(1)
    fit([monitor], train=data(12), max_epochs=3, accumulate_grad_batches=accumulate)
    assert monitor.history.steps.tolist() == list(range(36 // accumulate))


def test_manual_optimization_has_a_row_for_each_step():
    class Manual(Tiny):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    monitor = GradNormLogger(1)
    _fit(monitor, model=Manual(), steps=24)
    assert monitor.history.steps.tolist() == list(range(24))
    assert _whole_steps(monitor) == [0, 1, 2, 4, 8, 16]
    assert np.isfinite(monitor.history.scalar("grad_norm_total")).all()


def test_what_is_shown_in_the_end_is_of_whole_samples(tmp_path):
    often = GradFlow(every_n_steps=20, gradients=GradNormLogger(1), console=False)
    seldom = GradFlow(every_n_steps=20, console=False)
    _fit(often, default_root_dir=tmp_path / "often")
    _fit(seldom, default_root_dir=tmp_path / "seldom")
    assert len(often.history) == STEPS
    assert often.summary() == seldom.summary()


@pytest.mark.parametrize(
    ("make", "missing", "whole"),
    [
        (lambda: flow(every_n_steps=10), (8, 20), [0, 1, 2, 4, 9, 10, 21, 30]),
        (lambda: flow(every_n_steps=10), (10, 20), [0, 1, 2, 4, 8, 11, 21, 30]),
        (lambda: flow(every_n_steps=10), (1, 2), [0, 3, 4, 8, 10, 20, 30]),
        (lambda: GradNormLogger(10, signal_every_n_steps=20), (8, 20), [0, 1, 2, 4, 9, 16, 21]),
        (lambda: GradNormLogger(10, signal_every_n_steps=20), (10, 20), [0, 1, 2, 4, 8, 16, 21]),
    ],
)
def test_a_whole_sample_that_got_no_gradient_is_taken_at_the_next_step(make, missing, whole):
    class Skips(Tiny):
        calls = -1

        def training_step(self, batch, batch_idx):
            self.calls += 1
            loss = super().training_step(batch, batch_idx)
            return None if self.calls in missing else loss

    monitor = make()
    with pytest.warns():
        _fit(monitor, model=Skips(), steps=34)
    assert _whole_steps(monitor) == whole
    if isinstance(monitor, GradFlow):
        assert monitor.history.steps.tolist() == whole


def test_the_share_of_clipped_steps_is_taken_over_whole_samples():
    often, seldom = GradNormLogger(1, signal_every_n_steps=5), GradNormLogger(5)
    _fit(often, gradient_clip_val=0.5, steps=40)
    _fit(seldom, signal := SaturationMonitor(5), gradient_clip_val=0.5, steps=40)
    assert signal.history is seldom.history
    at = [row for row in often.history.rows if not row.gradients_only]
    shares = [row.scalars["clipped_fraction"] for row in at]
    assert shares == [row.scalars["clipped_fraction"] for row in seldom.history.rows]
    assert len(set(shares)) > 1


def test_a_validation_loss_comes_with_the_next_whole_sample():
    often, seldom = GradNormLogger(1, signal_every_n_steps=8), flow(every_n_steps=8)
    for monitor in (often, seldom):
        fit([monitor], Validated(), train=data(40), val=data(2), max_epochs=1, val_check_interval=3)
    whole = [row.step for row in often.history.rows if not row.gradients_only]
    judged = often._session.recorder.judged
    np.testing.assert_array_equal(judged.scalar("val_loss"), seldom.history.scalar("val_loss"))
    assert judged.steps.tolist() == whole == seldom.history.steps.tolist()
    assert np.isfinite(judged.scalar("val_loss")).sum() >= 4


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_weights_that_become_infinite_are_no_trouble():
    class Diverges(Tiny):
        def on_before_zero_grad(self, optimizer):
            if self.global_step == 5:
                with torch.no_grad():
                    self.net[0].weight.fill_(math.inf)

    monitor = flow()
    _fit(monitor, model=Diverges(), steps=9)
    assert monitor.history.steps.tolist() == list(range(9))
    assert np.isinf(monitor.history["weight_norm"][-1]).any()
