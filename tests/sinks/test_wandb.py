import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from lightning_gradflow.findings import FindingKind, Severity
from lightning_gradflow.metrics import HISTOGRAM_BINS
from lightning_gradflow.sinks.wandb import MAX_ALERTS, MAX_BINS, WandbSink, layer_counts
from tests import made_up
from tests.wandb_reader import read_run


@contextmanager
def offline(folder):
    """A real offline logger whose every file stays under `folder`, and a function that closes and reads its run."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    def read():
        wandb.finish()
        return read_run(folder)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            (folder / name.lower()).mkdir()
            patch.setenv(f"WANDB_{name}", str(folder / name.lower()))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        try:
            yield WandbLogger(mode="offline", save_dir=folder, project="test"), read
        finally:
            wandb.finish()


@pytest.fixture
def logger_and_read(tmp_path):
    with offline(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 rows with two alarms and one state that is often fine, read back."""
    findings = (
        made_up.finding(),
        made_up.finding(Severity.WARNING, FindingKind.LOSS_PLATEAU),
        made_up.finding(Severity.INFO, FindingKind.DEAD_UNITS),
    )
    with offline(tmp_path_factory.mktemp("wandb")) as (logger, read):
        clock = made_up.Hours()
        made_up.replay(WandbSink(logger, now=clock), rows=20, progress=clock.row, findings=findings)
        return read()


def test_a_whole_run_stands_in_the_file(run):
    rows = run.rows_with("gradflow/layers")
    assert len(rows) == 20
    assert [row["trainer/global_step"] for row in rows] == list(range(0, 200, 10))
    assert all(row["gradflow/grad_norm_max"] == 1.0 for row in rows)
    assert all(row["gradflow/delta_span"] == pytest.approx(-6.0) for row in rows)
    assert rows[0]["gradflow/layers"]["values"] == [90, 100, 110, 120]
    assert rows[0]["gradflow/layers"]["bins"] == [0, 1, 2, 3, 4]
    early = rows[0]["gradflow/grad_hist_early"]
    assert sum(early["values"]) == 500
    assert early["bins"][early["values"].index(100)] == -64 + 20
    assert len([key for key in run.keys if key.startswith("gradflow/")]) <= 25
    assert all(key.count("/") == 1 and "." not in key for key in run.keys)


def test_rows_come_one_for_each_flush_and_one_at_the_end(run):
    assert len(run.history) == 20 + 1


def test_heatmaps_are_a_few_images_of_real_pixels(run):
    images = [row["gradflow/heatmap"] for row in run.rows_with("gradflow/heatmap")]
    assert len(images) == 10  # at each tenth; the last row is the end
    pixels = np.asarray(Image.open(run.folder / "files" / images[-1]["path"]))
    assert (pixels.shape[1], pixels.shape[0]) == (images[-1]["width"], images[-1]["height"])
    assert pixels.std() > 0.1


def test_alarms_are_alerts_and_info_is_none(run):
    assert [(title, level) for title, _, level in run.alerts] == [
        ("Vanishing gradient at step 10", "ERROR"),
        ("Loss plateau at step 10", "WARN"),
    ]
    assert "Use ReLU" in run.alerts[0][1]


def test_findings_are_a_table_and_the_report_has_no_plotly(run):
    last = run.history[-1]
    assert last["gradflow/findings"]["nrows"] == 3
    html = (run.folder / "files" / last["gradflow/report"]["path"]).read_text()
    assert "The signal dies on its way to net.0." in html
    assert len(html) < 20_000


def test_config_names_the_layer_of_each_bin(run):
    assert run.config["gradflow"]["layers"] == ["net.0", "net.2", "net.4", "net.6"]
    assert run.config["gradflow"]["layers_per_bin"] == 1


def test_the_step_axis_is_defined(run):
    assert run.metrics["gradflow/*"] == "trainer/global_step"


def test_actions_are_a_table_counts_and_alerts(logger_and_read):
    logger, read = logger_and_read
    made_up.replay(WandbSink(logger), rows=5, actions=made_up.ACTIONS)
    run = read()
    last = run.history[-1]["gradflow/actions"]
    table = json.loads((run.folder / "files" / last["path"]).read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
        {
            "step": 10,
            "kind": "reinit",
            "layers": "net.0, net.2",
            "reason": "vanishing gradient, saturation",
            "numbers": "gradient from the last layer to the first x7.9e-09 -> x0.5; loss 2.31 -> 1.02",
            "outcome": "kept",
            "decided_step": 30,
        },
        {
            "step": 10,
            "kind": "clip",
            "layers": "",
            "reason": "exploding gradient",
            "numbers": "grad norm total before it 1e+09; max norm after it 2.5",
            "outcome": "taken back",
            "decided_step": 30,
        },
    ]
    counts = [row["gradflow/actions_taken"] for row in run.rows_with("gradflow/actions_taken")]
    assert (counts, len(run.history)) == ([1, 2, 2, 2], 5 + 4 + 1)
    assert run.rows_with("gradflow/actions_kept")[-1]["gradflow/actions_rolled_back"] == 1
    assert run.rows_with("gradflow/actions") == [run.history[-1]], "no key is a number here and a table there"
    assert [(title, level) for title, _, level in run.alerts] == [
        ("Action at step 10: on trial", "INFO"),
        ("Action at step 10: on trial", "INFO"),
        ("Action at step 30: kept", "INFO"),
        ("Action at step 30: taken back", "INFO"),
    ]
    assert "drew net.0 and net.2 anew" in run.alerts[0][1]


def test_a_run_without_actions_has_no_table_of_them(run):
    assert not [key for key in run.keys if "actions" in key]


def test_a_run_without_findings_has_an_empty_table(logger_and_read):
    logger, read = logger_and_read
    made_up.replay(WandbSink(logger), rows=2)
    assert read().history[-1]["gradflow/findings"]["nrows"] == 0


def test_a_run_that_ends_before_its_first_row_breaks_nothing(logger_and_read):
    logger, read = logger_and_read
    made_up.replay(WandbSink(logger), rows=0)
    run = read()
    html = (run.folder / "files" / run.history[-1]["gradflow/report"]["path"]).read_text()
    assert "Nothing was measured" in html


def test_without_an_end_the_heatmap_comes_when_the_rows_have_doubled(logger_and_read):
    logger, read = logger_and_read
    clock = made_up.Hours()
    made_up.replay(WandbSink(logger, now=clock), rows=9, progress=lambda done: clock.row(math.nan))
    steps = [row["trainer/global_step"] for row in read().rows_with("gradflow/heatmap")]
    assert steps == [10, 30, 70, 80]


def test_a_short_fit_has_the_heatmap_at_its_end_alone(logger_and_read):
    logger, read = logger_and_read
    made_up.replay(WandbSink(logger, now=lambda: 0.0), rows=9)
    run = read()
    assert run.rows_with("gradflow/heatmap") == [run.history[-1]]


@pytest.mark.parametrize("layers", [1, 75, MAX_BINS, MAX_BINS + 1, 150, 512, 2000])
def test_a_row_takes_less_than_3_kb_with_a_picture_and_for_any_number_of_layers(logger_and_read, layers):
    logger, read = logger_and_read
    clock = made_up.Hours()
    sink, shown = WandbSink(logger, now=clock), full_history(layers)
    for progress in (0.01, 0.5):
        sink.on_row(made_up.view(shown, progress=clock.row(progress)))
    sizes = [len(json.dumps({k: v for k, v in row.items() if k.startswith("gradflow/")})) for row in read().history]
    assert 200 < sizes[1] - sizes[0] < 300  # the picture is a file: its path, size and digest stand in the row
    assert sizes[1] < 3000


def full_history(layers):
    """A row with every scalar, of a network of 100 million parameters whose gradient entries spread over 12 decades."""
    names = [f"model.layers.{i}.self_attn.out_proj" for i in range(layers)]
    shown, norms = made_up.History(), np.random.default_rng(0).lognormal(-5, 2, layers)
    shown.layer_axis.merge(names)
    shown.add_points([made_up.Point(name, name, "tanh") for name in names])
    entries = np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
    entries[:HISTOGRAM_BINS] = 1e8 / 3 * np.exp(-(((np.arange(HISTOGRAM_BINS) - 45) / 5) ** 2))
    fractions = ("grad_zero_fraction", "grad_nonfinite_fraction", "saturated_fraction", "dead_fraction")
    values = {"grad_norm": norms, "delta_norm": norms / 3, "update_ratio": norms / 7}
    values |= {name: np.random.default_rng(1).random(layers) for name in fractions}
    names = ("loss", "grad_norm_total", "clip_factor", "clipped_fraction", "loss_scale", "step_skipped")
    scalars = dict(zip(names, np.random.default_rng(2).random(6).tolist(), strict=True))
    histograms = dict.fromkeys(("grad_hist_early", "grad_hist_late"), entries)
    shown.append(made_up.Row(12345, values, scalars, histograms=histograms))
    return shown


def test_histograms_of_entries_reach_from_the_lowest_to_the_highest_that_occurs(run):
    early = run.history[0]["gradflow/grad_hist_early"]
    assert early["values"] == [100] * 5
    assert early["bins"] == list(range(-64 + 20, -64 + 26))


def test_a_histogram_without_an_entry_is_left_out(logger_and_read):
    logger, read = logger_and_read
    shown, entries = made_up.gradients([0.0]), np.zeros(HISTOGRAM_BINS + 2, dtype=np.int64)
    entries[HISTOGRAM_BINS] = 7  # exact zeros
    one = np.where(np.arange(HISTOGRAM_BINS + 2) == 5, 3, 0)
    norms = {"grad_norm": np.array([0.0])}
    shown.append(made_up.Row(1, norms, histograms={"grad_hist_early": entries, "grad_hist_late": one}))
    WandbSink(logger).on_row(made_up.view(shown))
    (row,) = read().history
    assert "gradflow/grad_hist_early" not in row
    assert (row["gradflow/grad_hist_late"]["values"], row["gradflow/grad_hist_late"]["bins"]) == ([3], [-59, -58])


def test_a_layer_discovered_late_gets_the_next_bin_and_moves_none(logger_and_read):
    logger, read = logger_and_read
    sink, shown = WandbSink(logger), made_up.gradients([1.0, 0.1])
    sink.on_row(made_up.view(shown))
    shown.layer_axis.merge(["fc0", "late", "fc1"])
    shown.append(made_up.Row(5, {"grad_norm": np.array([1.0, 0.1, 0.01])}))
    sink.on_row(made_up.view(shown))
    run = read()
    assert [row["gradflow/layers"]["values"] for row in run.history] == [[120, 110], [120, 110, 100]]
    assert run.config["gradflow"]["layers"] == ["fc0", "fc1", "late"]


def test_more_layers_than_bins_are_merged_and_the_worst_is_kept(logger_and_read):
    logger, read = logger_and_read
    norms = [1.0] * (3 * MAX_BINS - 1)
    norms[4] = math.inf
    sink = WandbSink(logger)
    sink.on_row(made_up.view(made_up.gradients(norms)))
    run = read()
    histogram = run.history[0]["gradflow/layers"]
    assert len(histogram["values"]) == MAX_BINS
    assert histogram["values"][:3] == [120, 240, 120]
    assert run.config["gradflow"]["layers_per_bin"] == 3
    assert histogram["bins"] == list(range(MAX_BINS + 1))


def test_alerts_stop_at_their_limit(logger_and_read):
    logger, read = logger_and_read
    sink = WandbSink(logger)
    for _ in range(MAX_ALERTS + 5):
        sink.on_finding(made_up.finding(), made_up.view())
    assert len(read().alerts) == MAX_ALERTS


def test_the_stand_in_of_other_ranks_is_taken():
    from lightning.fabric.loggers.logger import _DummyExperiment

    class WandbLogger:
        experiment = _DummyExperiment()

        def log_metrics(self, metrics, step):
            pass

    made_up.replay(WandbSink(WandbLogger()), rows=2, findings=(made_up.finding(),))


@pytest.mark.parametrize(
    ("norm", "count"),
    [(1.0, 120), (10.0, 130), (1e-12, 1), (1e-11, 10), (0.0, 0), (math.nan, 0), (math.inf, 240), (1e20, 239)],
)
def test_ten_counts_are_a_decade(norm, count):
    assert layer_counts(np.array([norm])).tolist() == [count]
