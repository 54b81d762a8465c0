"""`python -m tests.benchmarks.readme` puts the committed results of the benchmarks into the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import cure, cure_report, detection, overhead, overhead_report, report, scale, scale_report

README = Path(__file__).parents[2] / "README.md"
_OTHERS = {cure.RESULTS: cure_report, overhead.RESULTS: overhead_report, scale.RESULTS: scale_report}


def updated() -> str:
    """The README with the tables of the committed results; a benchmark without results leaves its place as it is."""
    text = README.read_text(encoding="utf-8")
    text = report.placed(text, report.markdown(_read(detection.RESULTS)))
    for results, shown in _OTHERS.items():
        if results.exists():
            text = report.placed(text, shown.markdown(_read(results)), shown.BEGIN, shown.END)
    return text


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    README.write_text(updated(), encoding="utf-8")
