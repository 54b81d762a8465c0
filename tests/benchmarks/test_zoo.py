"""The zoo's trainings repeat and run.

That their labels hold is shown by ``python -m tests.benchmarks.zoo.outcomes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.benchmarks.zoo import HEALTHY, SICK, Case, quiet_trainer
from tests.benchmarks.zoo.case import halved
from tests.benchmarks.zoo.exact import EXACT, EXACT_DATA

CASES = {**SICK, **HEALTHY}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EVERY_EXACT = pytest.mark.parametrize("name", EXACT)


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[key], second[key], rtol=0, atol=0, equal_nan=True) for key in first
    )


def _first_batch(loader: DataLoader[Any]) -> list[Tensor]:
    batch: list[Tensor] = next(iter(loader))
    return batch


def test_no_case_is_in_both_registries() -> None:
    assert not SICK.keys() & HEALTHY.keys()


def test_every_sick_case_has_a_fault_free_twin() -> None:
    assert all(case.twin for case in SICK.values())


def test_every_sick_case_says_what_is_wrong_and_where_it_may_be_found() -> None:
    for case in SICK.values():
        assert case.kinds, case.name
        assert case.causes, case.name
        assert 0 <= case.onset < case.max_steps, case.name
        assert set(case.layers) <= dict(case.build(0).named_modules()).keys(), case.name


def test_whole_families_are_in_one_half_and_both_halves_are_of_a_size() -> None:
    halves = {(case.family, case.half) for case in CASES.values()}
    assert len(halves) == len({family for family, _ in halves})
    for registry in (SICK, HEALTHY):
        fitted = sum(case.half == "fit" for case in registry.values())
        assert 0.3 < fitted / len(registry) < 0.7


def test_healthy_families_do_not_move_a_sick_one_to_the_other_half() -> None:
    assert halved(SICK, HEALTHY)[0] == halved(SICK)[0]


def test_the_labels_do_not_lean_on_the_package_under_test() -> None:
    sources = Path(__file__).with_name("zoo").glob("*.py")
    assert not [path.name for path in sources if "lightning_gradflow" in path.read_text(encoding="utf-8")]


@EVERY_CASE
def test_the_same_seed_gives_the_same_weights_and_batches(case: Case) -> None:
    torch.manual_seed(1)
    first, batch = case.build(3).state_dict(), _first_batch(case.data(3))
    torch.manual_seed(2)
    again, batch_again = case.build(3).state_dict(), _first_batch(case.data(3))
    assert _same(first, again)
    assert all(map(torch.equal, batch, batch_again))


@EVERY_CASE
def test_another_seed_gives_other_weights(case: Case) -> None:
    assert not _same(case.build(0).state_dict(), case.build(1).state_dict())


@EVERY_CASE
def test_building_leaves_the_global_generator_as_it_was(case: Case) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    case.build(0)
    assert torch.equal(before, torch.get_rng_state())


@EVERY_CASE
def test_the_first_step_runs(case: Case) -> None:
    trained = case.fit(0, max_steps=1, limit_val_batches=1)
    assert trained.trainer.global_step >= 1
    if case.name in HEALTHY:
        assert all(p.isfinite().all() for p in trained.parameters())


@pytest.mark.parametrize("case", SICK.values(), ids=SICK)
def test_the_first_step_of_the_twin_runs(case: Case) -> None:
    trained = case.without_fault.fit(0, max_steps=1, limit_val_batches=1)
    assert all(p.isfinite().all() for p in trained.parameters())


@EVERY_EXACT
def test_an_exact_training_repeats_to_the_last_bit(name: str) -> None:
    def train() -> dict[str, Tensor]:
        L.seed_everything(0, verbose=False)
        module = EXACT[name](0)
        quiet_trainer(max_steps=4).fit(module, EXACT_DATA[name](0))
        return module.state_dict()

    first = train()
    assert not _same(first, EXACT[name](0).state_dict())
    assert _same(first, train())
