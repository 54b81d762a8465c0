"""`python -m tests.benchmarks.readme` puts the committed results of the benchmarks into the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import cure, cure_report, detection, report

README = Path(__file__).parents[2] / "README.md"


def updated() -> str:
    """The README with the tables of the committed results; a benchmark without results leaves its place as it is."""
    text = README.read_text(encoding="utf-8")
    text = report.placed(text, report.markdown(_read(detection.RESULTS)))
    if cure.RESULTS.exists():
        table = cure_report.markdown(_read(cure.RESULTS))
        text = report.placed(text, table, cure_report.BEGIN, cure_report.END)
    return text


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    README.write_text(updated(), encoding="utf-8")
