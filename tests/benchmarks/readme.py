"""`python -m tests.benchmarks.readme` puts the committed results of the benchmark into the README."""

from __future__ import annotations

import json
from pathlib import Path

from .detection import RESULTS
from .report import markdown, placed

README = Path(__file__).parents[2] / "README.md"


def updated() -> str:
    """The README with the table of the committed results."""
    return placed(README.read_text(encoding="utf-8"), markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    README.write_text(updated(), encoding="utf-8")
