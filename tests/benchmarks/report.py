"""The results of the benchmark as Markdown, for the README and docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shares import Share

BEGIN, END = "<!-- detection:begin -->", "<!-- detection:end -->"


def write(found: Mapping[str, Any], path: Path) -> None:
    """Keeps the results of a benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _share(numbers: Mapping[str, Any]) -> Share:
    return Share(numbers["hits"], numbers["total"])


def cell(numbers: Mapping[str, Any]) -> str:
    """As in `57/60 (86-98 %)`: hits, total and the interval."""
    share = _share(numbers)
    low, high = share.interval
    return f"{share.hits}/{share.total} ({100 * low:.0f}-{100 * high:.0f} %)" if share.total else "-"


def row(name: str, cells: list[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


def markdown(found: Mapping[str, Any]) -> str:
    """What was trained, the table of all judges, and what else is known of our own findings.

    Args:
        found: what `detection.results` gives, with its environment.
    """
    return "\n\n".join([_setting(found), "\n".join(_comparison(found)), " ".join(_own(found)), _origin(found)])


def short(found: Mapping[str, Any]) -> str:
    """For each judge what it found and how many healthy runs it alarmed, with a line on what that is.

    Args:
        found: what `detection.results` gives, with its environment.
    """
    heads = ["faults found", "healthy runs alarmed"]
    lines = [row("", heads), row("---", ["---:"] * len(heads))]
    for name, halves in found["judges"].items():
        lines.append(row(_called(name), [cell(halves["all"]["recall"]), cell(halves["all"]["false_alarms"])]))
    sick, healthy, ours = found["cases"]["sick"], found["cases"]["healthy"], found["judges"]["GradFlow"]["report"]
    said = (
        f"Runs of {sick} sick and {healthy} healthy trainings over {found['seeds']} seeds, measured on "
        f"{found['environment']['date']}; in brackets Wilson's 95 % interval. A rule that only says that something is "
        f"wrong counts as naming it. In the half that was held out `GradFlow` found {cell(ours['recall'])} and alarmed "
        f"{cell(ours['false_alarms'])}."
    )
    return "\n".join(lines) + "\n\n" + said


def _setting(found: Mapping[str, Any]) -> str:
    sick, healthy = found["cases"]["sick"], found["cases"]["healthy"]
    return (
        f"{sick + healthy} small trainings on real data, {sick} sick and {healthy} healthy, each over {found['seeds']} "
        f"seeds: {found['runs']} runs. A training is sick if its twin without the fault ends clearly better in as many "
        "steps. Families of similar trainings were dealt to two halves: limits were fitted on one, and *held "
        "out* is the other. A fault is found if it is named at or after the step where it sets in. A rule that only "
        "says that something is wrong counts as naming it. The published rules look at every step, "
        f"`GradFlow(every_n_steps={found['every_n_steps']})` at one in {found['every_n_steps']}. In brackets stands "
        "Wilson's 95 % interval; it takes runs as independent, which the seeds of one training are not."
    )


def _comparison(found: Mapping[str, Any]) -> list[str]:
    heads = [
        "found",
        "found, held out",
        "wrong kind",
        "healthy runs alarmed",
        "held out",
        "alarms per 1,000 of their steps",
    ]
    lines = [row("", heads), row("---", ["---:"] * len(heads))]
    for name, halves in found["judges"].items():
        every, report = halves["all"], halves["report"]
        lines.append(
            row(
                _called(name),
                [
                    cell(every["recall"]),
                    cell(report["recall"]),
                    str(every["wrong_kind"]["hits"]),
                    cell(every["false_alarms"]),
                    cell(report["false_alarms"]),
                    f"{every['false_alarms_per_1000_steps']:.2f}",
                ],
            )
        )
    return lines


def _called(judge: str) -> str:
    return f"`{judge}`" if judge == "GradFlow" else judge


def _own(found: Mapping[str, Any]) -> list[str]:
    ours = found["judges"]["GradFlow"]["all"]
    early, moved = _share(ours["early"]), found["leave_one_family_out"]
    runs = {(run["case"], run["seed"]) for one in moved for run in one["changed"]}
    said = [
        f"Where `GradFlow` found the fault, the cause it told was right in {cell(ours['right_cause'])} runs,",
        f"and the first layer it named in {cell(ours['right_layer'])}.",
        f"Of the faults that are there from the start, {cell(ours['in_time_at_start'])} were told within three steps;",
        f"of those that set in later, {cell(ours['in_time_late'])} within one sampling interval.",
        f"By families, {cell(ours['recall_families'])} sick ones were found in every run,",
        f"and {cell(ours['false_alarm_families'])} healthy ones gave an alarm in any.",
    ]
    if early.hits:
        said.append(f"In {early.hits} of {early.total} runs with a late fault it warned before there was one.")
    if moved:
        said.append(
            f"With each of {len(moved)} limits fitted anew on all families but one, for each family in turn, "
            f"{len(runs)} of {found['runs']} runs of the families left out are judged otherwise."
        )
    return said


def _origin(found: Mapping[str, Any]) -> str:
    where = found["environment"]
    return (
        f"Made with `python -m tests.benchmarks.detection` on {where['date']}: Python {where['python']}, torch "
        f"{where['torch']}, lightning {where['lightning']}, {where['machine']}, {found['minutes']:.0f} minutes. The "
        "published rules and their sources are in `tests/benchmarks/published.py`."
    )


def placed(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with what stands between the two marks replaced.

    Raises:
        ValueError: if the text does not hold each mark once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"text must hold {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
