"""The example does what the README says of it."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "vanishing_digits.py"


def _run(folder, *args, **env):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--dir", str(folder), *args],
        cwd=folder,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder), "WANDB_DATA_DIR": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sigmoid_network_is_told_to_vanish_by_step_2_and_its_page_is_written(tmp_path):
    out = _run(tmp_path, "--epochs", "2")
    finding = re.search(r"Finding: vanishing_gradient \(critical\) at step (\d+), cause: saturation", out)
    assert finding is not None
    assert int(finding[1]) <= 2
    report = re.search(r"Report: (.+)", out)
    assert Path(report[1]).is_file()
    assert "Weights & Biases: " in out
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_healthy_network_has_no_finding(tmp_path):
    out = _run(tmp_path, "--epochs", "4", "--healthy", "--logger", "none")
    assert "Finding: none" in out
    assert "No sign of trouble in the gradients." in out


def test_the_run_learns_when_it_is_repaired(tmp_path):
    out = _run(tmp_path, "--mitigate", "apply", "--logger", "none")
    assert float(re.search(r"Validation accuracy: ([\d.]+)", out)[1]) > 0.5  # chance is 0.1
