"""The README's Python runs as it stands, and its tables are complete."""

import re
import warnings
from pathlib import Path

import pytest

from lightning_gradflow.findings import FindingKind, GradFlowWarning

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FIRST, *REST = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))


def _run(*blocks):
    """Runs blocks one after the other in one namespace, as a reader would."""
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        # the network in the README vanishes on purpose
        warnings.simplefilter("default", GradFlowWarning)
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_first_block_finds_the_vanishing_gradient():
    with pytest.warns(GradFlowWarning):
        flow = _run(FIRST)["flow"]
    assert flow.findings[0].kind == "vanishing_gradient"
    assert flow.findings[0].step == 0


@pytest.mark.parametrize("block", REST, ids=range(2, 2 + len(REST)))
def test_each_other_block_goes_on_from_the_first(block):
    with pytest.warns(GradFlowWarning):
        _run(FIRST, block)
    if "WandbLogger" in block:
        import wandb

        wandb.finish()


def test_a_run_that_is_to_stop_is_stopped(capsys):
    (block,) = [block for block in REST if "VanishingGradientWarning" in block]
    with pytest.warns(GradFlowWarning):
        _run(FIRST, block)
    assert "stopped: step 0: The gradient vanishes" in capsys.readouterr().out


def test_both_commands_stand_on_the_first_screen():
    screen = "\n".join(README.splitlines()[:25])
    assert "python3 dev.py example" in screen
    assert "python3 dev.py test" in screen
    assert "callbacks=[GradFlow()]" in screen


@pytest.mark.parametrize("kind", FindingKind)
def test_every_kind_of_finding_is_described(kind):
    assert f"`{kind}`" in README
