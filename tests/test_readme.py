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
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the first block leaves behind; it is run once, for the others go on from it."""
    found = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("first"))
        _run(FIRST, found)
    return found


def _run(block, names):
    with warnings.catch_warnings():
        # the network in the README vanishes on purpose
        warnings.simplefilter("ignore", GradFlowWarning)
        exec(compile(block, "README.md", "exec"), names)


def test_the_first_block_finds_the_vanishing_gradient(names):
    finding = names["flow"].findings[0]
    assert (finding.kind, finding.step, finding.cause) == ("vanishing_gradient", 0, "saturation")


@pytest.mark.parametrize("block", REST, ids=range(2, 2 + len(REST)))
def test_each_other_block_goes_on_from_the_first(block, names, capsys):
    _run(block, dict(names))
    if "WandbLogger" in block:
        import wandb

        wandb.finish()
    if "filterwarnings" in block:
        assert "stopped: step 0: The gradient vanishes" in capsys.readouterr().out


def test_the_code_shown_as_a_suggestion_is_the_one_that_is_made(names):
    assert names["flow"].findings[0].suggestions[0].code in README


def test_both_commands_stand_on_the_first_screen():
    screen = "\n".join(README.splitlines()[:25])
    assert "python3 dev.py example" in screen
    assert "python3 dev.py test" in screen
    assert "callbacks=[GradFlow()]" in screen


@pytest.mark.parametrize("kind", FindingKind)
def test_every_kind_of_finding_is_described(kind):
    assert f"`{kind}`" in README
