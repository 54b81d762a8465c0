"""The tables of the README and of docs/benchmarks.md are those of the committed results."""

import json

import pytest

from tests.benchmarks.detection import HALVES, OURS, main, parse
from tests.benchmarks.published import SUITES
from tests.benchmarks.readme import PAGES, REPORTS, updated
from tests.benchmarks.report import BEGIN, END, markdown, placed, short


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of one sick and one healthy training."""
    folder = tmp_path_factory.mktemp("detection")
    line = ["--seeds", "1", "--processes", "1", "--cache", str(folder), "--out", str(folder / "new" / "found.json")]
    assert main([*line, "--cases", "sigmoid_10", "relu_mlp"]) == 0
    first = json.loads((folder / "new" / "found.json").read_text(encoding="utf-8"))
    assert main([*line, "--rejudge", "--no-limits", "--cases", "sigmoid_10", "relu_mlp"]) == 0
    return first, json.loads((folder / "new" / "found.json").read_text(encoding="utf-8"))


def test_every_judge_is_summed_up_for_each_half(found):
    assert set(found[0]["judges"]) == {OURS, *SUITES}
    assert all(set(halves) == set(HALVES) for halves in found[0]["judges"].values())


def test_a_sick_and_a_healthy_training_are_judged_right(found):
    ours = found[0]["judges"][OURS]["all"]
    assert (ours["recall"]["hits"], ours["recall"]["total"]) == (1, 1)
    assert (ours["false_alarms"]["hits"], ours["false_alarms"]["total"]) == (0, 1)
    assert (found[0]["crashes"], found[0]["faults_of_the_monitor"], found[0]["replayed_otherwise"]) == ({}, {}, [])


def test_recorded_runs_are_judged_the_same_again(found):
    first, again = found
    assert again["judges"] == first["judges"]
    assert again["leave_one_family_out"] == []


def test_the_table_has_a_row_for_each_judge(found):
    lines = markdown(found[0]).splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 2 + len(found[0]["judges"])
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| `GradFlow` | 1/1 (21-100 %) |")


def test_in_short_each_judge_has_a_row_with_what_it_found_and_alarmed(found):
    table, said = short(found[0]).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(found[0]["judges"])
    assert lines[2] == "| `GradFlow` | 1/1 (21-100 %) | 0/1 (0-79 %) |"
    assert said.startswith("Runs of 1 sick and 1 healthy trainings over 1 seeds")


def test_rejudging_needs_recorded_runs(capsys):
    with pytest.raises(SystemExit):
        parse(["--rejudge"])
    assert "--cache" in capsys.readouterr().err


def test_a_case_that_is_not_in_the_zoo_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse(["--cases", "relu_mlp", "unicorn"])
    assert "got unicorn" in capsys.readouterr().err


def test_only_what_stands_between_the_marks_is_replaced():
    assert placed(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_marks_that_are_not_there_once_are_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        placed(text, "new")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("shown", REPORTS.values(), ids=lambda shown: shown.BEGIN)
def test_each_page_has_a_place_for_every_benchmark(page, shown):
    assert page.read_text(encoding="utf-8").count(shown.BEGIN) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_page_shows_the_committed_results(page):
    assert page.read_text(encoding="utf-8") == updated(page)
