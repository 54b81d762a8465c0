"""The command line of the checkout, without making an environment."""

import subprocess
import sys
from pathlib import Path

import pytest

import dev

ROOT = Path(__file__).parents[1]


def test_arguments_behind_the_command_are_handed_on_as_they_are():
    assert dev.parse(["test", "-k", "plateau", "--", "-x"]) == ("test", ["-k", "plateau", "--", "-x"])
    assert dev.parse(["example", "--help"]) == ("example", ["--help"])


@pytest.mark.parametrize("argv", [[], ["tests"], ["--healthy"], ["check", "--fix"]])
def test_a_wrong_command_line_is_refused_by_name(argv):
    with pytest.raises(dev.SetupError, match=argv[-1] if argv else "none"):
        dev.parse(argv)


def test_a_wrong_command_says_so_without_a_traceback_and_without_a_set_up(capsys):
    assert dev.main(["tests"]) == 2
    said = capsys.readouterr()
    assert said.err == "dev.py: command must be one of example, test, check, got tests\n"
    assert said.out == ""


def test_a_python_that_is_too_old_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(dev, "MIN_PYTHON", (99, 0))
    assert dev.main(["test"]) == 2
    assert "Python must be 99.0 or newer, got 3." in capsys.readouterr().err


def test_the_oldest_python_is_the_one_the_package_asks_for():
    wanted = ".".join(map(str, dev.MIN_PYTHON))
    assert f'requires-python = ">={wanted}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_stamp_changes_with_each_part_and_where_parts_meet():
    stamps = {dev.stamp("ab", "c"), dev.stamp("a", "bc"), dev.stamp("abc"), dev.stamp("ab", "d"), dev.stamp("ab", "")}
    assert len(stamps) == 5


def test_the_stamp_does_not_depend_on_line_endings():
    assert dev.stamp("torch\nnumpy\n") == dev.stamp("torch\r\nnumpy\r\n")


def test_the_torch_pin_is_read_from_the_constraints():
    assert dev.torch_pin("numpy==2.4.6\ntorch==2.13.0  # why\ntorchmetrics==1.9.0\n") == "torch==2.13.0"
    assert dev.torch_pin((ROOT / "constraints.txt").read_text(encoding="utf-8")).startswith("torch==")


def test_constraints_without_torch_are_refused():
    with pytest.raises(dev.SetupError, match="must pin torch"):
        dev.torch_pin("torchmetrics==1.9.0\n")


def test_each_command_runs_what_the_readme_says():
    assert dev.commands("test", ["-x"]) == [["-m", "pytest", "-x"]]
    assert dev.commands("example", ["--healthy"]) == [[str(Path("examples", "vanishing_digits.py")), "--healthy"]]
    assert [line[1] for line in dev.commands("check", [])] == ["ruff", "ruff", "mypy"]


def test_help_is_given_without_a_set_up():
    command = [sys.executable, "-S", str(ROOT / "dev.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python3 dev.py example" in said.stdout
