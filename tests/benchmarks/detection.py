"""What `GradFlow` and the published rules find in the zoo of labelled trainings.

`python -m tests.benchmarks.detection` trains every case over three seeds, watched at the same time by
`GradFlow(every_n_steps=10)` and by the published rules, and writes shares and intervals as JSON and as a table. With
`--rejudge` recorded runs are judged by the detectors as they are now, without training again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .limits import LIMITS, Tried, leave_one_out, merge, try_limits
from .published import SUITES, judge
from .report import markdown, write
from .runs import CASES, EVERY_N_STEPS, Run, default_detectors, is_kept, load, prepare_process, rejudged, save, train
from .verdicts import Verdict, confusion, summary, verdict

OURS = "GradFlow"
RESULTS = Path(__file__).with_name("results") / "detection.json"
HALVES = ("all", "fit", "report")


@dataclass(frozen=True)
class Judged:
    """What came of one run: a verdict for each judge, and how it would be judged at other limits."""

    verdicts: dict[str, Verdict]
    tried: dict[str, dict[float, Tried]]
    replayed_alike: bool
    crash: str
    faults: tuple[str, ...]
    seconds: float


def judged(run: Run, *, replayed_alike: bool, with_limits: bool) -> Judged:
    """Holds all that was said in a run against its label."""
    case = CASES[run.case]
    alarms = {OURS: run.alarms, **{suite: judge(suite, run.record) for suite in SUITES}}
    return Judged(
        verdicts={name: verdict(case, run.seed, run.steps, told, EVERY_N_STEPS) for name, told in alarms.items()},
        tried=try_limits(run) if with_limits else {},
        replayed_alike=replayed_alike,
        crash=run.crash,
        faults=run.faults,
        seconds=run.seconds,
    )


def work(job: tuple[str, int], folder: Path, rejudge: bool, with_limits: bool) -> Judged:
    """One case and seed, in a process of its own: trained and kept, or taken from the folder and judged anew."""
    run = load(*job, folder) if rejudge else train(*job)
    if not rejudge:
        save(run, folder)
    again = rejudged(run, default_detectors())
    # as text, because evidence may hold NaN, which differs from itself; detectors may have changed since a run was kept
    replayed_alike = rejudge or repr(again.findings) == repr(run.findings)
    return judged(again if rejudge else run, replayed_alike=replayed_alike, with_limits=with_limits)


def results(done: list[Judged]) -> dict[str, Any]:
    """Everything that is reported, as plain numbers and strings."""
    ours = [one.verdicts[OURS] for one in done]
    judges = {}
    for name in (OURS, *SUITES):
        verdicts = [one.verdicts[name] for one in done]
        of_half = {h: [v for v in verdicts if h in ("all", CASES[v.case].half)] for h in HALVES}
        judges[name] = {h: summary(vs, lambda case: CASES[case].onset).to_json() for h, vs in of_half.items()}
    otherwise = [v for v, one in zip(ours, done, strict=True) if not one.replayed_alike]
    grids = merge([one.tried for one in done])
    return {
        "runs": len(done),
        "seeds": len({v.seed for v in ours}),
        "cases": {"sick": _cases(ours, sick=True), "healthy": _cases(ours, sick=False)},
        "healthy_steps": sum(v.steps for v in ours if not v.is_sick),
        "every_n_steps": EVERY_N_STEPS,
        "judges": judges,
        "causes": confusion(ours, lambda case: CASES[case].causes),
        "leave_one_family_out": [leave_one_out(limit, grids[limit.name]) for limit in LIMITS if limit.name in grids],
        "notable": [_notable(one.verdicts[OURS]) for one in done if _is_notable(one.verdicts[OURS])],
        "crashes": _told((one.verdicts[OURS], one.crash) for one in done if one.crash),
        "faults_of_the_monitor": _told((one.verdicts[OURS], " | ".join(one.faults)) for one in done if one.faults),
        "replayed_otherwise": [f"{v.case}-{v.seed}" for v in otherwise],
    }


def _cases(verdicts: list[Verdict], *, sick: bool) -> int:
    return len({v.case for v in verdicts if v.is_sick is sick})


def _told(pairs: Any) -> dict[str, str]:
    return {f"{v.case}-{v.seed}": text for v, text in pairs}


def _is_notable(v: Verdict) -> bool:
    is_good = v.outcome == "silent" or (v.outcome == "right" and bool(v.in_time))
    return not is_good or v.early > 0 or False in (v.cause_is_right, v.layer_is_right)


def _notable(v: Verdict) -> dict[str, Any]:
    kept = {"case": v.case, "seed": v.seed, "half": CASES[v.case].half, "outcome": v.outcome, "told": list(v.kinds)}
    rest = {"early": v.early, "delay": v.delay, "cause": v.cause, "layer_is_right": v.layer_is_right}
    return kept | {name: value for name, value in rest.items() if value not in (None, "", 0)}


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown",
        "changed_since": bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("lightning-gradflow", "lightning", "torch", "numpy", "scikit-learn")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.detection", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each case, counted from 0")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="names of cases; all of them by default")
    parser.add_argument("--out", type=Path, help=f"where the results are written, such as {RESULTS.name}")
    parser.add_argument("--cache", type=Path, help="folder that the recorded runs are kept in")
    parser.add_argument("--rejudge", action="store_true", help="judge what is in --cache anew, without training")
    parser.add_argument("--no-limits", action="store_true", help="leave out what other limits would have found")
    arguments = parser.parse_args(argv)
    if arguments.rejudge and arguments.cache is None:
        parser.error("--rejudge needs the --cache that an earlier run has filled")
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases must be names of cases in the zoo, got {', '.join(unknown)}")
    return arguments


def main(argv: list[str]) -> int:
    """Runs the benchmark, prints its table, and writes the results."""
    arguments = parse(argv)
    began = time.perf_counter()
    jobs = [(name, seed) for name in arguments.cases for seed in range(arguments.seeds)]
    if arguments.rejudge:
        jobs = [job for job in jobs if is_kept(*job, arguments.cache)]
    os.environ["OMP_NUM_THREADS"] = "1"
    done: list[Judged] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.cache or Path(scratch)
        task = partial(work, folder=folder, rejudge=arguments.rejudge, with_limits=not arguments.no_limits)
        # spawned: a process that was forked from one in which torch has threads may hang
        with multiprocessing.get_context("spawn").Pool(arguments.processes, prepare_process) as pool:
            for one in pool.imap(task, jobs):
                done.append(one)
                v = one.verdicts[OURS]
                note = _notable(v) if _is_notable(v) else ""
                print(f"{len(done):4}/{len(jobs)} {v.case}-{v.seed} {one.seconds:.1f} s {v.outcome} {note}", flush=True)
    found = {"environment": environment(), **results(done), "minutes": round((time.perf_counter() - began) / 60, 1)}
    print("\n" + markdown(found))
    for name in ("leave_one_family_out", "causes", "crashes", "faults_of_the_monitor", "replayed_otherwise"):
        print(f"\n{name}: {json.dumps(found[name], indent=1)}")
    if arguments.out:
        write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
