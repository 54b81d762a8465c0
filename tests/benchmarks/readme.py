"""`python -m tests.benchmarks.readme` puts the committed results of the benchmarks into the README and its page.

docs/benchmarks.md has the tables in full, and the README those that a reader needs first.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import cure, cure_report, detection, overhead, overhead_report, report, scale, scale_report

ROOT = Path(__file__).parents[2]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PAGES = (README, BENCHMARKS)
REPORTS = {
    detection.RESULTS: report,
    cure.RESULTS: cure_report,
    overhead.RESULTS: overhead_report,
    scale.RESULTS: scale_report,
}


def updated(page: Path) -> str:
    """A page with the tables of the committed results; a benchmark without results leaves its place as it is."""
    text = page.read_text(encoding="utf-8")
    for results, shown in REPORTS.items():
        if results.exists():
            table = shown.short if page == README else shown.markdown
            found = json.loads(results.read_text(encoding="utf-8"))
            text = report.placed(text, table(found), shown.BEGIN, shown.END)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page), encoding="utf-8")
