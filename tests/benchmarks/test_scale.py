"""How the cost grows: the arithmetic, tiny networks, and the tables."""

import json
import math
import re

import pytest

from lightning_gradflow import GradFlow
from tests.benchmarks import scale
from tests.benchmarks.scale import DENSE, RESULTS, exponent, lengthen, main, sample_cost, state_size, steps_of
from tests.benchmarks.scale_memory import STATUS, extra_memory
from tests.benchmarks.scale_models import KINDS, grown
from tests.benchmarks.scale_report import _size, markdown, short


def flow():
    return GradFlow(every_n_steps=2, report=False, console=False)


def test_a_sample_costs_what_its_step_takes_more_than_its_neighbours():
    unsampled = 1.0
    steps = [9.0, 9.0, 9.0, unsampled, 3.0, 1.0, 4.0, 2.0, 3.75, 1.0]
    assert sample_cost(steps) == 2.25  # the middle one of 3 - 1, 4 - 1.5 and 3.75 - 1.5


def test_a_drift_of_the_machine_is_not_taken_for_cost():
    steps = [1.0 + 0.1 * i + 2.0 * (i % 2 == 0) for i in range(DENSE + 9)]
    assert sample_cost(steps) == pytest.approx(2.0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_that_power(power):
    sizes = [100, 300, 1000]
    assert exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power)


def test_one_size_and_a_cost_of_nothing_have_no_exponent():
    assert math.isnan(exponent([100], [1.0]))
    assert math.isnan(exponent([100, 200], [1.0, 0.0]))


@pytest.mark.parametrize(("kind", "size"), [("tensors", 100), ("parameters", 20_000)])
def test_a_network_is_as_large_as_it_is_asked_to_be(kind, size):
    parameters = list(grown(kind, size).parameters())
    of = {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}
    assert of[kind] == pytest.approx(size, rel=0.1)


def test_every_second_step_is_sampled_and_the_network_is_healthy():
    monitor = flow()
    steps = steps_of(grown("tensors", 40), monitor, 12)
    assert len(steps) == 12
    assert monitor.history.steps.tolist() == [0, 1, 2, 4, 6, 8, 10]
    assert monitor.findings == ()


def test_a_checkpoint_of_a_long_run_is_as_large_as_one_of_a_longer():
    monitor = flow()
    steps_of(grown("tensors", 4), monitor, 8)
    short = state_size(monitor)
    lengthen(monitor, 60_000)
    long = state_size(monitor)
    lengthen(monitor, 120_000)
    assert short < long
    assert state_size(monitor) == pytest.approx(long, rel=0.5)


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells the peak of a process")
def test_a_sample_of_large_matrices_takes_about_a_copy_of_them():
    parameters = 8_000_000
    assert 0.5 < extra_memory("parameters", parameters) / (4 * parameters) < 4


@pytest.mark.parametrize(("size", "text"), [(1_234, "1 kB"), (123_456, "123 kB"), (2.5e6, "2.5 MB"), (8.3e8, "830 MB")])
def test_sizes_have_a_unit(size, text):
    assert _size(size) == text


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    sizes = ["--tensors", "10", "20", "--parameters", "1000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "RUN", 50_000)
        assert main([*sizes, "--pairs", "2", "--no-memory", "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_tables_have_a_row_for_each_size(found):
    lines = [line for line in markdown(found).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| parameter tensors", "| ---", "| 10", "| 20", "| parameters", "| ---", "| 968",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1


def test_in_short_it_is_one_sentence_with_the_ends_of_each_table(found):
    said = short(found)
    assert re.search(r"takes from [\d,]+ ms with 10 to [\d,]+ ms with 20 parameter tensors \(by the power ", said)
    assert "\n" not in said


def test_the_committed_results_are_of_all_kinds():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(results["grows"]) == set(KINDS)
