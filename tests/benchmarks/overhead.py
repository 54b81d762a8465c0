"""What it costs to watch a training: whole fits, watched in several ways, over plain ones.

`python -m tests.benchmarks.overhead` trains three networks. In a round each arm makes one whole fit, in one process and
with all cores, and is held against the plain fit of the same length and logger in the same round; the order turns from
round to round. The long fits at the default cadence are made in every second round. Run it on a
machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger

from lightning_gradflow import GradFlow
from lightning_gradflow.callbacks.base import Monitor
from lightning_gradflow.sinks import ConsoleSink, ReportSink, View, WandbSink
from tests.made_up import Hours

from .cost_models import MODELS, SMALL, Model
from .detection import environment
from .overhead_fits import ARMS, PLANNED, STEPS, WARM_UP, Arm, Fit, fit, floor
from .overhead_report import markdown
from .report import write

RESULTS = Path(__file__).with_name("results") / "overhead.json"
OURS, GRADIENTS, THEIRS = "every step, to W&B", "gradients, to W&B", "watch all"
FREE = 1e6
Round = Mapping[str, Fit]

# -- statistics -------------------------------------------------------------------------------------------------------


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """The median, and the range of the middle half."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def paired(rounds: Sequence[Round], arm: Arm, of: Callable[[Fit], float]) -> dict[str, float]:
    """A number of an arm over that of its plain twin in the same round."""
    return quartiles(of(one[arm.name]) / of(one[arm.twin]) for one in rounds)


def sample_costs(rounds: Sequence[Round], arm: Arm) -> list[float]:
    """Seconds that a sample adds to a step, round by round: the steps of the arm less those of its twin."""
    return [
        (one[arm.name].mean_step - one[arm.twin].mean_step) * len(one[arm.name].counted_steps) / one[arm.name].counted
        for one in rounds
    ]


def times_cheaper(rounds: Sequence[Round], ours: str, theirs: str = THEIRS) -> dict[str, float] | None:
    """How many times as much a sample of theirs costs; None where one of the two was not trained.

    A round in which noise made ours look free says nothing of how much cheaper it is: it counts as a million times.
    """
    if not all(ours in one and theirs in one for one in rounds):
        return None
    costs = zip(sample_costs(rounds, ARMS[theirs]), sample_costs(rounds, ARMS[ours]), strict=True)
    return quartiles(their / our if our > 0 else FREE for their, our in costs)


def of_arm(rounds: Sequence[Round], arm: Arm) -> dict[str, Any]:
    """All that is reported of an arm."""
    rounds = [one for one in rounds if arm.name in one]
    fits = [one[arm.name] for one in rounds]
    found: dict[str, Any] = {"wall_seconds": quartiles(one.wall for one in fits), "steps": len(fits[0].steps)}
    found["step_ms"] = quartiles(1e3 * one.mean_step for one in fits)
    if arm.is_plain:
        return found
    found["wall"] = paired(rounds, arm, lambda one: one.wall)
    found["step"] = paired(rounds, arm, lambda one: one.mean_step)
    found["between"] = paired(rounds, arm, lambda one: float(np.median(one.counted_steps)))
    found["samples"] = len(fits[0].sampled)
    if arm.is_long:
        found["sample_ms"] = quartiles(1e3 * one.own_sample for one in fits)
        found["own"] = quartiles(1 + one.own_overhead for one in fits)
    else:
        found["sample_ms"] = quartiles(1e3 * cost for cost in sample_costs(rounds, arm))
    if arm.to_wandb:
        found["flush_bytes"] = float(np.median([one.flush for one in fits]))
    found["findings"] = sorted({finding for one in fits for finding in one.findings})
    return found


# -- measuring --------------------------------------------------------------------------------------------------------


def shown(flow: Monitor, folder: Path) -> dict[str, float]:
    """Milliseconds that it takes to show a fit: at its end, and for a row with and without a picture of the run."""
    steps = flow.history.steps
    view = View(flow.history, flow.findings, flow.actions, int(steps[-1]), 0.5, "Network")
    logger = WandbLogger(project="cost", save_dir=folder)
    logger.experiment  # noqa: B018  # W&B takes a second to begin
    clock = Hours()
    to_wandb, report = WandbSink(logger, now=clock), ReportSink(folder)
    to_wandb.on_row(view)  # there is no picture of the first row
    clock.row(0.5)
    try:
        return {
            "report": _taken(report.on_end, view),
            "summary": _taken(ConsoleSink(report).on_end, view),
            "wandb_row_with_picture": _taken(to_wandb.on_row, replace(view, progress=0.7)),
            "wandb_row": float(np.median([_taken(to_wandb.on_row, view) for _ in range(9)])),
            "wandb_end": _taken(to_wandb.on_end, view),
        }
    finally:
        logger.experiment.finish()


def _taken(call: Callable[[View], None], view: View) -> float:
    began = time.perf_counter()
    call(view)
    return 1e3 * (time.perf_counter() - began)


def turned(arms: Sequence[Arm], by: int) -> list[Arm]:
    """The arms of each twin in turn, beginning with another one each time, so that no place in the order is its own."""
    families = [[arm for arm in arms if arm.twin == twin] for twin in dict.fromkeys(arm.twin for arm in arms)]
    return [family[(at + by) % len(family)] for family in families for at in range(len(family))]


def measure(
    model: Model,
    arms: Sequence[Arm],
    rounds: int,
    steps: Mapping[str, int],
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """All of one network.

    Args:
        model: what is trained.
        arms: how, with the plain twin of each.
        rounds: how often.
        steps: how many steps a fit has, by its length.
        now: tells the time in seconds.
    """
    parameters = list(model.build().parameters())
    screens: dict[str, float] = {}

    def look(monitors: Sequence[Monitor], folder: Path) -> None:
        if not screens and isinstance(monitors[0], GradFlow):
            screens.update(shown(monitors[0], folder))

    made: list[Round] = []
    for i in range(rounds):
        one: dict[str, Fit] = {}
        for arm in turned([arm for arm in arms if not arm.is_long or i % 2 == 0], i):
            then = look if arm.is_long and not arm.is_plain else None
            one[arm.name] = fit(model, arm, steps[arm.length], then, now)
            taken = f"{one[arm.name].wall:.2f} s, {1e3 * one[arm.name].mean_step:.1f} ms a step"
            print(f"  round {i + 1}/{rounds} {arm.name}: {taken}", flush=True)
        made.append(one)
    return {
        "title": model.title,
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters),
        "floor_ms": 1e3 * floor(model),
        "arms": {arm.name: of_arm(made, arm) for arm in arms},
        "times_cheaper": {ours: times_cheaper(made, ours) for ours in (OURS, GRADIENTS)},
        "shown_ms": screens,
    }


def bars(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the cost is to stay below, and what it is, for each network."""
    asked = []
    for name, model in found["models"].items():
        arms = model["arms"]
        limits = [
            ("default", "wall", 1.01),
            ("gradients", "step", 1.03),
            ("every step", "step", 1.5),
            (OURS, "flush_bytes", 3000),
            (GRADIENTS, "flush_bytes", 3000),
        ]
        for arm, what, limit in limits:
            if arm in arms:
                value = arms[arm][what] if what == "flush_bytes" else arms[arm][what]["median"]
                asked.append({"model": name, "what": f"{arm}: {what}", "value": value, "bar": limit, "most": True})
        for ours, ratio in model["times_cheaper"].items():
            if ratio is not None:
                what = f"{THEIRS} / {ours}: sample"
                asked.append({"model": name, "what": what, "value": ratio["median"], "bar": 20, "most": False})
    return [
        one | {"is_met": one["value"] <= one["bar"] if one["most"] else one["value"] >= one["bar"]} for one in asked
    ]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="fits of each arm; half as many of the long ones")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    watched = [arm.name for arm in ARMS.values() if not arm.is_plain]
    parser.add_argument("--arms", nargs="+", default=watched, choices=watched, help="all of them by default")
    what = {
        "long": "at the default cadence",
        "steady": "whose gradients are watched at every step",
        "short": "that is watched at every step",
    }
    for length, steps in STEPS.items():
        parser.add_argument(f"--{length}", type=int, default=steps, help=f"steps of a fit {what[length]}")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of the CPU, to try it where others use the machine too"
    )
    parser.add_argument("--out", type=Path, help=f"where the results are written, such as {RESULTS.name}")
    arguments = parser.parse_args(argv)
    for name, least in {"rounds": 1, **{length: warm_up + 3 for length, warm_up in WARM_UP.items()}}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be in [{least}, inf), got {getattr(arguments, name)}")
    return arguments


def main(argv: list[str]) -> int:
    """Runs the benchmark, prints its tables, and writes the results."""
    arguments = parse(argv)
    began = time.perf_counter()
    wanted = {name for chosen in arguments.arms for name in (chosen, ARMS[chosen].twin)}
    arms = [arm for name, arm in ARMS.items() if name in wanted]
    for arm in arms:  # imports, and what W&B and torch do once
        fit(SMALL, arm, WARM_UP["long"] + 3)
    models = {}
    for name in arguments.models:
        print(f"{name}:", flush=True)
        steps = {length: getattr(arguments, length) for length in STEPS}
        now = time.process_time if arguments.cpu_time else time.perf_counter
        models[name] = measure(MODELS[name], arms, arguments.rounds, steps, now)
    found = {
        "environment": environment() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "rounds": arguments.rounds,
        "steps": {length: getattr(arguments, length) for length in STEPS},
        "planned": PLANNED,
        "clock": "CPU" if arguments.cpu_time else "wall",
        "models": models,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    found["bars"] = bars(found)
    print("\n" + markdown(found))
    for one in found["bars"]:
        sign, word = ("<=", ">=")[not one["most"]], "met" if one["is_met"] else "NOT MET"
        print(f"{one['model']:12} {one['what']:40} {one['value']:10.3f} {sign} {one['bar']:<8} {word}")
    if arguments.out:
        write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
