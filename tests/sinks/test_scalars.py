import csv
from pathlib import Path

import pytest

from lightning_gradflow.sinks import ScalarSink, TensorBoardSink, WandbSink, make_sinks
from lightning_gradflow.sinks.base import LOGGED
from tests import made_up


def test_csv_gets_the_scalars_of_each_row(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    (sink,) = make_sinks([logger])
    made_up.replay(sink, rows=3, findings=(made_up.finding(),))
    logger.finalize("success")
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "10", "20"]
    assert [float(row["gradflow/grad_norm_median"]) for row in rows] == pytest.approx([0.055] * 3)
    assert {name.removeprefix("gradflow/") for name in rows[0]} - {"step"} <= set(LOGGED)


def test_csv_gets_the_number_of_actions_at_their_steps(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    (sink,) = make_sinks([logger])
    made_up.replay(sink, rows=5, actions=made_up.ACTIONS)
    logger.finalize("success")
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gradflow/actions"]]
    keys = ("step", "gradflow/actions", "gradflow/actions_kept", "gradflow/actions_rolled_back")
    assert [[row[key] for key in keys] for row in rows] == [
        ["10", "1.0", "", ""],
        ["10", "2.0", "", ""],
        ["30", "2.0", "1.0", ""],
        ["30", "2.0", "1.0", "1.0"],
    ]


def test_a_row_without_numbers_is_not_logged():
    class Logger:
        def log_metrics(self, metrics, step):
            raise AssertionError

    shown = made_up.History()
    shown.append(made_up.Row(0))
    ScalarSink(Logger()).on_row(made_up.view(shown))


def test_loggers_are_told_apart_by_the_names_of_their_ancestors():
    def subclass_of(name):
        return type("Mine", (type(name, (), {}),), {})()

    loggers = [subclass_of(name) for name in ("WandbLogger", "TensorBoardLogger", "MLFlowLogger")]
    assert [type(sink) for sink in make_sinks(loggers)] == [WandbSink, TensorBoardSink, ScalarSink]
