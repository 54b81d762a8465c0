"""Real runs with TensorBoard, CSV, both, and none."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import HEALTHY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loggers")
    loggers = [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="csv")]
    flow = GradFlow(every_n_steps=10, console=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        HEALTHY["tanh_4_default_init"].fit(0, callbacks=[flow], logger=loggers, max_steps=40, log_every_n_steps=10)
    events = EventAccumulator(loggers[0].log_dir, size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    with Path(loggers[1].log_dir, "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return flow, events, rows, loggers


def test_tensorboard_gets_the_heatmap_the_histograms_and_the_scalars(run):
    _, events, _, _ = run
    tags = events.Tags()
    assert "gradflow/heatmap" in tags["images"]
    assert {"gradflow/grad_hist_early", "gradflow/grad_hist_late"} <= set(tags["histograms"])
    assert "gradflow/grad_norm_total" in tags["scalars"]


def test_every_logger_gets_each_sampled_step_once(run):
    flow, events, rows, _ = run
    sampled = [row.step for row in flow.history.rows if "grad_norm" in row.values]
    assert [event.step for event in events.Scalars("gradflow/grad_norm_total")] == sampled
    assert [int(row["step"]) for row in rows if row["gradflow/grad_norm_total"]] == sampled


def test_the_values_are_those_of_the_history(run):
    flow, _, rows, _ = run
    known = [row.scalars["grad_norm_total"] for row in flow.history.rows if "grad_norm_total" in row.scalars]
    logged = [float(row["gradflow/grad_norm_total"]) for row in rows if row["gradflow/grad_norm_total"]]
    assert logged == pytest.approx(known)


def test_the_report_lies_in_the_folder_of_the_first_logger(run):
    flow, _, _, loggers = run
    assert str(flow.report_path) == f"{loggers[0].log_dir}/gradflow_report.html"


def test_no_logger_at_all_works(tmp_path):
    flow = GradFlow(console=False)
    HEALTHY["tanh_4_default_init"].fit(0, callbacks=[flow], logger=False, max_steps=5, default_root_dir=tmp_path)
    assert flow.report_path == tmp_path / "gradflow_report.html"


def test_the_summary_is_printed_at_the_end(tmp_path, capsys):
    HEALTHY["tanh_4_default_init"].fit(0, callbacks=[GradFlow(report=False)], max_steps=5, default_root_dir=tmp_path)
    assert "No sign of trouble in the gradients." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
