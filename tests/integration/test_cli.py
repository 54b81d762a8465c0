"""LightningCLI builds the callbacks from YAML."""

import inspect
import sys

import numpy as np
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_gradflow import AutoMitigator, GradFlow, GradNormLogger, PlateauDetector, SaturationMonitor
from lightning_gradflow.callbacks.base import Monitor

# what Lightning 2.6 calls jsonargparse by
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

ARGUMENTS = {
    GradNormLogger: {
        "every_n_steps": 7,
        "signal_every_n_steps": 60,
        "max_decay": 5,
        "max_growth": 2.5,
        "max_update_ratio": 0.5,
    },
    SaturationMonitor: {"every_n_steps": 8, "max_saturated": 0.8, "max_dead": 0.7, "window": 6},
    PlateauDetector: {
        "every_n_steps": 9,
        "window": 64,
        "min_progress": 1e-3,
        "train_loss": "train/nll",
        "val_loss": "val/nll",
    },
    AutoMitigator: {"mode": "apply", "allow": ["clip"], "max_actions": 5, "max_progress": 0.5, "every_n_steps": 10},
}
CHILDREN = {
    "gradients": GradNormLogger,
    "saturation": SaturationMonitor,
    "plateau": PlateauDetector,
    "mitigator": AutoMitigator,
}
WHOLE = {"every_n_steps": 11, "mitigate": "apply", "report": False, "console": False}


def _spec(kind, arguments):
    return {"class_path": f"lightning_gradflow.{kind.__name__}", "init_args": arguments}


def _cli(monkeypatch, folder, trainer=None, command=(), run=False, save=None, arguments=()):
    """A CLI as the program `train.py`, called with a config file of these arguments of the Trainer."""
    argv = [*command]
    if trainer is not None:
        path = folder / "written.yaml"
        path.write_text(yaml.safe_dump({"trainer": {"logger": False, **trainer}}), encoding="utf-8")
        argv += ["--config", str(path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, *arguments])
    return LightningCLI(BoringModel, run=run, seed_everything_default=0, save_config_callback=save)


def _monitors(cli):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, Monitor)]


def _built(monkeypatch, folder, spec):
    (monitor,) = _monitors(_cli(monkeypatch, folder, {"callbacks": [spec]}))
    return monitor


def _settings(value):
    """How a callback is configured, comparably: detectors are dataclasses, children are callbacks."""
    if isinstance(value, Monitor):
        return type(value), {name: _settings(item) for name, item in vars(value).items()}
    if isinstance(value, list | tuple):
        return [_settings(item) for item in value]
    return value


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_every_argument_of_a_callback_can_be_written_in_yaml(monkeypatch, tmp_path, kind):
    arguments = ARGUMENTS[kind]
    assert set(arguments) == set(inspect.signature(kind).parameters)
    built = _built(monkeypatch, tmp_path, _spec(kind, arguments))
    assert _settings(built) == _settings(kind(**arguments))
    assert _settings(built) != _settings(kind())


@pytest.mark.parametrize("child", CHILDREN)
def test_every_argument_of_a_child_can_be_written_in_yaml(monkeypatch, tmp_path, child):
    kind = CHILDREN[child]
    built = _built(monkeypatch, tmp_path, _spec(GradFlow, {child: _spec(kind, ARGUMENTS[kind])}))
    assert _settings(built) == _settings(GradFlow(**{child: kind(**ARGUMENTS[kind])}))
    assert _settings(built) != _settings(GradFlow())


def test_every_argument_of_gradflow_can_be_written_in_yaml(monkeypatch, tmp_path):
    assert {*WHOLE, *CHILDREN} == set(inspect.signature(GradFlow).parameters)
    children = {child: _spec(kind, ARGUMENTS[kind]) for child, kind in CHILDREN.items()}
    built = _built(monkeypatch, tmp_path, _spec(GradFlow, {**WHOLE, **children}))
    expected = GradFlow(**WHOLE, **{child: kind(**ARGUMENTS[kind]) for child, kind in CHILDREN.items()})
    assert _settings(built) == _settings(expected)


@pytest.mark.parametrize("kind", [GradFlow, *ARGUMENTS])
def test_a_callback_needs_no_arguments(monkeypatch, tmp_path, kind):
    built = _built(monkeypatch, tmp_path, {"class_path": f"lightning_gradflow.{kind.__name__}"})
    assert _settings(built) == _settings(kind())


@pytest.mark.parametrize("kind", [GradFlow, *ARGUMENTS])
def test_none_means_the_default_interval(monkeypatch, tmp_path, kind):
    assert _built(monkeypatch, tmp_path, _spec(kind, {"every_n_steps": None})).every_n_steps is None


def test_the_four_can_stand_beside_each_other_and_other_callbacks(monkeypatch, tmp_path):
    others = [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}]
    specs = [_spec(kind, arguments) for kind, arguments in ARGUMENTS.items()]
    monitors = _monitors(_cli(monkeypatch, tmp_path, {"callbacks": specs + others}))
    assert [type(monitor) for monitor in monitors] == list(ARGUMENTS)


def test_gradflow_can_be_given_on_the_command_line(monkeypatch, tmp_path):
    arguments = [
        "--trainer.callbacks+=GradFlow",
        "--trainer.callbacks.mitigate=off",
        "--trainer.callbacks.saturation=SaturationMonitor",
        "--trainer.callbacks.saturation.max_dead=0.5",
    ]
    (built,) = _monitors(_cli(monkeypatch, tmp_path, {}, arguments=arguments))
    assert _settings(built) == _settings(GradFlow(mitigate="off", saturation=SaturationMonitor(max_dead=0.5)))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GradFlow, {"every_n_steps": 0}, r"every_n_steps must be a whole number in \[1, inf\), got 0"),
        (
            GradFlow,
            {"mitigate": "off", "mitigator": _spec(AutoMitigator, {"mode": "apply"})},
            r"mitigate must agree with the mode of mitigator \('apply'\), got 'off'",
        ),
        (GradFlow, {"gradients": _spec(GradNormLogger, {"max_decay": 0})}, r"max_decay must be in \(0, 100\), got 0"),
        (GradNormLogger, {"max_growth": 100}, r"max_growth must be in \(0, 100\), got 100"),
        (SaturationMonitor, {"max_dead": 7}, r"max_dead must be in \(0, 1\], got 7"),
        (PlateauDetector, {"window": 31}, r"window must be a whole number in \[32, inf\), got 31"),
        (AutoMitigator, {"allow": ["clip", "pray"]}, r"allow must hold only remedies of \('clip', .*'\), got"),
    ],
)
def test_a_value_out_of_its_range_gives_our_error(monkeypatch, tmp_path, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        _built(monkeypatch, tmp_path, _spec(kind, arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GradFlow, {"every_n_steps": 2.5}, "every_n_steps"),
        (GradFlow, {"mitigate": "always"}, "mitigate"),
        (GradFlow, {"mitigate": False}, "mitigate"),  # a bare `off` in YAML
        (GradFlow, {"gradients": _spec(PlateauDetector, {})}, "GradNormLogger"),
        (GradFlow, {"report": "out.html"}, "report"),
        (SaturationMonitor, {"max_dead": "high"}, "max_dead"),
        (AutoMitigator, {"allow": "clip"}, "allow"),
        (PlateauDetector, {"patience": 3}, "patience"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_name(monkeypatch, tmp_path, capsys, kind, arguments, message):
    with pytest.raises(SystemExit):
        _built(monkeypatch, tmp_path, _spec(kind, arguments))
    assert message in capsys.readouterr().err.partition("error:")[2]


TRAINER = {
    "accelerator": "cpu",
    "max_steps": 6,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": [_spec(GradFlow, {"every_n_steps": 2, "saturation": _spec(SaturationMonitor, {"window": 2})})],
}


class TestFit:
    """Two short runs, the second one from what the CLI wrote about the first."""

    def _fit(self, monkeypatch, folder, *, save=None, **kwargs):
        return _cli(monkeypatch, folder, command=["fit"], run=True, save=save, **kwargs)

    def test_a_run_from_yaml_is_watched(self, monkeypatch, tmp_path, capsys):
        cli = self._fit(monkeypatch, tmp_path, trainer={**TRAINER, "default_root_dir": str(tmp_path)})
        (flow,) = _monitors(cli)
        assert flow.history.steps.tolist() == [0, 1, 2, 4]
        assert np.isfinite(flow.history["grad_norm"]).all()
        assert flow.report_path == tmp_path / "gradflow_report.html"
        assert "No sign of trouble in the gradients." in capsys.readouterr().out

    def test_the_saved_config_gives_the_same_run(self, monkeypatch, tmp_path):
        trainer = {**TRAINER, "default_root_dir": str(tmp_path)}
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
        first = self._fit(monkeypatch, tmp_path, trainer={**trainer, "logger": logger}, save=SaveConfigCallback)
        saved = f"{first.trainer.log_dir}/config.yaml"
        second = self._fit(monkeypatch, tmp_path, arguments=["--config", saved])
        (asked,), (read,) = _monitors(first), _monitors(second)
        assert read.every_n_steps == 2
        assert _settings(read.parts()) == _settings(asked.parts())
        np.testing.assert_array_equal(read.history["grad_norm"], asked.history["grad_norm"])

    def test_the_printed_config_can_be_read_back(self, monkeypatch, tmp_path, capsys):
        trainer = {**TRAINER, "default_root_dir": str(tmp_path)}
        with pytest.raises(SystemExit, match="0"):
            self._fit(monkeypatch, tmp_path, trainer=trainer, arguments=["--print_config"])
        printed = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
        (flow,) = _monitors(self._fit(monkeypatch, tmp_path, arguments=["--config", str(tmp_path / "printed.yaml")]))
        assert flow.history.steps.tolist() == [0, 1, 2, 4]
        assert flow.parts()[1].dead_window == 2
