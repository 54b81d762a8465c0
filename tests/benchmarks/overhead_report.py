"""What watching costs as Markdown, for the README and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .overhead_fits import WARM_UP
from .report import row

BEGIN, END = "<!-- overhead:begin -->", "<!-- overhead:end -->"

NAMES = {
    "default": "`GradFlow()`, with its page and its summary",
    "gradients": "`GradNormLogger(every_n_steps=1)`: gradients at every step, all else at every 50th",
    "every step": "`GradFlow(every_n_steps=1)`",
    "every step, to W&B": "`GradFlow(every_n_steps=1)`, to W&B",
    "gradients, to W&B": "`GradNormLogger(every_n_steps=1)`, to W&B",
    "grad_norm": "Lightning's `grad_norm` at every step",
    "watch gradients": '`wandb.watch(log="gradients", log_freq=1)`',
    "watch all": '`wandb.watch(log="all", log_freq=1)`',
}
"""What the arms are called, in the order of the tables."""

_SHORT = NAMES | {
    "default": "`GradFlow()`",
    "gradients": "`GradNormLogger(every_n_steps=1)`",
    "every step, to W&B": "`GradFlow` to W&B",
    "gradients, to W&B": "`GradNormLogger` to W&B",
    "watch all": '`wandb.watch(log="all")`',
}
"""The same as short as can be, for where the table stands beside them."""

_MEASURES = {"wall": "time of a fit", "step": "time of a step", "flush_bytes": "bytes of a flush"}


def markdown(found: Mapping[str, Any]) -> str:
    """What was trained, the fits over plain ones, a sample, and what it is made of.

    Args:
        found: what `overhead.main` writes.
    """
    models = list(found["models"].values())
    parts = [
        _setting(found),
        "\n".join(_table("time of a fit, or of its counted steps, / of a plain one", models, _fit)),
        "\n".join(_table("ms that a sample adds", models, _sample)),
        "\n".join(_facts(models)),
        " ".join(_said(found, models)),
        _origin(found),
    ]
    return "\n\n".join(part for part in parts if part)


def short(found: Mapping[str, Any]) -> str:
    """The fits of the arms that a reader chooses between, with a line on what that is and on what was missed.

    Args:
        found: what `overhead.main` writes.
    """
    models = list(found["models"].values())
    shown = ("default", "gradients", "every step", "grad_norm", "watch all")
    said = (
        "Medians, in brackets the middle half, of fits on the CPU, to CSV or to W&B offline, measured on "
        f"{found['environment']['date']}."
    )
    title = "time of a fit, or of its steps, / of a plain one"
    return "\n".join(_table(title, models, _fit, shown)) + f"\n\n{said} {_missed(found)}"


def _setting(found: Mapping[str, Any]) -> str:
    steps, rounds = found["steps"], found["rounds"]
    return (
        f"Whole fits on the CPU, in one process and in turn, {rounds} of each kind, and {(rounds + 1) // 2} of those "
        "at the default cadence. Each is held against the plain fit "
        f"of its round that has as many steps and the same logger: {steps['long']} steps at the default cadence, which "
        f"samples every 50 and more often in the beginning, {steps['steady']} where the gradients are watched at every "
        f"step, of which the last {steps['steady'] - WARM_UP['steady']} are counted, and {steps['short']} where "
        f"everything is, of which the last {steps['short'] - WARM_UP['short']} are. Numbers are medians, in brackets "
        "the middle half. All log the loss as often as they are watched, to CSV, or to W&B offline."
        + (" Counted are seconds of the CPU and not of the clock on the wall." if found["clock"] == "CPU" else "")
    )


def _table(title: str, models: list[Mapping[str, Any]], cell: Any, arms: Collection[str] = tuple(NAMES)) -> list[str]:
    lines = [row(title, [model["title"] for model in models]), row("---", ["---:"] * len(models))]
    for arm, name in NAMES.items():
        if arm in arms and any(arm in model["arms"] for model in models):
            cells = [cell(model["arms"][arm]) if arm in model["arms"] else "-" for model in models]
            lines.append(row(name, cells))
    return lines


def _fit(arm: Mapping[str, Any]) -> str:
    ratio = arm["wall" if "own" in arm else "step"]
    places = 3 if "own" in arm else 2
    return f"{ratio['median']:.{places}f} ({ratio['low']:.{places}f}-{ratio['high']:.{places}f})"


def _sample(arm: Mapping[str, Any]) -> str:
    return f"{arm['sample_ms']['median']:.1f}"


def _facts(models: list[Mapping[str, Any]]) -> list[str]:
    """What the networks are, and what else was measured of each."""
    facts = {
        "parameters": lambda m: f"{m['parameters'] / 1e6:.1f} M in {m['tensors']} tensors",
        "a plain step": lambda m: f"{_plain(m):.0f} ms",
        "one read of every gradient, the least there can be": lambda m: (
            f"{m['floor_ms']:.2f} ms ({100 * m['floor_ms'] / _plain(m):.1f} % of a step)"
        ),
        "history for a flush to W&B": lambda m: _bytes(m, "every step, to W&B"),
        'the same of `wandb.watch(log="all")`': lambda m: _bytes(m, "watch all"),
        'a sample of `wandb.watch(log="all")` / of `GradFlow`': lambda m: _times(m, "every step, to W&B"),
        "the same / of `GradNormLogger`": lambda m: _times(m, "gradients, to W&B"),
        "page at the end of a fit": lambda m: _shown(m, "report"),
        "a row to W&B": lambda m: _shown(m, "wandb_row"),
        "a row to W&B with the picture of the run": lambda m: _shown(m, "wandb_row_with_picture"),
    }
    lines = [row("", [model["title"] for model in models]), row("---", ["---:"] * len(models))]
    return lines + [row(name, [fact(model) for model in models]) for name, fact in facts.items()]


def _plain(model: Mapping[str, Any]) -> float:
    """Milliseconds of a plain step, of the first arm that is plain."""
    return next(arm["step_ms"]["median"] for arm in model["arms"].values() if "wall" not in arm)


def _bytes(model: Mapping[str, Any], arm: str) -> str:
    return f"{model['arms'][arm]['flush_bytes'] / 1e3:.1f} kB" if arm in model["arms"] else "-"


def _times(model: Mapping[str, Any], arm: str) -> str:
    ratio = model["times_cheaper"][arm]
    return "-" if ratio is None else f"{ratio['median']:.0f}" if ratio["median"] < 1e6 else "free"


def _shown(model: Mapping[str, Any], what: str) -> str:
    return f"{model['shown_ms'][what]:.0f} ms" if what in model["shown_ms"] else "-"


def _said(found: Mapping[str, Any], models: list[Mapping[str, Any]]) -> list[str]:
    own = [model["arms"]["default"]["own"]["median"] for model in models if "default" in model["arms"]]
    said = []
    if own:
        listed = ", ".join(f"{one:.3f}" for one in own)
        said.append(
            f"Held against the steps between them in the same fit, the samples of `GradFlow()` make its steps {listed} "
            "times as long; that is without page and summary, and with less noise."
        )
    return said + _beyond(found)


def _beyond(found: Mapping[str, Any]) -> list[str]:
    missed = _not_met(found)
    if not missed:
        return ["All that was aimed at is met."]
    listed = "; ".join(f"{_aim(what, NAMES)} {_values(found, those)}" for what, those in missed.items())
    return [f"What was aimed at and is not met: {listed}."]


def _missed(found: Mapping[str, Any]) -> str:
    """The same in short: the limits, and what was measured beyond them."""
    missed = _not_met(found)
    if not missed:
        return "All that was aimed at is met."
    listed = "; ".join(f"{_aim(what, _SHORT)} {_beside(found, those)}" for what, those in missed.items())
    return f"Aimed at and missed: {listed}."


def _not_met(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    missed: dict[str, list[Mapping[str, Any]]] = {}
    for one in found["bars"]:
        if not one["is_met"]:
            missed.setdefault(one["what"], []).append(one)
    return missed


def _aim(what: str, names: Mapping[str, str]) -> str:
    """What a limit is on, in words."""
    about, _, of = what.rpartition(": ")
    theirs, _, ours = about.rpartition(" / ")
    if theirs:
        return f"a sample of {names[theirs]} / one of {names[ours]}"
    return f"{names[ours]}, {_MEASURES[of]}"


def _beside(found: Mapping[str, Any], those: list[Mapping[str, Any]]) -> str:
    """As in `at most 1.01 (transformer 1.02, LSTM 1.04)`."""
    listed = ", ".join(f"{found['models'][one['model']]['title'].split(',')[0]} {one['value']:.4g}" for one in those)
    return f"at {'most' if those[0]['most'] else 'least'} {those[0]['bar']:g} ({listed})"


def _values(found: Mapping[str, Any], those: list[Mapping[str, Any]]) -> str:
    listed = ", ".join(f"{one['value']:.4g} ({found['models'][one['model']]['title']})" for one in those)
    return f"{listed}, where it is to be {'at most' if those[0]['most'] else 'at least'} {those[0]['bar']:g}"


def _origin(found: Mapping[str, Any]) -> str:
    where = found["environment"]
    return (
        f"Made with `python -m tests.benchmarks.overhead` on {where['date']}: Python {where['python']}, torch "
        f"{where['torch']}, lightning {where['lightning']}, {where['machine']}, {where['threads']} threads, "
        f"{found['minutes']:.0f} minutes."
    )
