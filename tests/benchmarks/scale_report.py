"""How the cost of watching grows with the network, as Markdown, for the README and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import row

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"

HEADS = {"tensors": "parameter tensors", "parameters": "parameters"}
"""What grows, in words."""


def markdown(found: Mapping[str, Any]) -> str:
    """A table of sizes for each way to grow, with what they say.

    Args:
        found: what `scale.main` writes.
    """
    tables = ["\n".join(_table(kind, of_it["sizes"], found["run"])) for kind, of_it in found["grows"].items()]
    said = [_grows(kind, of_it["exponents"]) for kind, of_it in found["grows"].items()]
    return "\n\n".join([_setting(found), *tables, " ".join(said), _origin(found)])


def short(found: Mapping[str, Any]) -> str:
    """How a sample grows, in a sentence.

    Args:
        found: what `scale.main` writes.
    """
    said = []
    for kind, of_it in found["grows"].items():
        ends = of_it["sizes"][0], of_it["sizes"][-1]
        smallest, largest = (f"{one['everything']['sample_ms']:,.0f} ms with {_number(one[kind])}" for one in ends)
        steps = " and ".join(f"{one['step_ms']:,.0f} ms" for one in ends)
        power = of_it["exponents"]["everything"]["all"]
        said.append(f"from {smallest} to {largest} {HEADS[kind]} (by the power {power:.2f}; steps take {steps})")
    return f"In a growing network a sample takes {', and '.join(said)}. A power of 1 is linear."


def _setting(found: Mapping[str, Any]) -> str:
    run = found["run"]
    return (
        "Stacks of layers with a residual connection, on the CPU: many small ones, or eight large ones. A sampled step "
        "is held against the one before it and the one after it; the number is the median of "
        f"{found['pairs']}. The memory is the rise of the peak of the process. The checkpoint is that of a run of "
        f"{run['steps']:,} steps with a sample every {run['interval']}, made of copied rows: old ones are thinned."
        + (" Counted are seconds of the CPU and not of the clock on the wall." if found["clock"] == "CPU" else "")
    )


def _table(kind: str, sizes: list[Mapping[str, Any]], run: Mapping[str, int]) -> list[str]:
    heads = [
        "a step",
        "a sample",
        "of gradients alone",
        "memory of a sample",
        "a row in a checkpoint",
        f"checkpoint after {run['steps']:,} steps",
    ]
    lines = [row(HEADS[kind], heads), row("---", ["---:"] * len(heads))]
    for one in sizes:
        samples = [f"{one[watch]['sample_ms']:.1f} ms" for watch in ("everything", "gradients")]
        kept = [one["state_bytes"] / one["rows"], one[f"state_bytes_after_{run['steps']}"]]
        cells = [f"{one['step_ms']:.0f} ms", *samples, _memory(one), *(_size(size) for size in kept)]
        lines.append(row(_number(one[kind]), cells))
    return lines


def _memory(one: Mapping[str, Any]) -> str:
    """Beside it, where that says more than noise does, how many times the parameters it is."""
    extra, own = one.get("extra_bytes"), 4 * one["parameters"]
    if extra is None:
        return "-"
    return _size(extra) + (f" ({extra / own:.1f} x the parameters)" if own >= 1e8 else "")


def _size(size: float) -> str:
    """In steps of a thousand.

    Example: `_size(123456)` is "123 kB".
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.2g} {unit}" if size < 10 * limit else f"{size / limit:.0f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _number(count: int) -> str:
    return f"{count:,}" if count < 500_000 else f"{count / 1e6:.0f} M"


def _grows(kind: str, exponents: Mapping[str, Mapping[str, float]]) -> str:
    everything, gradients = exponents["everything"], exponents["gradients"]
    return (
        f"With the number of {HEADS[kind]} a sample grows by the power {everything['all']:.2f}, one of gradients "
        f"alone by {gradients['all']:.2f}, and between the two largest by {everything['last']:.2f} and "
        f"{gradients['last']:.2f} (1 is linear)."
    )


def _origin(found: Mapping[str, Any]) -> str:
    where = found["environment"]
    return (
        f"Made with `python -m tests.benchmarks.scale` on {where['date']}: Python {where['python']}, torch "
        f"{where['torch']}, lightning {where['lightning']}, {where['machine']}, {where['threads']} threads, "
        f"{found['minutes']:.0f} minutes."
    )
