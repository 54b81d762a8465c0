"""A real offline run of W&B, read back from its file."""

import warnings
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import SICK
from tests.wandb_reader import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(variable, str(folder / "home"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        warnings.simplefilter("ignore")
        logger = WandbLogger(project="test", save_dir=folder, mode="offline")
        flow = GradFlow(every_n_steps=10, console=False)
        SICK["sigmoid_10"].fit(0, callbacks=[flow], logger=logger, max_steps=60, default_root_dir=folder)
        written = Path(logger.experiment.dir).parent
        wandb.finish()
        yield read_run(written), flow


def test_the_heatmap_of_a_short_fit_comes_at_its_end(run):
    (row,) = run[0].rows_with("gradflow/heatmap")
    assert row["trainer/global_step"] >= 50
    assert row["gradflow/heatmap"]["_type"] == "image-file"


def test_each_flush_has_the_layers_as_a_histogram(run):
    rows = run[0].rows_with("gradflow/layers")
    sampled = [0, 1, 2, 4, 8, 10, 20, 30, 40, 50]
    assert [row["trainer/global_step"] for row in rows] == sampled
    assert len(rows[0]["gradflow/layers"]["values"]) == 11


def test_the_scalars_are_those_of_the_history(run):
    offline, flow = run
    totals = [row["gradflow/grad_norm_total"] for row in offline.rows_with("gradflow/grad_norm_total")]
    known = flow.history.scalar("grad_norm_total")
    assert totals == pytest.approx(known[known == known])


def test_the_vanishing_gradient_is_an_alert(run):
    assert any("Vanishing gradient" in alert[0] for alert in run[0].alerts)


def test_the_findings_are_a_table_at_the_end(run):
    assert run[0].rows_with("gradflow/findings")


def test_there_are_at_most_25_keys_with_one_slash_each(run):
    keys = [key for key in run[0].keys if key.startswith("gradflow/")]
    assert 5 <= len(keys) <= 25
    assert all(key.count("/") == 1 and "." not in key for key in keys)


def test_the_report_lies_in_the_folder_of_the_run(run):
    assert run[1].report_path.is_file()
    assert run[1].report_path.parent.parent.name == "test"
