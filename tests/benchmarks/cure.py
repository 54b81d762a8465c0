"""What the cure is worth: sick trainings that go on with and without it, and healthy ones that it must leave alone.

`python -m tests.benchmarks.cure` trains every curable case of the zoo and every healthy one, over three seeds, in these
arms: nothing is done; something is done at random at each alarm; gradients are clipped; `GradFlow(mitigate="apply")`.
Beside them stands the fault-free twin. All have the same seed, the same batches and the same number of steps, and none
is started again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .cure_report import markdown
from .cure_runs import ARMS, TWIN, Course, Shelf, course, sources
from .cure_score import Trial, scored
from .detection import environment
from .report import write
from .runs import CASES, EVERY_N_STEPS, prepare_process
from .zoo import HEALTHY
from .zoo.curable import CURABLE

RESULTS = Path(__file__).with_name("results") / "cure.json"
BUDGET = 2.0
"""Times the steps of a case. Labels were settled at the fewest steps that show them: a twin that has only just learnt
leaves none for the time that passes before an alarm, an action and its verification."""

Job = tuple[str, int, str, float]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    every = [*CURABLE, *HEALTHY]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cure", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each case, counted from 0")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--cases", nargs="+", default=every, help="names of cases; all of them by default")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="none is always there")
    parser.add_argument(
        "--budget",
        nargs="+",
        type=float,
        default=[BUDGET],
        help="times the steps that a case was labelled at; the tables are of the first",
    )
    parser.add_argument("--out", type=Path, help=f"where the results are written, such as {RESULTS.name}")
    parser.add_argument("--cache", type=Path, help="folder that trainings are kept in, and taken from")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.cases if name not in every]
    if unknown:
        parser.error(f"--cases must be names of curable or healthy cases in the zoo, got {', '.join(unknown)}")
    if min(arguments.budget) <= 0:
        parser.error(f"--budget must be above 0, got {min(arguments.budget):g}")
    return arguments


def trained(jobs: Sequence[Job], pool: Any, shelf: Shelf) -> Iterator[Course]:
    """What came of each job, in order, and a line about it."""
    for done, one in enumerate(pool.imap(partial(course, shelf=shelf), jobs), 1):
        deeds = ", ".join(f"{deed.kind} at {deed.step} {deed.outcome}" for deed in one.deeds)
        words = f"{one.start:.3g} -> {one.end:.3g} {deeds} {one.crash} {' | '.join(one.faults)}"
        print(f"{done:4}/{len(jobs)} {one.case}-{one.seed} {one.arm} {words} ({one.seconds:.1f} s)", flush=True)
        yield one


def trials(arguments: argparse.Namespace, budget: float, pool: Any, shelf: Shelf) -> list[Trial]:
    """Every case and seed in every arm; one that is not sick at this budget is trained without a cure alone."""
    pairs = [(name, seed) for name in arguments.cases for seed in range(arguments.seeds)]
    found = {pair: Trial(CASES[pair[0]], pair[1], {}) for pair in pairs}

    def train(arms: Sequence[str], pairs: Sequence[tuple[str, int]]) -> None:
        for one in trained([(*pair, arm, budget) for pair in pairs for arm in arms], pool, shelf):
            old = found[one.case, one.seed]
            found[one.case, one.seed] = Trial(old.case, old.seed, {**old.courses, one.arm: one})

    train((TWIN, "none"), pairs)
    arms = [arm for arm in ARMS if arm in arguments.arms and arm != "none"]
    train(arms, [pair for pair in pairs if pair[0] not in HEALTHY and found[pair].still_sick])
    healthy = [pair for pair in pairs if pair[0] in HEALTHY]
    train(arms[-1:], healthy)
    # all arms act at the same moments: where there was none, the others would do what this one did
    idle = [pair for pair in healthy if arms and not found[pair].courses[arms[-1]].deeds]
    for pair in idle:
        last = found[pair].courses[arms[-1]]
        others = {arm: replace(last, arm=arm) for arm in arms[:-1]}
        found[pair] = Trial(found[pair].case, found[pair].seed, {**found[pair].courses, **others})
    train(arms[:-1], [pair for pair in healthy if pair not in idle])
    return list(found.values())


def main(argv: list[str]) -> int:
    """Runs the benchmark, prints its tables, and writes the results."""
    arguments = parse(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    arms = ["none", *(arm for arm in arguments.arms if arm != "none")]
    with tempfile.TemporaryDirectory() as scratch:
        shelf = Shelf(arguments.cache or Path(scratch), {arm: sources(arm) for arm in (TWIN, *ARMS)})
        # spawned: a process that was forked from one in which torch has threads may hang
        with multiprocessing.get_context("spawn").Pool(arguments.processes, prepare_process) as pool:
            budgets = {f"{b:g}": scored(trials(arguments, b, pool, shelf), arms) for b in arguments.budget}
    found = {
        "environment": environment(),
        "seeds": arguments.seeds,
        "every_n_steps": EVERY_N_STEPS,
        "budgets": budgets,
    }
    print("\n" + markdown(found))
    for budget, of_it in budgets.items():
        for name in ("not_sick", "not_ahead", "crashes", "faults_of_the_monitor"):
            print(f"\n{name} at {budget} times the steps: {json.dumps(of_it[name], indent=1)}")
    if arguments.out:
        write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
