"""The results of the benchmark of cures as Markdown, for the README and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import cell, row

BEGIN, END = "<!-- cure:begin -->", "<!-- cure:end -->"

NAMES = {
    "none": "nothing",
    "random": "random action",
    "clip": "clipping only",
    "auto": '`GradFlow(mitigate="apply")`',
}
"""What the arms are called."""


def markdown(found: Mapping[str, Any]) -> str:
    """What was trained, the arms over all trainings and by family, and what stands beside them.

    Args:
        found: what `cure.main` writes; the tables are of the first budget in it.
    """
    budget, main = next(iter(found["budgets"].items()))
    parts = [
        _setting(found, float(budget), main),
        "\n".join(_arms(main)),
        "\n".join(_families(main)),
        " ".join(said for said in (_ahead(main), _not_sick(main), *_at_other_budgets(found)) if said),
        _origin(found),
    ]
    return "\n\n".join(part for part in parts if part)


def short(found: Mapping[str, Any]) -> str:
    """The arms over all trainings, with a line on what that is.

    Args:
        found: what `cure.main` writes; the table is of the first budget in it.
    """
    main = next(iter(found["budgets"].values()))
    heads = ["cured", "gap closed (median)", "healthy runs harmed", "untouched to the bit"]
    lines = [row("", heads), row("---", ["---:"] * len(heads))]
    for arm, of_it in main["arms"].items():
        healthy = [cell(of_it["healthy"][what]) for what in ("harmed", "untouched")]
        lines.append(row(NAMES[arm], [cell(of_it["cured"]), _percent(of_it["gap"]), *healthy]))
    said = (
        f"Runs of {main['cases']['sick']} sick and {main['cases']['healthy']} healthy trainings over {found['seeds']} "
        f"seeds, measured on {found['environment']['date']}; in brackets Wilson's 95 % interval. The gap is that from "
        "the end without a cure to the end of the training without the fault, and cured is what closes 80 % of it. All "
        "act at the alarms of GradFlow alone: a healthy training without one is the same in each row."
    )
    return "\n".join(lines) + f"\n\n{said} {_ahead(main)}".rstrip()


def _setting(found: Mapping[str, Any], budget: float, main: Mapping[str, Any]) -> str:
    sick, healthy = main["cases"]["sick"], main["cases"]["healthy"]
    return (
        f"{sick} sick trainings whose fault a callback can cure in the run, and {healthy} healthy ones, over "
        f"{found['seeds']} seeds each. Which faults those are was settled by what they are, before any was cured: "
        "`tests/benchmarks/zoo/curable.py` lists them, and the others with the reason. A training has the same seed, "
        "the same batches and the same number of steps in each arm, and is never started again; it gets "
        f"{budget:g} times the steps within which its label was settled. Cured is what closes at least 80 % of the gap "
        "between the end without a cure and the end of the fault-free twin. Where a training ends worse than its twin "
        "began, the gap counts from there. *Random action* takes any remedy for any layers at the moments at which "
        "ours may act, and does not look whether it helped. All arms act at alarms: a healthy training in which ours "
        "had nothing to do is not trained again in the others. A healthy training is harmed if it ends more than 10 % "
        "worse, and untouched if all losses and weights are those of a Trainer without a callback, to the last bit."
    )


def _arms(main: Mapping[str, Any]) -> list[str]:
    heads = ["cured", "gap closed (median)", "actions", "kept", "healthy runs harmed", "untouched"]
    lines = [row("", heads), row("---", ["---:"] * len(heads))]
    for arm, of_it in main["arms"].items():
        cells = [cell(of_it["cured"]), _percent(of_it["gap"]), str(of_it["taken"]), _kept(arm, of_it)]
        lines.append(row(NAMES[arm], [*cells, cell(of_it["healthy"]["harmed"]), cell(of_it["healthy"]["untouched"])]))
    return lines


def _families(main: Mapping[str, Any]) -> list[str]:
    """Cured by each arm, family by family, and the actions of the last arm."""
    arms = list(main["arms"])
    last = arms[-1]
    heads = ["runs", *(NAMES[arm] for arm in arms), "gap closed (median)", "actions", "kept", "steps to the first one"]
    lines = [row("cured, by family", heads), row("---", ["---:"] * len(heads))]
    for family, of_it in main["families"].items():
        ours = of_it[last]
        cured = [str(of_it[arm]["cured"]["hits"]) for arm in arms]
        rest = [_percent(ours["gap"]), str(ours["taken"]), _kept(last, ours), _steps(ours["delay"])]
        lines.append(row(family.replace("_", " "), [str(of_it["runs"]), *cured, *rest]))
    return lines


def _percent(share: float | None) -> str:
    """How far below zero says nothing: a run that diverges may end anywhere."""
    if share is None:
        return "-"
    return f"{100 * abs(share):.0f} %" if share > -0.005 else "below 0 %"


def _steps(steps: float | None) -> str:
    return "-" if steps is None else f"{steps:g}"


def _kept(arm: str, of_it: Mapping[str, Any]) -> str:
    """Random actions are not put to the proof."""
    return "-" if arm in ("none", "random") else str(of_it["kept"])


def _ahead(main: Mapping[str, Any]) -> str:
    if "auto" not in main["arms"]:
        return ""
    rivals = [arm for arm in main["arms"] if arm not in ("auto", "none")]
    against = " and ".join(NAMES[arm] for arm in rivals)
    if not main["not_ahead"]:
        return f"In each of {len(main['families'])} families more runs are cured than by {against}." if rivals else ""
    where = "; ".join(
        f"{one['family'].replace('_', ' ')} ({one['ours']} against {one['theirs']} of {one['runs']} by "
        f"{NAMES[one['arm']]})"
        for one in main["not_ahead"]
    )
    return f"Not ahead of {against}: {where}."


def _not_sick(main: Mapping[str, Any]) -> str:
    left = main["not_sick"]
    if not left:
        return "Every label holds with so many steps."
    seeds: dict[str, list[str]] = {}
    for one in left:
        seeds.setdefault(one["case"], []).append(str(one["seed"]))
    named = ", ".join(f"`{case}` (seed {', '.join(of_it)})" for case, of_it in seeds.items())
    return f"Left out, since their label does not hold with so many steps: {named}."


def _at_other_budgets(found: Mapping[str, Any]) -> list[str]:
    said = []
    for budget, of_it in list(found["budgets"].items())[1:]:
        cured = ", ".join(f"{NAMES[arm]} {cell(one['cured'])}" for arm, one in of_it["arms"].items() if arm != "none")
        times = "the steps of the label alone" if float(budget) == 1 else f"{budget} times those steps"
        said.append(f"With {times} are cured: {cured}.")
    return said


def _origin(found: Mapping[str, Any]) -> str:
    where, minutes = found["environment"], sum(of_it["minutes"] for of_it in found["budgets"].values())
    return (
        f"Made with `python -m tests.benchmarks.cure` on {where['date']}: Python {where['python']}, torch "
        f"{where['torch']}, lightning {where['lightning']}, {where['machine']}, {minutes:.0f} minutes of training."
    )
