"""The Python of the README and of the pages in docs runs as it stands; links lead somewhere; tables are complete."""

import re
import warnings
from pathlib import Path

import pytest

from lightning_gradflow.findings import FindingKind, GradFlowWarning
from lightning_gradflow.metrics import METRICS
from lightning_gradflow.sinks.base import LOGGED

ROOT = Path(__file__).parents[1]
TEXTS = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, FINDINGS, NUMBERS = TEXTS["README.md"], TEXTS["docs/findings.md"], TEXTS["docs/numbers.md"]
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for name, text in TEXTS.items()}
REST = [(name, i) for name, blocks in BLOCKS.items() for i in range(1, len(blocks))]
LINKS = [(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]


@pytest.fixture(autouse=True)
def _away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the first block of a page leaves behind; it is run once, for the others go on from it."""
    kept = {}

    def left_by(page):
        if page not in kept:
            found = {"__name__": "__main__"}
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("first"))
                _run(page, 0, found)
            kept[page] = found
        return kept[page]

    return left_by


def _run(page, i, names):
    with warnings.catch_warnings():
        # the networks in the pages vanish on purpose
        warnings.simplefilter("ignore", GradFlowWarning)
        exec(compile(BLOCKS[page][i], page, "exec"), names)


def test_the_first_block_of_the_readme_finds_the_vanishing_gradient(names):
    finding = names("README.md")["flow"].findings[0]
    assert (finding.kind, finding.step, finding.cause) == ("vanishing_gradient", 0, "saturation")


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks and name != "README.md"])
def test_the_first_block_of_a_page_needs_nothing_else(page, names, capsys):
    left = names(page)
    if "filterwarnings" in BLOCKS[page][0]:
        assert "stopped: step 0: The gradient vanishes" in capsys.readouterr().out
    if "flow.actions" in BLOCKS[page][0]:
        assert left["flow"].actions


@pytest.mark.parametrize(("page", "i"), REST)
def test_each_other_block_goes_on_from_the_first(page, i, names):
    _run(page, i, dict(names(page)))
    if "WandbLogger" in BLOCKS[page][i]:
        import wandb

        wandb.finish()
        wandb.teardown()  # or the settings of this test go on to hold for others in the process


def test_the_code_shown_as_a_suggestion_is_the_one_that_is_made(names):
    assert names("README.md")["flow"].findings[0].suggestions[0].code in README


def test_both_commands_stand_on_the_first_screen():
    screen = "\n".join(README.splitlines()[:25])
    assert "python3 dev.py example" in screen
    assert "python3 dev.py test" in screen
    assert "callbacks=[GradFlow()]" in screen


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 240


@pytest.mark.parametrize("kind", FindingKind)
def test_every_kind_of_finding_is_described(kind):
    assert f"| `{kind}` |" in README
    assert f"| `{kind}` |" in FINDINGS


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_named(metric):
    assert f"`{metric}`" in NUMBERS


@pytest.mark.parametrize("name", [*LOGGED, "actions", "actions_kept", "actions_rolled_back", "actions_taken"])
def test_every_number_that_loggers_get_is_described(name):
    (section,) = re.findall(r"^## In every logger\n(.*?)^## ", NUMBERS, re.MULTILINE | re.DOTALL)
    assert f"`{name}`" in section


@pytest.mark.parametrize("page", sorted(TEXTS.keys() - {"README.md"}))
def test_every_page_can_be_reached_from_the_readme(page):
    assert ("README.md", page) in [(name, link.partition("#")[0]) for name, link in LINKS]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_somewhere(page, link):
    assert "://" not in link  # nothing here looks whether such a page exists
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.resolve().is_relative_to(ROOT.resolve())
    assert target.is_file()
    if anchor:
        assert anchor in _anchors(target.read_text(encoding="utf-8"))


def _anchors(text):
    """What GitHub calls the headings of a page."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_anchors_are_those_of_github():
    assert _anchors("# What it's *for*\n\n```\n# no heading\n```\n## NaN, infinity and fp16\n") == {
        "what-its-for",
        "nan-infinity-and-fp16",
    }
